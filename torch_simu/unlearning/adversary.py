"""Adversary: a copy of weights that relearns the forget set, at which the forget gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from torch_simu._checks import check_count, check_number, problem
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.optimizer.entries import Entry, Selected, entries_of

_LARGEST_NORM = 1.0
SHARE = 0.3
"""Of the loss, that a step of the automatic rate would take."""


def check_rate(name: str, rate: float | str) -> float | Literal["auto"]:
    """Return a rate of an adversary: a positive number, or "auto".

    Args:
        name: What the error calls it.
        rate: What was given.

    Raises:
        ValueError: If it is another word, or not positive.
        TypeError: If it is neither word nor number.
    """
    if isinstance(rate, str):
        if rate == "auto":
            return "auto"
        raise ValueError(problem(f"{name} is {rate!r}", 'a number above 0 or "auto"'))
    try:
        return check_number(name, rate, low_open=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f'{error} Or take "auto".') from None


class Adversary:
    r"""A copy of weights, which takes AdamW steps on the forget set and starts anew every few steps.

    What is forgotten at the weights of a model that was taught again is not brought back by that lesson: the inner
    loop of tamper-resistant training (Tamirisa et al. 2024, arXiv 2408.00761; MUDMAN, arXiv 2506.12484). Without a
    `model` no second one is held: the copy is of the trained entries only, with the two moments of AdamW. With one all
    its weights relearn, as those of an attacker do: what comes back is less then, for the memory of four models.

    Args:
        optimizer: The optimizer whose trained entries are copied; of a `SIMUOptimizer` the selected ones.
        lr: Learning rate of the copy; "auto": that at which a step along the signs of its gradient $g$ would take
            three tenths of the loss $L$, $0.3 L / \lVert g \rVert_1$, as Polyak's step size does it. It fits models of
            any size, where one number fits few.
        interval: Steps after which it starts anew.
        model: Whose floating-point parameters are copied instead.

    Raises:
        ValueError: If `lr` is no rate, `interval` not positive, or a weight that relearns is spread over processes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        lr: float | Literal["auto"],
        interval: int = 20,
        model: nn.Module | None = None,
    ) -> None:
        self._lr, self._interval = check_rate("lr", lr), check_count("interval", interval)
        groups: list[dict[str, Any]] = optimizer.param_groups
        if model is not None:
            groups = [{"params": [param for param in model.parameters() if param.is_floating_point()]}]
        self._groups = [{"neurons": [None] * len(group["params"]), "neuron_dim": -1, **group} for group in groups]
        if any(is_dtensor(param) for group in self._groups for param in group["params"]):
            # Its steps are clipped by the norm of all gradients, which no process has.
            wrong = "A weight that an adversary relearns is spread over processes"
            raise ValueError(problem(wrong, "whole ones", "Leave the adversary out under FSDP2, or use DDP."))
        self._everywhere = model is not None
        self._selected = Selected()
        self._values: dict[Tensor, nn.Parameter] = {}
        self._steps = self._make_steps()

    def relearn(self, number: int, loss: Callable[[], Tensor]) -> None:
        """Take one step of the copy on the forget set; gradients of the model are cleared.

        Args:
            number: The step of the run, from 0; the copy starts anew where it is a multiple of the interval.
            loss: Evaluates the model on forget rows, to be descended.
        """
        if number % self._interval == 0 or not self._values:
            self._values = {
                entry.param: nn.Parameter(entry.gather().detach().to(entry.grad.dtype, copy=True))
                for entry in self._entries()
            }
            self._steps = self._make_steps()
        with self.in_place(), self._differentiated():
            found = loss()
            found.backward()
            for entry in entries_of(self._groups, range(len(self._groups)), self._selected):
                self._values[entry.param].grad = entry.grad
                entry.param.grad = None
        if self._lr == "auto":
            self._pace(found.detach())
        if torch.nn.utils.clip_grad_norm_(self._values.values(), _LARGEST_NORM).isfinite():
            # Else the copy would hold what is not finite; the run tells of its own gradients.
            self._steps.step()
        self._steps.zero_grad()

    def _pace(self, loss: Tensor) -> None:
        """Set the learning rate by what a step along the signs of the gradient would take of the loss."""
        grads = [value.grad for value in self._values.values() if value.grad is not None]
        slope = torch.nn.utils.get_total_norm(grads, 1.0).item()
        for group in self._steps.param_groups:
            group["lr"] = SHARE * max(loss.item(), 0.0) / slope if slope > 0 else 0.0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the weights of the copy inside the block; its own come back bit by bit."""
        entries = self._entries()
        own = [entry.gather().detach().clone() for entry in entries]
        try:
            with torch.no_grad():
                for entry in entries:
                    entry.write(self._values[entry.param].detach().to(entry.param.dtype))
            yield
        finally:
            with torch.no_grad():
                for entry, value in zip(entries, own, strict=True):
                    entry.write(value)

    @contextmanager
    def _differentiated(self) -> Iterator[None]:
        """Let all that relearns require a gradient inside the block."""
        params = [param for group in self._groups for param in group["params"]] if self._everywhere else []
        flags = [param.requires_grad for param in params]
        try:
            for param in params:
                param.requires_grad_(True)
            yield
        finally:
            for param, flag in zip(params, flags, strict=True):
                param.requires_grad_(flag)

    def state(self) -> dict[str, Tensor]:
        """Return everything that a resumed run needs, as tensors."""
        found = {f"value/{number}": value.detach() for number, value in enumerate(self._values.values())}
        for number, state in self._steps.state_dict()["state"].items():
            found |= {f"adam/{number}/{key}": value for key, value in state.items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the tensors that `state` returned; from nothing, start anew."""
        if not tensors:
            return
        self._values = {
            entry.param: nn.Parameter(tensors[f"value/{number}"].to(entry.grad, copy=True))
            for number, entry in enumerate(self._entries())
        }
        self._steps = self._make_steps()
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, number, *key = name.split("/")
            if kind == "adam":
                state.setdefault(int(number), {})[key[0]] = tensor.clone()
        self._steps.load_state_dict({**self._steps.state_dict(), "state": state})

    def _make_steps(self) -> AdamW:
        values = list(self._values.values()) or [nn.Parameter(torch.zeros(0))]
        return AdamW(values, lr=0.0 if isinstance(self._lr, str) else self._lr, weight_decay=0.0)

    def _entries(self) -> list[Entry]:
        values = {
            param: param.detach()
            for group in self._groups
            for param, neurons in zip(group["params"], group["neurons"], strict=True)
            if (self._everywhere or param.requires_grad) and (neurons is None or neurons)
        }
        return list(entries_of(self._groups, range(len(self._groups)), self._selected, values))
