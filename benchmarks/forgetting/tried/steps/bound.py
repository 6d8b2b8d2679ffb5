"""Steps as long as the predicted rise of the retain loss allows."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.lasting import Row
from benchmarks.forgetting.tried.loop import Loop
from torch_simu.unlearning.objectives import answer_predictions

PROBE = 0.1
"""The share of a step by which logits are differenced."""


class Bounded(Loop):
    r"""Shortens a step $d$ to the largest share $s \le 1$ with $s\,g \cdot d + \tfrac12 s^2 d^T H d \le b$.

    $g$ is the gradient of the retain batch and $H$ its Gauss-Newton matrix, so that $d^T H d$ is the mean over tokens
    of the variance, under the model's predictions, of the change of the logits.

    Args:
        case: As of a `Loop`, like the seed.
        seed: Of the batches.
        bound: $b$, in nats per token.
        options: Of a `Loop`; its step size is the largest there is.
    """

    def __init__(self, case: Case, seed: int, *, bound: float, **options: Any) -> None:
        super().__init__(case, seed, **options)
        self._bound, self._shares = bound, list[float]()
        self.predicted: list[tuple[float, float]] = []

    def differentiated(self, retain: dict[str, Tensor], due: bool) -> None:
        self.retained = retain
        self._grads = [param.grad.clone() for param in self.trained() if param.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        params = self.trained()
        old, before = [param.clone() for param in params], self._log_probs()
        super().step()
        changes = [param - start for param, start in zip(params, old, strict=True)]
        self._move(old, changes, PROBE)
        change, chances = (self._log_probs() - before) / PROBE, before.exp()
        rise = float(sum((grad * each).sum() for grad, each in zip(self._grads, changes, strict=True)))
        variance = (chances * change.square()).sum(-1) - (chances * change).sum(-1).square()
        self.predicted.append((rise, 0.5 * float(variance.mean())))
        self._shares.append(share_below(*self.predicted[-1], self._bound))
        self._move(old, changes, self._shares[-1])

    def found(self) -> Row:
        return {"mean_share": mean(self._shares)}

    def _log_probs(self) -> Tensor:
        return answer_predictions(self.model, self.retained)[0]

    def _move(self, old: list[Tensor], changes: list[Tensor], share: float) -> None:
        for param, start, change in zip(self.trained(), old, changes, strict=True):
            param.copy_(start + share * change)


def share_below(first: float, second: float, bound: float) -> float:
    """The largest share up to one at which `first * share + second * share ** 2` is at most `bound`.

    Examples:
        >>> share_below(0.0, 4.0, 1.0), share_below(-1.0, 0.5, 0.1), share_below(2.0, 0.0, 0.5)
        (0.5, 1.0, 0.25)
    """
    if first + second <= bound:
        return 1.0
    root = (first**2 + 4 * second * bound) ** 0.5
    return 2 * bound / (first + root)
