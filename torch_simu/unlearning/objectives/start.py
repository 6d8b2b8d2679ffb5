"""StartModel: what the model said before the first step, without a second model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from torch_simu._checks import problem
from torch_simu.layers.dtensors import is_dtensor


class StartModel:
    """The values that the trained parameters of a model had when this was made.

    Only what requires a gradient is kept: make the optimizer, or the groups for it, before. The model may be moved,
    wrapped for data parallelism or sharded afterwards.

    Args:
        model: The model before the first step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values: dict[str, Tensor] = {
            name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad
        }

    def __repr__(self) -> str:
        return f"StartModel({len(self._values)} parameters)"

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Give the model its old values inside the block, without gradients, and its own back after it.

        Raises:
            ValueError: If the model lacks a parameter, as one that was made otherwise.
        """
        plain = model.module if isinstance(model, DistributedDataParallel | DataParallel) else model
        _reshard(plain)
        params = self._params(plain)
        own = {name: param.detach().clone() if is_dtensor(param) else param.data for name, param in params.items()}
        try:
            _give(params, self._values)
            with torch.no_grad():
                yield
        finally:
            _reshard(plain)
            _give(params, own)

    def _params(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of the values, which are brought to where they are now."""
        found = dict(model.named_parameters())
        for name, value in self._values.items():
            if name not in found:
                wrong = f"The model has no parameter {name!r}"
                advice = "Make the objective of the model that is trained, behind attach_deltas."
                raise ValueError(problem(wrong, "that of the start model", advice))
            param = found[name]
            value = value.to(param.device)
            if is_dtensor(param) and not is_dtensor(value):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
            self._values[name] = value
        return {name: found[name] for name in self._values}


def _reshard(model: nn.Module) -> None:
    """Drop what FSDP2 has gathered: its root keeps whole parameters behind a forward, with what was in them then."""
    if not any(is_dtensor(param) for param in model.parameters()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _give(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, param in params.items():
            if is_dtensor(param):
                # FSDP2 gathers from the memory that it knows.
                param.copy_(values[name])
            else:
                param.data = values[name]
