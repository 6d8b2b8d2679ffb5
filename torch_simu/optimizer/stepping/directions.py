"""Directions: whitened gradients that a step need not whiten again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_simu.optimizer.entries import Entry
from torch_simu.optimizer.storage import FACTORS


class _Kept(NamedTuple):
    """A direction, and what it was made of.

    Attributes:
        direction: The whitened gradient.
        hashes: Those of the gradient's rows.
        factors: Each factor with its version.
        maximize: Whether the gradient's sign was changed.
    """

    direction: Tensor
    hashes: Tensor
    factors: list[tuple[Tensor, int]]
    maximize: bool


class Directions:
    """Whitened gradients, from where they were made to the next step, which takes them where all is as it was.

    Whether a gradient is the same tells the content of the tensor, not its version: torch counts no exchange between
    processes, no unscaling of a GradScaler and no write through `.data`.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, _Kept] = {}

    def keep(self, group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any], direction: Tensor) -> None:
        """Keep the direction of an entry until the next step."""
        self._kept[entry.param] = _Kept(direction, row_hashes(entry.grad), _factors(state), group["maximize"])

    def take(self, group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any]) -> Tensor | None:
        """Return the direction of an entry, once; None where there is none, or what it was made of has changed."""
        if torch.compiler.is_compiling() or (kept := self._kept.pop(entry.param, None)) is None:
            return None
        now = _factors(state)
        same = len(now) == len(kept.factors) and group["maximize"] == kept.maximize
        same = same and all(a is b and i == j for (a, i), (b, j) in zip(now, kept.factors, strict=True))
        return kept.direction if same and torch.equal(row_hashes(entry.grad), kept.hashes) else None

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()


def fits(entry: Entry) -> bool:
    """Say whether the direction of an entry can be kept: to compare gradients on another device would wait for it.

    Where a gradient is kept with fewer digits than it is whitened in, a step takes those that are left.
    """
    return entry.grad.device.type == "cpu" and entry.param.dtype == entry.grad.dtype


def _factors(state: Mapping[str, Any]) -> list[tuple[Tensor, int]]:
    return [(state[key], state[key]._version) for key in FACTORS if key in state]


def row_hashes(grad: Tensor) -> Tensor:
    """Return a hash of the bits of each row: their sum by random factors, as whole numbers that are exact in any order.

    Without the factors a change of signs that leaves as many positive as negative numbers would go unseen.

    Args:
        grad: A matrix in float32 or float64. Shape: `(rows, columns)`.
    """
    # Half the width of the factors: what changes the highest bit alone is the same whatever it is multiplied by.
    bits = grad.contiguous().view(torch.int32)
    return (bits * _factors_of(bits.shape[1])).sum(1)


@cache
def _factors_of(columns: int) -> Tensor:
    """Return an odd factor for each column: where only one number of a row changes, its hash does."""
    draw = torch.Generator().manual_seed(columns)
    return torch.randint(-(2**62), 2**62, (columns,), generator=draw) * 2 + 1
