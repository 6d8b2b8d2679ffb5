"""frozen: a model without anything to train, for the time of an attribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torch_simu.bitsandbytes.packing import codes_as_loaded


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without trainable parameters, and restore both on the way out.

    Raises:
        ValueError: If 4-bit codes were packed for inference, which pass no gradient on.
    """
    training = [module for module in model.modules() if module.training]
    trainable = [param for param in model.parameters() if param.requires_grad]
    try:
        for module in training:
            module.training = False
        for param in trainable:
            param.requires_grad_(False)
        with codes_as_loaded(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for param in trainable:
            param.requires_grad_(True)
