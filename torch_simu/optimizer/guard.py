"""Guard: whether gradients are finite, and how many steps and refreshes were stopped because one was not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.optimizer.entries import Entry, agreed
from torch_simu.optimizer.groups import DUE


class Guard:
    """Looks at gradients, and counts what they stopped.

    One object for an optimizer and everything that wraps it with a copy of its attributes.
    """

    def __init__(self) -> None:
        self._here, self._said = 0, 0
        self._there: dict[torch.device, Tensor] = {}
        # Steps since the beginning; None: the curvature was refreshed, or there is no more to say.
        self._unrefreshed: int | None = 0
        # Steps that may be made before a refresh can be due; one that is stopped only makes it later.
        self._resting = 0

    @property
    def num_stopped(self) -> int:
        """How many steps and refreshes were stopped; reads the device."""
        return self._here + sum(int(count) for count in self._there.values())

    def passes(self, entries: Iterable[Entry], groups: Sequence[Mapping[str, Any]], what: str) -> Tensor | bool:
        """Say whether all gradients are finite, in every process that holds a shard.

        Args:
            entries: Their entries; each is looked at before the next one is made.
            groups: The optimizer's, which say whether it is capturable.
            what: What is made of the gradients, for the warning.

        Returns:
            A bool on the CPU; a scalar on the device where reading it would wait, or `capturable` asks for it.
        """
        params, devices = [], []
        bounds: list[Tensor] = []
        for entry in entries:
            params.append(entry.param)
            devices.append(entry.grad.device)
            # Both are NaN where an entry is; one vectorized pass, unlike a norm.
            bounds += torch.aminmax(entry.grad) if entry.grad.numel() else ()
        if not params:
            return True
        finite = torch.ones((), dtype=torch.bool, device=devices[0])
        if bounds:
            finite = torch.stack([bound.isfinite().to(bounds[0].device) for bound in bounds]).all()
        finite = agreed(finite, params)
        if finite.device.type == "cpu" and not any(group["capturable"] for group in groups):
            if finite:
                return True
            self._here += 1
            # Torch wraps a step twice, a refresh once.
            self.say(what, frames=6 if what == "step" else 5)
            return False
        if finite.device not in self._there:
            self._there[finite.device] = torch.zeros((), dtype=torch.int64, device=finite.device)
        self._there[finite.device] += finite.logical_not()
        return finite

    def say(self, what: str = "", *, frames: int = 3) -> None:
        """Warn of what was stopped since the last time, this step or this refresh; reads the device."""
        stopped, said = self.num_stopped, self._said
        if stopped == said:
            return
        self._said = stopped
        wrong = f"A selected gradient is not finite; this {what} changed nothing ({stopped} so far)"
        if not what:
            wrong = f"Selected gradients were not finite; {stopped - said} steps or refreshes changed nothing"
        advice = "Lower lr or check the loss."
        warnings.warn(problem(wrong, "finite gradients", advice), RuntimeWarning, stacklevel=frames)

    def count_refresh(self) -> None:
        """Count a refresh: the curvature is there."""
        self._unrefreshed, self._resting = None, 0

    def rest(self, steps: int) -> None:
        """Let no refresh be due before so many steps were made."""
        self._resting = steps

    def rests(self) -> bool:
        """Say whether no refresh can be due, so that the device need not be read."""
        return self._resting > 0

    def count_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Count a step, and warn once when the curvature was never refreshed in two intervals.

        By calls, not by the counters of the groups, which may be on the device.
        """
        self._resting = max(0, self._resting - 1)
        waiting = [group for group in groups if group["curvature"] in DUE]
        if self._unrefreshed is None or not waiting or torch.compiler.is_compiling():
            return
        if any(not isinstance(group["next_refresh"], Tensor) and group["next_refresh"] > 1 for group in waiting):
            self._unrefreshed = None
            return
        self._unrefreshed += 1
        if self._unrefreshed > 2 * max(group["hessian_interval"] for group in waiting):
            wrong = (
                f"The curvature was never refreshed in {self._unrefreshed} steps: every entry moves by its full length"
            )
            advice = "Call update_hessian when hessian_due says so; behind a wrapper both are its .optimizer's."
            warnings.warn(
                problem(wrong, "a refresh every hessian_interval steps", advice), RuntimeWarning, stacklevel=5
            )
            self._unrefreshed = None

    def clear(self) -> None:
        """Forget what was stopped."""
        self.__init__()  # type: ignore[misc]
