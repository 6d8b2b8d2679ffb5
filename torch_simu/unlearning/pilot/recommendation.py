"""Recommendation: the choices that a pilot speaks for, why, and the command that makes the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.pilot.tries import TIE, Try, best_try
from torch_simu.unlearning.pilot.words import AS_GIVEN, command_line

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
        expected_steps: Steps on all rows, about.
        expected_minutes: Minutes of these steps with their attribution, about; a command loads, evaluates and saves
            beside them.
        reason: Why, in sentences.
    """

    config: UnlearnConfig
    tries: tuple[Try, ...]
    sizes: Sizes
    expected_steps: int
    expected_minutes: float
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
    each = found.seconds_per_step + (sizes.forget - sizes.pilot_forget) * sizes.row_seconds / found.config.eval_interval
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
    room = max(20, 10 * math.ceil(_ROOM * steps / 10))
    # Where the target was not reached, the steps that it needs are not known.
    most = room if best.reached else max(given.max_steps, room)
    config = best.config.updated(max_steps=most)
    return Recommendation(config, tuple(tries), sizes, steps, seconds / 60.0, _reason(best, tries, sizes, complete))


def _reason(best: Try, tries: Sequence[Try], sizes: Sizes, complete: bool) -> str:
    target = best.config.forget_target
    said = []
    if best.reached:
        first = f"{_named(best)} reaches a mean forget probability of {best.probability:.3f} (target {target})"
        said.append(f"{first} in {best.steps} steps and keeps {best.kept:.1%} of {_rows(sizes)}.")
        more = [each for each in tries if each.reached and each.kept > best.kept]
        others = [each for each in tries if each.reached and each is not best]
        if more:
            said.append(f"What keeps up to {TIE:.0%} more takes longer.")
        if others and not more:
            second = max(others, key=lambda each: each.kept)
            said.append(f"Next is {_named(second)}, which keeps {second.kept:.1%} in {second.seconds:.0f} s.")
    else:
        said.append(
            f"No try reached the target of {target}: {_named(best)} came nearest, from {sizes.start:.3f} to "
            f"{best.probability:.3f} in {best.steps} steps. Give the pilot more minutes."
        )
    if not complete:
        said.append("The time was over before all was tried.")
    if sizes.pilot_forget < sizes.forget:
        said.append(
            f"Tried on {sizes.pilot_forget} of {sizes.forget} forget rows: more rows cost more of what is kept."
        )
    return " ".join(said)


def _named(found: Try) -> str:
    return "The configuration as given" if found.name == AS_GIVEN else f"{found.name}"


def _rows(sizes: Sizes) -> str:
    return (
        f"the probability of {sizes.held_out} retain row{'' if sizes.held_out == 1 else 's'} that it did not train on"
    )
