"""The parts of a verdict: a figure that was measured, the bar it is held to, and whether it holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

Row = Mapping[str, object]
Part = dict[str, object]
"""`claim`, `measured`, `needs` (how the figure must compare), `bar`, `holds`: true, false or "not measured"."""

NEEDS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"at least": operator.ge, "at most": operator.le, "more than": operator.gt, "less than": operator.lt}
)
NOT_MEASURED = "not measured"


def part(claim: str, measured: float | None, needs: str, bar: float | None) -> Part:
    """Hold a figure to its bar; where one of the two is missing, nothing was measured."""
    known = measured is not None and bar is not None
    holds = NEEDS[needs](measured, bar) if known else NOT_MEASURED
    return {"claim": claim, "measured": shown(measured), "needs": needs, "bar": shown(bar), "holds": holds}


def verdict(parts: Iterable[Part]) -> dict[str, object]:
    """All parts, and whether the claim holds: false if any part fails, true only if every part was measured."""
    parts = list(parts)
    found = [each["holds"] for each in parts]
    holds = False if False in found else NOT_MEASURED if NOT_MEASURED in found or not found else True
    return {"holds": holds, "parts": parts}


def shown(value: float | None) -> float | None:
    """Four digits of what is no count: more would be noise."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
