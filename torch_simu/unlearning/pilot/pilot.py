"""recommend: a pilot on the user's own model, which says with what choices it forgets best."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from torch_simu._checks import check_number, problem
from torch_simu.bitsandbytes.packing import codes_as_loaded
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.pilot.before import Before
from torch_simu.unlearning.pilot.budget import Budget, goes_on
from torch_simu.unlearning.pilot.candidates import candidates
from torch_simu.unlearning.pilot.recommendation import Recommendation, Sizes, recommended
from torch_simu.unlearning.pilot.rows import PilotRows, pilot_rows
from torch_simu.unlearning.pilot.tries import Try, kept_share
from torch_simu.unlearning.pilot.words import as_changed, one_batch_size
from torch_simu.unlearning.progress import Progress
from torch_simu.unlearning.steps import NonFiniteLossError

_MOST_STEPS = 5000
"""No bound in practice: a try ends at its target or with its time."""


class _OutOfTimeError(Exception):
    """A try has had its time."""


@dataclass(slots=True)
class _Watch:
    """Follows a run by its progress, and ends it when its time is over."""

    name: str
    share: float
    limit: float
    told: Progress | None
    started: float
    attributed: float = 0.0
    stepped: float = 0.0
    steps: int = 0

    def __call__(self, stage: str, done: int, total: int, /, note: str = "") -> None:
        elapsed, expected = time.perf_counter() - self.started, None
        if stage == "unlearn":
            self.steps, self.stepped = done, elapsed
            expected = (total - done) * (elapsed - self.attributed) / done
        else:
            self.attributed = elapsed
        if self.told is not None:
            self.told(self.name if stage == "unlearn" else f"{self.name}: {stage}", done, total, note)
        # The last step of a run that is at its target.
        if done < total and not goes_on(elapsed, share=self.share, limit=self.limit, expected=expected):
            raise _OutOfTimeError


def recommend(
    model: PreTrainedModel,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    minutes: float = 10.0,
    config: UnlearnConfig | None = None,
    pad_id: int = 0,
    progress: Progress | None = None,
) -> Recommendation:
    """Try several choices on a model, and say which reaches the forget target and keeps most.

    A try is a run of `unlearn` to the forget target, on at most 256 rows of each set. A quarter of the retain rows is
    held out from its batches: the share of their probability that is left says what a run keeps. The first try is the
    given configuration; each of the next changes one choice of the best so far. The model is the same to the last bit
    after each of them, also when this raises; gradients that it held are dropped.

    Args:
        model: A causal language model, with quantized layers or without.
        forget: Encoded rows to forget.
        retain: Encoded rows to keep.
        minutes: Wall time of the pilot. A step and a measurement that have begun are ended, so that one try is always
            made; it ends earlier where nothing is left to try.
        config: What the pilot starts from. It varies the step size and whether it is paced, the retain term, the
            decay of the momentum, the batch size and the share of neurons; the rest stays as it is.
        pad_id: The token id to pad with.
        progress: Told of a stage for each try.

    Returns:
        The choices, what speaks for them, and the command.

    Raises:
        ValueError: If a set is empty, there is no forget target or the model is below it already, the first try
            fails as `unlearn` does, or no try ends with finite weights.
        DataError: If a row does not fit into the model.
        TypeError: If `minutes` is no number.
    """
    check_number("minutes", minutes, low_open=True)
    budget = Budget(60.0 * minutes)
    given = one_batch_size(UnlearnConfig()) if config is None else config
    for name, examples in (("forget", forget), ("retain", retain)):
        if not examples:
            raise ValueError(problem(f"The {name} set is empty", "at least one example"))
        check_fits(model, examples)
    if given.forget_target is None:
        advice = "What runs keep compares at the same forget probability only."
        raise ValueError(problem("forget_target is None", "a probability", advice))
    rows = pilot_rows(forget, retain, seed=given.seed)
    with codes_as_loaded(model):
        before = Before(model, given)
        pilot = _Pilot(model, rows, given, budget, before, pad_id, progress)
        try:
            sizes = pilot.measure(len(forget), len(retain))
            tries = pilot.run()
        finally:
            before.restore()
    return recommended(given, tries, sizes, complete=not candidates(given, tries, num_forget=len(rows.forget)))


class _Pilot:
    """The tries on one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: PilotRows,
        given: UnlearnConfig,
        budget: Budget,
        before: Before,
        pad_id: int,
        progress: Progress | None,
    ) -> None:
        self._model, self._rows, self._given = model, rows, given
        self._budget, self._before, self._pad_id, self._progress = budget, before, pad_id, progress
        self._known: list[float] = []
        self._measuring = 0.0

    def measure(self, num_forget: int, num_retain: int) -> Sizes:
        """Measure the model as it is, and how long that takes."""
        started = time.perf_counter()
        start = self._forget_probability()
        seconds = (time.perf_counter() - started) / len(self._rows.forget)
        target = self._given.forget_target
        if target is not None and start <= target:
            wrong = f"The mean forget probability is {start:.3g} before anything is forgotten"
            raise ValueError(problem(wrong, f"more than the target of {target}", "Lower forget_target."))
        self._known = self._probabilities(self._rows.held_out)
        self._measuring = time.perf_counter() - started
        part = len(self._rows.forget)
        return Sizes(num_forget, part, num_retain, len(self._rows.held_out), start, seconds)

    def run(self) -> list[Try]:
        """Make one try after the other, until the time is over or nothing is left to try."""
        tries: list[Try] = []
        error: Exception | None = None
        count = len(self._rows.forget)
        while self._budget.allows(tries) and (following := candidates(self._given, tries, num_forget=count)):
            name = as_changed(following[0], self._given)
            watch = _Watch(
                f"try {len(tries) + 1}",
                self._budget.share(tries, open_tries=len(following)),
                self._budget.left - self._measuring,
                self._progress,
                time.perf_counter(),
            )
            try:
                tries.append(self._try(name, following[0], watch))
            except (NonFiniteLossError, torch.cuda.OutOfMemoryError) as failure:
                error = failure
                tries.append(_failed(name, following[0], watch, failure))
            except ValueError as failure:
                # What is wrong with the first try is wrong with what was given.
                if not tries:
                    raise
                tries.append(_failed(name, following[0], watch, failure))
            finally:
                self._before.restore()
        if error is not None and all(each.failed for each in tries):
            raise error
        return tries

    def _try(self, name: str, config: UnlearnConfig, watch: _Watch) -> Try:
        rows, note = self._rows, ""
        try:
            unlearn(
                self._model,
                rows.forget,
                rows.retain,
                config=config.updated(max_steps=_MOST_STEPS),
                pad_id=self._pad_id,
                progress=watch,
            )
        except _OutOfTimeError:
            note = "its time was over"
        seconds = watch.stepped or watch.attributed
        probability = self._forget_probability()
        target = config.forget_target
        kept = kept_share(self._probabilities(rows.held_out), self._known)
        return Try(
            name,
            config,
            target is not None and probability <= target,
            probability,
            kept,
            watch.steps,
            seconds,
            watch.attributed,
            note,
        )

    def _forget_probability(self) -> float:
        found = self._probabilities(self._rows.forget)
        return sum(found) / len(found)

    def _probabilities(self, examples: Sequence[Example]) -> list[float]:
        size = self._given.eval_batch_size
        found = score_answers(self._model, examples, batch_size=size, pad_id=self._pad_id)["probability"]
        for row, value in zip(examples, found, strict=True):
            if not math.isfinite(value):
                wrong = f"The probability of row {row.place or row.input_ids} is {value}"
                raise NonFiniteLossError(problem(wrong, "a finite number", "Lower lr, or load in bfloat16."))
        return found


def _failed(name: str, config: UnlearnConfig, watch: _Watch, error: Exception) -> Try:
    seconds = time.perf_counter() - watch.started
    return Try(
        name, config, False, 1.0, 0.0, watch.steps, seconds, watch.attributed, " ".join(str(error).split()), failed=True
    )
