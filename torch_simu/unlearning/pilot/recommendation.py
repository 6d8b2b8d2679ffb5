"""Recommendation: the choices that a pilot speaks for, why, and the command that makes the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.pilot.tries import TIE, Try, best_try
from torch_simu.unlearning.pilot.words import AS_GIVEN, command_line

_FEWEST, _LONG = 20, 90.0

_ROOM = 2
"""Times the expected steps that the run may make."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the sets and of their parts in a pilot, and what it measured of the model before.

    Attributes:
        forget: Rows to forget.
        pilot_forget: Those in the pilot.
        retain: Rows to keep.
        held_out: Retain rows of the pilot in no batch.
        start: The mean forget probability before anything is forgotten.
        row_seconds: Wall time of measuring one forget row.
    """

    forget: int
    pilot_forget: int
    retain: int
    held_out: int
    start: float
    row_seconds: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The choices that a pilot speaks for.

    Attributes:
        config: Every choice of the run; its `max_steps` leave room for twice the expected steps.
        tries: All tries, in their order; `best_try` of them is the one that speaks for `config`.
        sizes: Of the sets, and of the pilot's part.
        expected_steps: Steps on all rows, about; None where no try reached the target.
        expected_minutes: Minutes of these steps with their attribution, about; a command loads, evaluates and saves
            beside them. None likewise.
        reason: Why, in sentences.
    """

    config: UnlearnConfig
    tries: tuple[Try, ...]
    sizes: Sizes
    expected_steps: int | None
    expected_minutes: float | None
    reason: str

    @property
    def best(self) -> Try:
        """The try that speaks for the choices."""
        return best_try(self.tries)

    def command(
        self, model: str, forget: str, retain: str, out: str, *, options: Mapping[str, str] | None = None
    ) -> str:
        """Return the call of `torch-simu unlearn` that makes this run, as a shell takes it.

        Args:
            model: Folder of the model.
            forget: File of the rows to forget.
            retain: File of the rows to keep.
            out: Folder for the results.
            options: Further options by their names, `{"load-in": "8bit"}` say.

        Raises:
            ValueError: If the command line has no option for a choice of the configuration.
        """
        words = {"model": model, "forget": forget, "retain": retain, "out": out, **(options or {})}
        return command_line(words, self.config)


def expected(found: Try, sizes: Sizes) -> tuple[int, float]:
    """Return the steps and the seconds that a run like this try takes on all rows.

    A paced run follows how fast is forgotten, and takes as many steps on more rows. With a fixed step size each row is
    taken to need as many, so that they grow with the forget set. A step grows by the measurement of the further forget
    rows, and an attribution with the set.

    Args:
        found: The try.
        sizes: Of the sets.

    Examples:
        >>> sizes = Sizes(forget=20, pilot_forget=10, retain=9, held_out=3, start=0.9, row_seconds=0.1)
        >>> found = Try("as given", UnlearnConfig(), True, 0.1, 0.9, steps=50, seconds=100.0)
        >>> expected(found, sizes)
        (50, 150.0)
    """
    more = sizes.forget / sizes.pilot_forget
    steps = found.steps if found.config.paced else math.ceil(found.steps * more)
    most = found.config.eval_rows
    further = min(sizes.forget, most) - min(sizes.pilot_forget, most)
    each = found.seconds_per_step + further * sizes.row_seconds / found.config.eval_interval
    return steps, found.attribution_seconds * more + steps * each


def recommended(given: UnlearnConfig, tries: Sequence[Try], sizes: Sizes, *, complete: bool) -> Recommendation:
    """Return what tries speak for.

    Args:
        given: What the pilot started from.
        tries: At least one that did not fail.
        sizes: Of the sets.
        complete: Whether nothing was left to try.

    Raises:
        ValueError: If all tries failed.
    """
    best = best_try(tries)
    steps, seconds = expected(best, sizes)
    room = 10 * math.ceil(max(_FEWEST, _ROOM * steps) / 10)
    said = [_first(best, sizes), _second(best, tries) if best.reached else ""]
    if best.reached:
        said.append(f"On all {sizes.forget} forget rows expect about {steps} steps and {_time(seconds)}.")
    if not complete:
        said.append("The time was over before all was tried.")
    if sizes.pilot_forget < sizes.forget:
        said.append(f"It was tried on {sizes.pilot_forget} of them; more rows cost more of what is kept.")
    reason = " ".join(filter(None, said))
    if not best.reached:
        # The steps that it needs are not known.
        config = best.config.updated(max_steps=max(given.max_steps, room))
        return Recommendation(config, tuple(tries), sizes, None, None, reason)
    return Recommendation(best.config.updated(max_steps=room), tuple(tries), sizes, steps, seconds / 60.0, reason)


def _first(best: Try, sizes: Sizes) -> str:
    target = best.config.forget_target
    if best.reached:
        goal = f"a mean forget probability of {best.probability:.3f} (target {target})"
        held = f"{sizes.held_out} retain row{'' if sizes.held_out == 1 else 's'} that it did not train on"
        name = _named(best)
        kept = f"keeps {best.kept:.1%} of the probability of {held}"
        return f"{name[0].upper()}{name[1:]} reaches {goal} in {best.steps} steps and {kept}."
    return (
        f"No try reached the target of {target}: {_named(best)} came nearest, from {sizes.start:.3f} to "
        f"{best.probability:.3f} in {best.steps} steps. Give the pilot more minutes."
    )


def _second(best: Try, tries: Sequence[Try]) -> str:
    others = [each for each in tries if each.reached and each is not best]
    if not others:
        return ""
    second = max(others, key=lambda each: each.kept)
    beside = (
        f"{_named(second)}, which keeps {second.kept:.1%} and took {second.seconds:.0f} s to its {best.seconds:.0f}"
    )
    # What is kept within a tie counts as the same.
    return f"{'As much keeps' if second.kept >= best.kept - TIE else 'Next is'} {beside}."


def _time(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < _LONG else f"{seconds / 60:.1f} minutes"


def _named(found: Try) -> str:
    return "the configuration as given" if found.name == AS_GIVEN else f"`{found.name}`"
