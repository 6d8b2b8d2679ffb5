"""Put what a test makes on a device, and leave alone what the package makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[2]
TESTS, PACKAGE, OWN = str(ROOT / "tests"), str(ROOT / "torch_simu"), __file__


def made_by_a_test() -> bool:
    """Whether the innermost of these files that is being run is a test's, and not the package's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return False
        if name.startswith(TESTS) and name != OWN:
            return True
        frame = frame.f_back
    return False


class Placed(TorchFunctionMode):
    """Tensors that tests make without naming a device are on this one.

    A default device of torch would hide what the package makes on the processor and then adds to tensors on the device.
    """

    current: ClassVar[list[torch.device]] = []

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __enter__(self) -> Placed:
        self.current.append(self.device)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.current.pop()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None or not made_by_a_test():
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device != self.device:
            # The same draws on every device.
            requires_grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(self.device).requires_grad_(requires_grad)
        return func(*args, **{**kwargs, "device": self.device})


def here() -> torch.device:
    """Where a test makes its tensors now."""
    return Placed.current[-1] if Placed.current else torch.device("cpu")
