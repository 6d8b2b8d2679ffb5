"""Rows: samples that share a forward pass, each at a token of its own, however a method arranges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Samples whose clean prefixes are known.

    Attributes:
        count: How many samples.
        most: How many of them fit into one pass.
        grid: From a number of samples to the streams and the tokens of each that their pass has.
        at: From sample numbers within a pass to their stream and token in it.
        values: From a range of samples to F of each, after a forward pass. Shape: `(num_samples,)`.
    """

    count: int
    most: int
    grid: Callable[[int], tuple[int, int]]
    at: Callable[[Tensor], tuple[Tensor, Tensor]]
    values: Callable[[slice], Tensor]


RowsOf = Callable[[nn.Module, Sequence[ScoredSequence], Mapping[str, nn.Module], Path, Memory], Iterator[Rows]]
"""A way to arrange samples, with the arguments of a `Method`."""
