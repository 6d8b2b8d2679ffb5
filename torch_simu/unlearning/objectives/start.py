"""StartModel: what the model said before the first step, without a second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel


class StartModel:
    """The values that the trained parameters of a model had when this was made.

    Only what requires a gradient is kept: make the optimizer, or the groups for it, before.

    Args:
        model: The model before the first step.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._values: dict[str, Tensor] = {
            name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad
        }

    def __repr__(self) -> str:
        return f"StartModel({len(self._values)} parameters)"

    @contextmanager
    def in_place(self, model: PreTrainedModel) -> Iterator[None]:
        """Give the model its old values inside the block, without gradients, and its own back after it."""
        params = {name: param for name, param in model.named_parameters() if name in self._values}
        own = {name: param.data for name, param in params.items()}
        try:
            for name, param in params.items():
                param.data = self._values[name]
            with torch.no_grad():
                yield
        finally:
            for name, param in params.items():
                param.data = own[name]
