"""Argument checks with one message template: what is wrong, what was expected, what to do next."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection


def problem(wrong: str, expected: str, advice: str = "") -> str:
    """Compose an error message: what is wrong with its value, what was expected, what to do next."""
    return f"{wrong}, expected {expected}." + (f" {advice}" if advice else "")


def check_number(
    name: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Return `value` as a float inside the interval, or raise an error that names the interval."""
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open or high == math.inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(problem(f"{name} is {value!r} of type {type(value).__name__}", f"a number in {interval}"))
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below and math.isfinite(value)):
        raise ValueError(problem(f"{name} is {value!r}", f"a finite number in {interval}"))
    return float(value)


def check_count(name: str, value: object, *, low: int = 1) -> int:
    """Return `value` as an int of at least `low`, or raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(problem(f"{name} is {value!r} of type {type(value).__name__}", f"a whole number >= {low}"))
    if value < low:
        raise ValueError(problem(f"{name} is {value}", f"a whole number >= {low}"))
    return value


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`, or raise with the nearest one as a suggestion."""
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    listed = ", ".join(repr(choice) for choice in choices)
    raise ValueError(problem(f"{name} is {value!r}", f"one of {listed}", f"Did you mean {near[0]!r}?" if near else ""))


def check_pattern(pattern: str) -> str:
    """Return `pattern` if it is a regular expression, or raise."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(problem(f"The pattern {pattern!r} is invalid ({error})", "a regular expression")) from None
    return pattern
