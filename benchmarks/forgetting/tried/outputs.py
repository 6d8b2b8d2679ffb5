"""A covariance of the outputs of low rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.tried.loop import DAMPING, Loop
from torch_simu.whitening import damped_cholesky, undamped


class OfRank(Loop):
    """Keeps the leading directions of the covariance of the outputs, and the mean of the others.

    Args:
        case: As of a `Loop`, like the seed.
        seed: Of the batches.
        rank: Directions to keep.
        options: Of a `Loop`.
    """

    def __init__(self, case: Case, seed: int, *, rank: int, **options: Any) -> None:
        super().__init__(case, seed, **options)
        self._rank = rank

    def differentiated(self, retain: dict[str, Tensor], due: bool) -> None:
        for state in self.optimizer.state.values() if due else ():
            values, vectors = torch.linalg.eigh(undamped(state["output_factor"], damping=DAMPING))
            values[: -self._rank] = values[: -self._rank].mean()
            state["output_factor"] = damped_cholesky((vectors * values) @ vectors.T, damping=DAMPING)
