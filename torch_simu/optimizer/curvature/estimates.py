"""Estimates: the curvature of one refresh, averaged over its micro-batches or probes before it is folded in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.curvature import hutchinson_estimates
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.optimizer.entries import Entry, Selected, entries_of


class Estimates:
    """Running means of compact curvature estimates, one for each parameter; not part of any saved state."""

    def __init__(self) -> None:
        self._means: dict[Tensor, tuple[Entry, Tensor]] = {}
        self._total: float | Tensor = 0.0
        self._passed: Tensor | bool = False

    def add(
        self, entries: Sequence[Entry], estimates: Sequence[Tensor], weight: float | Tensor, finite: Tensor | bool
    ) -> None:
        """Average the estimates of one micro-batch in, unless a scalar on the device says that they are not finite.

        A parameter that has none here, as an expert that no token was sent to, counts with zero.
        """
        found = dict(zip((entry.param for entry in entries), zip(entries, estimates, strict=True), strict=True))
        if isinstance(finite, Tensor):
            # In float64, so that the shares are those that the host would compute.
            weight = finite.double() * weight
        self._passed = finite | self._passed
        self._total = self._total + weight
        share = weight / (self._total.clamp(min=1e-30) if isinstance(self._total, Tensor) else self._total)
        for param in {**self._means, **found}:
            entry, estimate = found.get(param) or (self._means[param][0], torch.zeros_like(self._means[param][1]))
            mean = self._means[param][1] if param in self._means else torch.zeros_like(estimate)
            if isinstance(finite, Tensor):
                estimate = torch.where(finite.to(mean.device), estimate, mean)
            self._means[param] = entry, mean.lerp(estimate, share.to(mean) if isinstance(share, Tensor) else share)

    def take(self) -> tuple[dict[Tensor, tuple[Entry, Tensor]], Tensor | bool]:
        """Return parameter -> (entry, mean), and whether any micro-batch was finite, and forget them."""
        means, passed = self._means, self._passed
        self.clear()
        return means, passed

    def clear(self) -> None:
        """Forget them."""
        self._means, self._total, self._passed = {}, 0.0, False


def hutchinson_entries(
    loss: Tensor,
    groups: Sequence[Mapping[str, Any]],
    numbers: Sequence[int],
    selected: Selected,
    *,
    generator: torch.Generator | None,
    num_probes: int,
) -> Iterator[list[Entry]]:
    """Yield the entries of some groups with an estimate in place of the gradient, once for each probe.

    Args:
        loss: A scalar, not yet differentiated.
        groups: All groups.
        numbers: Which of them.
        selected: The columns of their parameters.
        generator: Source of the signs.
        num_probes: How many estimates.

    Raises:
        ValueError: If a parameter is distributed.
        RuntimeError: If the loss cannot be differentiated twice.
    """
    params = [param for number in numbers for param in groups[number]["params"] if param.requires_grad]
    if any(is_dtensor(param) for param in params):
        advice = 'Use curvature="gnb", which needs one backward only.'
        raise ValueError(problem("A parameter of update_hutchinson is distributed", "local ones", advice))

    def entries(grads: Sequence[Tensor]) -> list[Entry]:
        return list(entries_of(groups, numbers, selected, dict(zip(params, grads, strict=True))))

    def gather(grads: Sequence[Tensor]) -> list[Tensor]:
        return [entry.grad for entry in entries(grads)]

    for found in hutchinson_estimates(loss, params, gather, generator=generator, num_probes=num_probes):
        with torch.no_grad():
            places = entries([param.detach() for param in params])
            yield [entry._replace(grad=estimate) for entry, estimate in zip(places, found, strict=True)]
