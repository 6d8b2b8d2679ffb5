"""The neurons that support the forget set, and steps that only take from weights."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.tried.loop import Loop
from torch_simu import NeuronSelection, attribute_neurons
from torch_simu.unlearning.data.batches import batches_in_order


class Supporting(Loop):
    """Trains the neurons whose attribution to the forget set is positive."""

    def neurons(self) -> NeuronSelection:
        batches = list(batches_in_order(self.case.sets["forget"], 24, 0))
        attribution = attribute_neurons(self.model, batches, steps=20)
        return NeuronSelection.from_masks({name: scores > 0 for name, scores in attribution.scores.items()})


class TowardZero(Supporting):
    """Holds every weight between where it was and zero."""

    def __init__(self, case: Case, seed: int, **options: Any) -> None:
        super().__init__(case, seed, **options)
        self._start = [param.detach().clone() for param in self.trained()]

    def step(self) -> None:
        super().step()
        with torch.no_grad():
            for param, old in zip(self.trained(), self._start, strict=True):
                param.copy_(torch.where(old > 0, param.clamp(min=0).minimum(old), param.clamp(max=0).maximum(old)))
