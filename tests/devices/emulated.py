"""A device that is none: it computes on the processor, and refuses what a GPU refuses.

Tensors on it may not be mixed with tensors of the processor, read as numpy arrays or made with a generator of the
processor. So a test that was written for a GPU runs without one, on real values, and a tensor that the package left on
the processor is seen. Its tensors are a subclass: what refuses weights of a subclass refuses them too
(`NeuronSelection.param_groups`, deltas), and tests that go through there do not pass on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "emulated"
# An index may be on the processor, and a copy goes from one device to another.
MIXED = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "_unsafe_index", "set_")


class EmulatedTensor(Tensor):
    """A tensor on the device, in front of one on the processor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> EmulatedTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw!r} on {NAME}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = EmulatedTensor(self.raw.clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            else:
                copied.requires_grad_(self.requires_grad)
            if self.grad is not None:
                copied.grad = self.grad.clone()
            copied.__dict__.update({key: value for key, value in self.__dict__.items() if key != "raw"})
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        return _restored, (self.raw, self.requires_grad, isinstance(self, torch.nn.Parameter))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the tensors behind."""
        return run(func, *args, **(kwargs or {}))


def _restored(raw: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    tensor = EmulatedTensor(raw)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the processor; its results are on the device if its tensors are, or where it is told."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device, name = kwargs.get("device"), func.overloadpacket.__name__
    given = [leaf for leaf in leaves if isinstance(leaf, EmulatedTensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, EmulatedTensor) and leaf.dim()]
    if given and others and name not in MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu in {func}")
    generator = kwargs.get("generator")
    placed = bool(given) if device is None else torch.device(device).type == NAME
    if placed and generator is not None and not given:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    behind = {id(leaf.raw): leaf for leaf in given}
    plain_args, plain = tree_map(lambda x: x.raw if isinstance(x, EmulatedTensor) else x, (args, kwargs))
    if device is not None:
        plain["device"] = "cpu"
    found = func(*plain_args, **plain)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, EmulatedTensor):
            return value
        if id(value) in behind:
            return behind[id(value)]
        return EmulatedTensor(value) if placed else value

    return tree_map(wrapped, found)


class FromData(TorchFunctionMode):
    """Tensors and indices of lists are copied to the device: made there, they pass the fallback by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            return func(
                args[0], torch.as_tensor(args[1], dtype=None if args[1] else torch.int64).to(args[0].device), *args[2:]
            )
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device).type != NAME:
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        made = func(*args, **{key: value for key, value in kwargs.items() if key != "device"})
        return made.to(device).requires_grad_(requires_grad)


def register() -> torch.library.Library:
    """Let there be the device; it is there as long as what is returned."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    FromData().__enter__()
    torch.serialization.add_safe_globals([_restored])
    return library
