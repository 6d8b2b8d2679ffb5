"""Estimates: the curvature of one refresh, averaged over its micro-batches or probes before it is folded in."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_simu.optimizer.entries import Entry


class Estimates:
    """Running means of compact curvature estimates, one for each parameter; not part of any saved state."""

    def __init__(self) -> None:
        self._means: dict[Tensor, tuple[Entry, Tensor, float | Tensor]] = {}

    def add(self, entry: Entry, estimate: Tensor, weight: float | Tensor, finite: Tensor | bool) -> None:
        """Average an estimate in with its weight; one that a scalar on the device calls non-finite has none."""
        _, mean, total = self._means.get(entry.param, (entry, torch.zeros_like(estimate), 0.0))
        if isinstance(finite, Tensor):
            finite = finite.to(estimate.device)
            estimate, weight = torch.where(finite, estimate, mean), finite * weight
        total = total + weight
        share = weight / (total.clamp(min=1e-30) if isinstance(total, Tensor) else total)
        self._means[entry.param] = (entry, mean.lerp(estimate, share), total)

    def take(self) -> list[tuple[Entry, Tensor, Tensor | bool]]:
        """Return (entry, mean, whether there is one) of each parameter, and forget them."""
        taken = [
            (entry, mean, total > 0 if isinstance(total, Tensor) else True)
            for entry, mean, total in self._means.values()
        ]
        self._means.clear()
        return taken

    def clear(self) -> None:
        """Forget them."""
        self._means.clear()
