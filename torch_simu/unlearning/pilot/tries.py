"""Tries: what a short run came to, and which of several is the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_simu._checks import problem
from torch_simu.unlearning.config import UnlearnConfig

TIE = 0.01
"""Shares that lie no farther apart say nothing of which run keeps more."""


@dataclass(frozen=True, slots=True)
class Try:
    """What a short run came to.

    Attributes:
        name: What it changes, as options of the command line; "as given" where it changes nothing.
        config: Every choice of it.
        reached: Whether it reached the forget target.
        probability: The mean forget probability at its end, in [0, 1].
        kept: Share of the probability of the held-out retain rows that is left, in [0, 1].
        steps: Steps it made.
        seconds: Wall time of them, with the attribution and the measurements between steps.
        attribution_seconds: What the attribution took of it.
        note: Why it ended otherwise than at the target; empty where it did not.
        failed: Whether it broke off with weights that are of no use.
    """

    name: str
    config: UnlearnConfig
    reached: bool
    probability: float
    kept: float
    steps: int
    seconds: float
    attribution_seconds: float = 0.0
    note: str = ""
    failed: bool = False

    @property
    def seconds_per_step(self) -> float:
        """Wall time of a step, without the attribution, in seconds."""
        return (self.seconds - self.attribution_seconds) / max(1, self.steps)


def best_try(tries: Sequence[Try]) -> Try:
    """Return the try that speaks for itself: those that reached the target come first, then what is kept, then time.

    Among those that reached it, what is kept within `TIE` of the most counts as the same, and the shortest of them is
    the best. Where none reached it, the one that came nearest.

    Args:
        tries: At least one that did not fail.

    Raises:
        ValueError: If there is none.

    Examples:
        >>> def made(name, kept, seconds):
        ...     return Try(name, UnlearnConfig(), True, 0.1, kept, steps=9, seconds=seconds)
        >>> best_try([made("long", 0.952, 9.0), made("short", 0.95, 5.0), made("crude", 0.8, 1.0)]).name
        'short'
    """
    sound = [each for each in tries if not each.failed]
    if not sound:
        raise ValueError(problem(f"{len(tries)} tries failed", "at least one that did not"))
    reached = [each for each in sound if each.reached]
    if not reached:
        return min(sound, key=lambda each: (each.probability, -each.kept))
    most = max(each.kept for each in reached)
    return min((each for each in reached if each.kept >= most - TIE), key=lambda each: (each.seconds, -each.kept))


def kept_share(after: Sequence[float], before: Sequence[float]) -> float:
    """Return the mean share of each row's probability that is left, in [0, 1]; more than before is no gain.

    A row that had none can lose none.

    Args:
        after: Probability of each row now.
        before: What it was.

    Examples:
        >>> kept_share([0.4, 0.9, 0.1], [0.8, 0.6, 0.0])
        0.8333333333333334
    """
    shares = [min(1.0, new / old) if old > 0 else 1.0 for new, old in zip(after, before, strict=True)]
    return sum(shares) / len(shares)
