"""Weights averaged over the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.lasting import Row
from benchmarks.forgetting.tried.loop import Loop


class Averaged(Loop):
    """Measures, and ends with, an exponential mean of the weights that the steps came by.

    Args:
        case: As of a `Loop`, like the seed.
        seed: Of the batches.
        decay: What the mean keeps of itself in a step.
        options: Of a `Loop`.
    """

    def __init__(self, case: Case, seed: int, *, decay: float, **options: Any) -> None:
        super().__init__(case, seed, **options)
        self._decay = decay
        self._means = [param.detach().clone() for param in self.trained()]

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for mean, param in zip(self._means, self.trained(), strict=True):
            mean.lerp_(param, 1 - self._decay)

    def scores(self) -> dict[str, list[float]]:
        with self._averaged():
            return super().scores()

    def run(self) -> tuple[PreTrainedModel, Row]:
        found = super().run()
        with torch.no_grad():
            for mean, param in zip(self._means, self.trained(), strict=True):
                param.copy_(mean)
        return found

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        own = [param.detach().clone() for param in self.trained()]
        with torch.no_grad():
            for value, param in zip(self._means, self.trained(), strict=True):
                param.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for value, param in zip(own, self.trained(), strict=True):
                    param.copy_(value)
