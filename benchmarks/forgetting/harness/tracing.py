"""The way of a run: what it keeps, and how far it has come from the model as it was, at every forget probability."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import BATCH, Case
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.metrics.scoring import evaluating
from torch_simu.unlearning.objectives import answer_predictions

INTERVAL, EVERY = 12, 4
"""Steps between two points, and of so many rows of a set one is measured."""
KEPT = ("retain", "near", "world", "text")
"""The sets that a run should not change."""


class Trace:
    """A progress of a run that measures the model every few steps and at the end, on some rows of each set to keep.

    Of each set: the mean divergence KL(p0 || p) from the model as it was, in nats per scored token, and the mean
    probability of these tokens beside what it was.

    Args:
        model: The model, before the first step.
        case: Its rows.
    """

    def __init__(self, model: PreTrainedModel, case: Case) -> None:
        self._model = model
        self._rows = {name: case.sets[name][::EVERY] for name in KEPT if name in case.sets}
        self._start = {name: predictions(model, rows) for name, rows in self._rows.items()}
        self._points: dict[int, dict[str, Any]] = {}
        self.seconds = 0.0

    def __call__(self, stage: str, done: int, total: int, /, note: str = "") -> None:
        """Measure where it is time to."""
        if stage != "unlearn" or (done % INTERVAL and done != total):
            return
        before = time.perf_counter()
        self._points[done] = {name: self._moved(name) for name in self._rows}
        self.seconds += time.perf_counter() - before

    def beside(self, log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The points, with the forget probability that the run's own log has for their steps."""
        found = {record["step"]: record["forget_probability"] for record in log if "forget_probability" in record}
        return [{"step": step, "forget": found[step], **point} for step, point in self._points.items() if step in found]

    def _moved(self, name: str) -> dict[str, float]:
        (before, labels), (now, _) = self._start[name], predictions(self._model, self._rows[name])
        old, new = (each.gather(-1, labels[:, None]).exp() for each in (before, now))
        divergence = functional.kl_div(now, before, reduction="batchmean", log_target=True)
        return {"kl": divergence.item(), "kept": (new / old).clamp(max=1.0).mean().item()}


def predictions(model: PreTrainedModel, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """The log-probabilities at all scored positions, and the labels there. Shapes: (tokens, vocabulary), (tokens,)."""
    with evaluating(model):
        batches = (
            {name: part.to(model.device) for name, part in each.items()} for each in batches_in_order(rows, BATCH)
        )
        found = [answer_predictions(model, batch) for batch in batches]
    log_probs, labels = zip(*found, strict=True)
    return torch.cat(log_probs), torch.cat(labels)


LEVELS = (0.5, 0.2, 0.1)
"""Forget probabilities at which runs are compared, beside the one they end with."""


def frontier(trace: Sequence[Mapping[str, Any]], start: float) -> float | None:
    """What a run keeps while it forgets: the mean over levels of the forget probability, and over the sets.

    Between two points it is interpolated over the logarithm of the forget probability; before the first step all is
    kept. Levels above the start are left out. None where a run does not come down to the others.

    Args:
        trace: The points of the run.
        start: The forget probability before the first step.
    """
    if not trace:
        return None
    names = [name for name in KEPT if name in trace[0]]
    points = [(start, 1.0), *((point["forget"], mean(point[name]["kept"] for name in names)) for point in trace)]
    levels = [level for level in LEVELS if level < start]
    found = [at_level(points, level) for level in (*levels, points[-1][0])]
    return None if None in found else mean(found)


def at_level(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The second of two coordinates where the first one has come down to a level for the first time."""
    for (before, old), (after, new) in pairwise(points):
        if after <= level <= before:
            span = torch.tensor([before, after, level]).clamp(min=1e-6).log()
            share = ((span[0] - span[2]) / (span[0] - span[1])).item() if before > after else 1.0
            return old + share * (new - old)
    return None


def at_budget(trace: Sequence[Mapping[str, Any]], start: float, budget: float) -> float | None:
    """The forget probability when what is to be kept has moved by a budget for the first time.

    It is that of the end where a run stays below the budget, and None without points. Between two points its logarithm
    is interpolated over the divergence.

    Args:
        trace: The points of the run.
        start: The forget probability before the first step.
        budget: Mean divergence over the sets, in nats a token.
    """
    points = [(0.0, start), *((divergence_of(point), point["forget"]) for point in trace)]
    for (spent, before), (now, after) in pairwise(points):
        if spent < budget <= now:
            share = (budget - spent) / (now - spent)
            return before ** (1.0 - share) * after**share
    return points[-1][1] if trace else None


def divergence_of(point: Mapping[str, Any]) -> float:
    """How far the predictions of what is to be kept are from those of the model as it was, over the sets; nats."""
    return mean(point[name]["kl"] for name in KEPT if name in point)
