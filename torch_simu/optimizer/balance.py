"""GradientBalance: the forget gradient is brought to the norm of the retain gradient before a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_simu._checks import check_number, problem
from torch_simu.optimizer.entries import Entry, Selected, aligned, entries_of, local, summed_over_shards
from torch_simu.optimizer.simu import SIMUOptimizer
from torch_simu.optimizer.stepping.directions import Directions, fits
from torch_simu.optimizer.stepping.trust import square_norm, whitened
from torch_simu.optimizer.storage import FACTORS

_TINY = 1e-30


class GradientBalance:
    r"""Keeps the forget gradient apart, and adds it to the retain gradient at the same norm.

    With $f$ and $r$ the two gradients over all that the optimizer trains, a step takes

    $$\max(\lVert r \rVert, \epsilon)\, \frac{f}{\lVert f \rVert} + \gamma\, r.$$

    So neither drowns the other, whatever the losses are. The floor $\epsilon$ keeps the forget gradient alive where
    nothing is left to repair on the retain set. Norms are over trained entries only, in all shards. What a
    `SIMUOptimizer` whitens is balanced as it steps: layer by layer, with the norms of the whitened gradients, since the
    inverse of a covariance makes the gradient of the rows that it is of much shorter than that of others. Refresh the
    curvature before `combine_` then. On a processor the next step takes the sum of what was whitened, so that it solves
    twice and not three times; where `.grad` or the curvature is another one by then it whitens anew.

    Args:
        optimizer: Any optimizer; of a `SIMUOptimizer` the selected entries count.
        floor: $\epsilon$, in loss per unit of weight.

    Raises:
        ValueError: If `floor` is not positive.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> balance = GradientBalance(torch.optim.SGD([weight], lr=1.0))
        >>> with balance.forget():
        ...     (100 * weight[0]).backward()
        >>> (weight[1] / 2).backward()
        >>> balance.combine_(retain_weight=2.0)
        >>> weight.grad
        tensor([0.5000, 1.0000])
    """

    def __init__(self, optimizer: Optimizer, *, floor: float = 0.1) -> None:
        self._floor = check_number("floor", floor, low_open=True)
        self._optimizer, self._selected = optimizer, Selected()
        self._forget: dict[Tensor, Entry] = {}

    @contextmanager
    def forget(self) -> Iterator[None]:
        """Take the gradients of backward passes inside the block for those of the forget set.

        What `.grad` holds comes back behind it. Several blocks before a step, one for each micro-batch, add up.
        """
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        kept = [param.grad for param in params]
        for param in params:
            param.grad = self._spread(param)
        try:
            yield
            # Only here, so that a backward that failed leaves what there was.
            self._forget = {entry.param: _kept(entry) for entry in self._entries()}
        finally:
            for param, grad in zip(params, kept, strict=True):
                param.grad = grad

    @torch.no_grad()
    def combine_(self, *, retain_weight: float | Tensor = 1.0, grad_scale: float | Tensor | None = None) -> None:
        r"""Let `.grad`, which holds the retain gradient, be the balanced sum.

        Args:
            retain_weight: $\gamma$, the weight of the retain gradient beside a forget gradient of the same norm.
            grad_scale: Factor by which both losses were multiplied (a GradScaler's scale, say); None: 1. The floor is
                multiplied, too.

        Raises:
            RuntimeError: If no backward ran inside a `forget` block since the last step.
        """
        if not self._forget:
            wrong = "No forget gradient was recorded"
            raise RuntimeError(problem(wrong, "a backward inside balance.forget()", "Call it before combine_."))
        forget, self._forget = self._forget, {}
        retain = {entry.param: entry for entry in self._entries()}
        plain = [_norm(list(entries.values())) for entries in (forget, retain)]
        # Where the retain gradient is zero the forget gradient is brought to the length of the floor.
        floor = self._floor * (1.0 if grad_scale is None else grad_scale)
        lift = (floor / plain[1].clamp(min=_TINY)).clamp(min=1.0)
        ratio = plain[1].clamp(min=_TINY) / plain[0].clamp(min=_TINY)
        directions = _directions(self._optimizer)
        directions.clear()
        for param in [param for group in self._optimizer.param_groups for param in group["params"]]:
            entry, other, own = forget.pop(param, None), retain.get(param), self._state(param)
            sides = []
            if entry is not None and other is not None and own is not None:
                # Before the retain gradient is scaled, whose memory this may be.
                sides = [whitened(own[0], each, own[1]) for each in (entry, other)]
            if param.grad is not None:
                param.grad.mul_(retain_weight)
            if entry is None:
                continue
            scale = _ratio(sides, param) if sides else ratio
            scale = scale * lift.to(scale.device)
            _add(entry, scale)
            if own is not None and sides and fits(entry):
                # Whitening is linear, so the step need not solve once more.
                direction = sides[1].mul_(retain_weight).add_(sides[0].mul_(scale.to(sides[0])))
                summed = entry._replace(grad=entry.columns.gather(local(param.grad)))
                directions.keep(own[0], summed, own[1], direction)

    def _state(self, param: Tensor) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Return group and state of a parameter that is whitened; None where it is not, or not yet."""
        state = self._optimizer.state.get(param, {})
        if not any(key in state for key in FACTORS):
            return None
        groups = self._optimizer.param_groups
        return next((group, state) for group in groups if any(each is param for each in group["params"]))

    def _spread(self, param: Tensor) -> Tensor | None:
        """Return the forget gradient so far, as a backward adds to it."""
        entry = self._forget.get(param)
        if entry is None:
            return None
        grad = torch.zeros_like(param)
        entry.columns.write_(local(grad), entry.grad.to(grad.dtype))
        return grad

    def _entries(self) -> list[Entry]:
        groups = [
            {"neurons": [None] * len(group["params"]), "neuron_dim": -1, **group}
            for group in self._optimizer.param_groups
        ]
        return list(entries_of(groups, range(len(groups)), self._selected))


def _kept(entry: Entry) -> Entry:
    """Return an entry whose gradient shares no memory: buckets of DDP hold the next one in the same place."""
    shares = entry.columns.indices is None and entry.grad.dtype == entry.param.dtype
    return entry._replace(grad=entry.grad.clone()) if shares else entry


def _directions(optimizer: Optimizer) -> Directions:
    """Return where an optimizer, wrapped or not, looks for directions; a place for nobody where it does not."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner._directions if isinstance(inner, SIMUOptimizer) else Directions()


def _add(entry: Entry, scale: Tensor) -> None:
    """Add a forget gradient, scaled, to what the parameter's `.grad` holds."""
    param = entry.param
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    param.grad = aligned(param.grad, param)
    grad = local(param.grad)
    entry.columns.add_(grad, (entry.grad * scale.to(entry.grad)).to(grad.dtype))


def _ratio(sides: Sequence[Tensor], param: Tensor) -> Tensor:
    """Return by how much a whitened forget gradient is shorter than its retain gradient."""
    squares = summed_over_shards([square_norm(side) for side in sides], [param, param])
    norms = [square.double().sqrt().clamp(min=_TINY) for square in squares]
    return norms[1] / norms[0]


def _norm(entries: Sequence[Entry]) -> Tensor:
    if not entries:
        return torch.zeros((), dtype=torch.float64)
    squares = [square_norm(entry.grad) for entry in entries]
    total = summed_over_shards(squares, [entry.param for entry in entries])
    return torch.stack([each.to(total[0].device, torch.float64) for each in total]).sum().sqrt()
