"""Fake tensors on a GPU, which have no data, and a count of what would wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPIES = ("_to_copy", "copy_", "_copy_from")
_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class Waits(TorchDispatchMode):
    """Counts what makes a processor wait for the device: reading a scalar, and copying from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        name = func.overloadpacket.__name__
        # Before it runs: there is no scalar in a fake tensor to be read.
        if name in _READS and args[0].device.type == "cuda":
            self.counts[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in _COPIES:
            devices = {each.device.type for each in tree_leaves((args, result)) if isinstance(each, Tensor)}
            if len(devices) > 1:
                self.counts[f"{name} between {' and '.join(sorted(devices))}"] += 1
        return result


@contextmanager
def fake_cuda() -> Iterator[Callable[[Tensor], Tensor]]:
    """Let tensors be fake: yields a function that makes a fake one on `cuda` of any tensor."""

    def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        # The method looks for the driver first; the operation does not.
        return torch.ops.aten.copy_.default(self, source, non_blocking)

    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(Tensor, "copy_", copy_):

        def fake(tensor: Tensor) -> Tensor:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

        yield fake


def fake_model(model: nn.Module, fake: Callable[[Tensor], Tensor], dtype: torch.dtype) -> nn.Module:
    """Put fake parameters on `cuda` in place of those of a model."""
    for name, param in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, fake(nn.Parameter(param.detach().to(dtype))))
    return model
