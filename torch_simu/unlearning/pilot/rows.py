"""Rows: which of the sets a pilot forgets, keeps, and measures what is kept on."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch_simu.unlearning.data.examples import Example

MOST_ROWS = 256
"""Rows of a set at most, evenly spread."""

HELD_OUT = 4
"""Of so many retain rows one is in no batch."""


@dataclass(frozen=True, slots=True)
class PilotRows:
    """The rows of a pilot.

    Attributes:
        forget: What is forgotten.
        retain: What is in its batches.
        held_out: Retain rows in no batch, on which is measured what is kept.
    """

    forget: Sequence[Example]
    retain: Sequence[Example]
    held_out: Sequence[Example]


def pilot_rows(forget: Sequence[Example], retain: Sequence[Example], *, seed: int, most: int = MOST_ROWS) -> PilotRows:
    """Choose the rows of a pilot: a quarter of the retain rows is held out, drawn by the seed.

    Drawn, because rows often come in rounds: every fourth could be the same question about another person. A single
    retain row is in both parts.

    Args:
        forget: Encoded rows to forget.
        retain: Encoded rows to keep.
        seed: Of the draw.
        most: Rows of a set at most, evenly spread.

    Examples:
        >>> rows = [Example((number, 1), (-100, 1)) for number in range(8)]
        >>> found = pilot_rows(rows, rows, seed=0, most=6)
        >>> len(found.forget), len(found.retain), len(found.held_out)
        (6, 5, 1)
    """
    forget, retain = _spread(forget, most), _spread(retain, most)
    if len(retain) == 1:
        return PilotRows(forget, retain, retain)
    count = max(1, len(retain) // HELD_OUT)
    held = set(random.Random(seed).sample(range(len(retain)), count))
    parts = [[row for number, row in enumerate(retain) if (number in held) is wanted] for wanted in (False, True)]
    return PilotRows(forget, *parts)


def _spread(rows: Sequence[Example], most: int) -> list[Example]:
    count = min(len(rows), most)
    return [rows[math.floor(number * len(rows) / count)] for number in range(count)]
