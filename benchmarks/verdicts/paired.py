"""Paired differences: two methods on the same seeds, with the interval in which the mean difference lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.verdicts.parts import Part, Row, part

Value = Callable[[Row], float | None]
"""A figure of a row; None where it was not measured."""


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval by Student's distribution, which one value does not have."""

    middle: float
    half: float | None

    @property
    def low(self) -> float | None:
        """The lower end."""
        return None if self.half is None else self.middle - self.half

    @property
    def high(self) -> float | None:
        """The upper end."""
        return None if self.half is None else self.middle + self.half


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its interval."""
    if len(values) < 2:
        return Interval(mean(values), None)
    # Only here: on a machine with a GPU, whose results have no intervals, it may be missing.
    from scipy import stats

    return Interval(mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5)


def difference(rows: Sequence[Row], ours: str, theirs: str, value: Value, *, share: float = 1.0) -> Interval | None:
    """What a method has more than a share of what another has, over the seeds on which both were measured.

    Args:
        rows: Of a result file.
        ours: The name of a method.
        theirs: That of another.
        value: What is compared.
        share: Factor of the other's figure.
    """
    found: dict[str, dict[object, float]] = {ours: {}, theirs: {}}
    for row in rows:
        if row["method"] in found and (measured := value(row)) is not None:
            found[row["method"]][row["seed"]] = measured
    seeds = [seed for seed in found[ours] if seed in found[theirs]]
    return interval([found[ours][seed] - share * found[theirs][seed] for seed in seeds]) if seeds else None


def more(claim: str, found: Interval | None) -> Part:
    """That a difference is above zero: its interval is."""
    return part(f"{claim}: lower end of the difference", None if found is None else found.low, "more than", 0.0)


def not_less(claim: str, found: Interval | None) -> Part:
    """That a difference is not below zero: its interval does not lie below."""
    return part(f"{claim}: upper end of the difference", None if found is None else found.high, "at least", 0.0)


def at_most(claim: str, found: Interval | None) -> Part:
    """That a difference is zero or below: its interval is."""
    return part(f"{claim}: upper end of the difference", None if found is None else found.high, "at most", 0.0)
