"""Progress: how a job tells how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol


class Progress(Protocol):
    """Called with a stage ("attribute forget", "unlearn"), how much of it is done, of how much, and a short note."""

    def __call__(self, stage: str, done: int, total: int, /, note: str = "") -> None:
        """Tell how far a stage is."""
        ...


def part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a progress for one part of a longer stage, of which `before` is done when the part starts.

    Examples:
        >>> part_of(lambda stage, done, total, _: print(f"{stage} {done}/{total}"), before=10, total=30)("score", 5, 9)
        score 15/30
    """
    if progress is None:
        return None

    def tell(stage: str, done: int, _: int, note: str = "") -> None:
        progress(stage, before + done, total, note)

    return tell


def renamed(progress: Progress | None, rename: Callable[[str], str]) -> Progress | None:
    """Return a progress that tells the stages of a job under other names.

    Examples:
        >>> renamed(lambda stage, done, total, _: print(f"{stage} {done}/{total}"), "first {}".format)("score", 5, 20)
        first score 5/20
    """
    if progress is None:
        return None

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        progress(rename(stage), done, total, note)

    return tell


def counted(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Return what the core calls, which knows no stages: `told(done, total)`, passed on to `progress` as one `stage`.

    Examples:
        >>> counted(lambda stage, done, total: print(f"{stage} {done}/{total}"), "attribute forget")(5, 20)
        attribute forget 5/20
    """
    return None if progress is None else lambda done, total: progress(stage, done, total)


def steps_left(measured: Sequence[tuple[int, float]], target: float, *, window: int = 10) -> int | None:
    """Estimate after how many more steps a measure that falls reaches its target: on a straight line.

    Args:
        measured: Step and value of each measurement, in order.
        target: Where the run stops.
        window: How many of the last measurements the line goes through: from the first of them to the last.

    Returns:
        At least 1; None where the measure does not fall.

    Examples:
        >>> steps_left([(1, 0.9), (2, 0.8), (3, 0.7)], target=0.1)
        6
        >>> steps_left([(1, 0.9), (2, 0.9)], target=0.1) is None
        True
    """
    if len(measured) < 2:
        return None
    (first, high), (last, low) = measured[-window:][0], measured[-1]
    if not low < high:
        return None
    left = (low - target) * (last - first) / (high - low)
    # The product can be off by a rounding error above a whole number.
    return max(1, math.ceil(left - 1e-9))
