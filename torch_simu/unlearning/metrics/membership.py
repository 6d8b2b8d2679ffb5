"""Membership: whether the rows that a model learned can be told from rows that it never saw."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from torch_simu._checks import problem


def membership_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Return how often a row of one set has a larger value than a row of another, ties as half: the area under the ROC.

    With the probability of the answer as value this is the loss attack (Yeom et al. 2018): 1 where every learned row
    is told from every other one, 0.5 where it is guessing, and below that where forgotten rows stand out the other way.

    Args:
        members: Of rows that the model learned, or has forgotten.
        others: Of rows of the same kind that it never saw.

    Raises:
        ValueError: If one of them is empty.

    Examples:
        >>> membership_auc([0.9, 0.8], [0.8, 0.1])
        0.875
    """
    if not members or not others:
        wrong = f"There are {len(members)} members and {len(others)} others"
        raise ValueError(problem(wrong, "at least one of each"))
    ordered = sorted(others)
    above = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in members)
    return above / (2 * len(members) * len(others))
