"""Sophia's clip in place of the trust region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.tried.loop import Loop
from torch_simu.whitening import whiten

BETA = 0.9


class Clipped(Loop):
    r"""Moves every weight by $\eta\,\operatorname{clip}(m / \rho, -1, 1)$, with $m$ the mean of whitened gradients.

    That is Sophia's step (Liu et al. 2023, Algorithm 3) with the inverse covariances in place of the inverse diagonal.
    $\rho$ is the median of the entries of a layer's first whitened gradient, in absolute value, so that a step in its
    direction has half of its entries clipped.

    Args:
        case: As of a `Loop`, like the seed.
        seed: Of the batches.
        clipped_lr: $\eta$, the largest change of a weight.
        options: Of a `Loop`.
    """

    def __init__(self, case: Case, seed: int, *, clipped_lr: float, **options: Any) -> None:
        # The optimizer whitens and steps nowhere.
        super().__init__(case, seed, lr=0.0, **options)
        self._lr = clipped_lr
        self._means: dict[Tensor, Tensor] = {}
        self._scales: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        for param in self.trained():
            state, grad = self.optimizer.state[param], param.grad
            assert grad is not None
            direction = whiten(grad, state["neuron_factor"], state["output_factor"])
            mean = self._means.setdefault(param, torch.zeros_like(direction)).lerp_(direction, 1 - BETA)
            scale = self._scales.setdefault(param, direction.abs().median())
            param.sub_(self._lr * (mean / scale).clamp(-1.0, 1.0))
        super().step()
