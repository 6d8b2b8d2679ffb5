"""CUDA without a GPU: fake tensors that show what waits for the device, and a tape that replays like a CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_COPIES = ("_to_copy", "copy_", "_copy_from", "to")


class Waits(TorchDispatchMode):
    """Counts what makes a processor wait for the device: reading a scalar, and copying from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero"):
            source = args[0]
            if source.device.type == "cuda":
                self.counts[name] += 1
        elif name in _COPIES:
            devices = {each.device.type for each in tree_leaves((args, result)) if isinstance(each, Tensor)}
            if len(devices) > 1:
                self.counts[f"{name} between {' and '.join(sorted(devices))}"] += 1
        return result


@contextmanager
def fake_cuda() -> Iterator[Callable[[Tensor], Tensor]]:
    """Let tensors be fake: yields a function that makes a fake one on `cuda` of any tensor."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(tensor: Tensor) -> Tensor:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            return torch.nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else made

        yield fake
    assert mode is not None


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does: tensors from outside are addresses, what the host knew is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), f"{name} cannot be captured"
        result = func(*args, **kwargs)
        self.records.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the recorded operations again, on what is at their addresses now."""
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, result in self.records:
            given = {id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            found = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(result), tree_leaves(found), strict=True):
                # What an operation changed in place stays at its address.
                if isinstance(old, Tensor) and id(old) not in given:
                    made[id(old)] = new
