"""Rows: which forget rows the attacker knows, which are scored, and shots of the former before the latter."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from torch_simu._checks import check_count, problem
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.data.examples import Example

_Row = TypeVar("_Row", bound=Hashable)


def split_rows(forget: Sequence[_Row], *, every: int = 3) -> tuple[list[_Row], list[_Row]]:
    """Part the forget set into the attacker's rows and the scored ones; no row is in both, whatever its place.

    Args:
        forget: The rows, encoded or not. One that is there again counts once.
        every: Of so many rows in their order the first is the attacker's.

    Returns:
        The attacker's rows, and the scored ones.

    Raises:
        ValueError: If there are fewer than two different rows.

    Examples:
        >>> attacker, scored = split_rows([Example((5, i), (-100, i)) for i in range(6)])
        >>> [row.labels[1] for row in attacker], [row.labels[1] for row in scored]
        ([0, 3], [1, 2, 4, 5])
    """
    check_count("every", every, low=2)
    rows = list(dict.fromkeys(forget))
    if len(rows) < 2:
        wrong = f"The forget set has {len(rows)} different row{'' if len(rows) == 1 else 's'}"
        raise ValueError(problem(wrong, "at least two", "An attack learns from one part and is scored on the other."))
    return rows[::every], [row for number, row in enumerate(rows) if number % every]


def check_unscored(taught: Sequence[Example], scored: Sequence[Example]) -> None:
    """Raise where a row that is taught is among the scored ones: what it is scored on would be no rest.

    Raises:
        ValueError: If one is.
    """
    if both := set(taught) & set(scored):
        wrong = f"{len(both)} of the rows that are taught are among those that are scored"
        raise ValueError(problem(wrong, "none", "Remove them from one of the sets."))


def with_shots(
    scored: Sequence[Example], attacker: Sequence[Example], *, shots: int, seed: int = 0, longest: int | None = None
) -> list[Example]:
    """Put rows of the attacker before each scored one, as they stand, one after the other as in a packed text.

    Args:
        scored: Rows whose answers are scored.
        attacker: Rows to draw the shots from.
        shots: How many, or all that there are.
        seed: Which ones and in which order: they depend on this and on the place of the scored row.
        longest: Tokens that a row may have at most; shots that do not fit are left out. None: nothing bounds them.

    Raises:
        ValueError: If `shots` is not positive.

    Examples:
        >>> with_shots([Example((5, 6), (-100, 6))], [Example((5, 7), (-100, 7))], shots=2)
        [Example(input_ids=(5, 7, 5, 6), labels=(-100, -100, -100, 6))]
    """
    check_count("shots", shots)
    found = []
    for number, row in enumerate(scored):
        before: tuple[int, ...] = ()
        for shot in random.Random(f"{seed} {number}").sample(list(attacker), min(shots, len(attacker))):
            if longest is None or len(before) + len(shot.input_ids) + len(row.input_ids) <= longest:
                before += shot.input_ids
        ids, labels = before + row.input_ids, (IGNORED,) * len(before) + row.labels
        found.append(Example(ids, labels, row.place, row.num_end))
    return found
