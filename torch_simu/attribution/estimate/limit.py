"""Limit: how many passes the samples may take."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType

from torch_simu._checks import check_count, problem

_SECONDS: Mapping[str, int] = MappingProxyType({"s": 1, "m": 60, "h": 3600})


def budget_of(text: int | str) -> int | timedelta:
    """Read a budget as it is written on a command line: a number of passes, or a time in seconds, minutes or hours.

    Raises:
        ValueError: If it is neither, or too small for a `Limit`.
        TypeError: If it is neither a whole number nor a text.

    Examples:
        >>> budget_of("31"), budget_of("10m"), budget_of("1.5h")
        (31, datetime.timedelta(seconds=600), datetime.timedelta(seconds=5400))
    """
    if isinstance(text, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
        if found is None or (not found[2] and "." in found[1]):
            raise ValueError(problem(f"budget is {text!r}", "passes as '31', or a time as '90s', '10m' or '1.5h'"))
        unit = found[2]
        budget = timedelta(seconds=float(found[1]) * _SECONDS[unit]) if unit else int(found[1])
    else:
        budget = text
    Limit(budget)
    return budget


@dataclass(frozen=True, slots=True)
class Limit:
    """A number of passes over all samples, or a time that starts now.

    Args:
        budget: Passes, each forward and backward, or a duration.

    Raises:
        ValueError: If the budget is below two passes, or no time.
        TypeError: If it is neither a whole number nor a duration.

    Examples:
        >>> Limit(5).passes(seconds=1.0, share=0.5)
        5
        >>> Limit(timedelta(seconds=10)).passes(seconds=1.0, share=0.5)
        5
    """

    budget: int | timedelta
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not isinstance(self.budget, timedelta):
            check_count("budget", self.budget, low=2)
        elif self.budget <= timedelta(0):
            raise ValueError(problem(f"budget is {self.budget}", "a positive duration"))

    @property
    def number(self) -> int | None:
        """How many passes there may be; None: as many as a time allows."""
        return None if isinstance(self.budget, timedelta) else self.budget

    def passes(self, seconds: float, share: float) -> int:
        """Return how many passes some samples may take, two at least.

        Args:
            seconds: What one pass over them takes, the first of which is made.
            share: Of the samples that are left, these.
        """
        if not isinstance(self.budget, timedelta):
            return self.budget
        left = self._started + self.budget.total_seconds() - time.monotonic()
        return 1 + max(1, int(left * share / max(seconds, 1e-9)))
