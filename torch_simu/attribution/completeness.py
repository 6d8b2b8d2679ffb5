"""Completeness: whether scores add up to the change that they explain."""

from __future__ import annotations

import math
import warnings

from torch_simu._checks import problem
from torch_simu.attribution.attribution import Attribution

_WORTH_A_WARNING = 0.01


class IncompleteError(ValueError):
    """The scores of a layer do not add up to the change that they explain.

    Attributes:
        attribution: What was found.
    """

    def __init__(self, message: str, attribution: Attribution) -> None:
        super().__init__(message)
        self.attribution = attribution


def check_complete(attribution: Attribution, limit: float) -> None:
    """Warn of a layer that misses more than 1 % of what it explains, and refuse one that misses more than `limit`.

    Raises:
        IncompleteError: If one misses more than `limit`.

    Warns:
        UserWarning: If one misses more than 1 %.
    """
    found = attribution.incompleteness
    # Scores that are not finite are named where they are used.
    layer, worst = max(found.items(), key=lambda pair: -1.0 if math.isnan(pair[1]) else pair[1])
    allowed = min(limit, _WORTH_A_WARNING)
    if not worst > allowed:
        return
    count = sum(each > allowed for each in found.values())
    what = f"{worst:.1%} of the change that they explain ({count} of {len(found)} layers miss more than {allowed:.0%})"
    wrong = f"The scores of layer {layer!r} miss {what}"
    if worst > limit:
        advice = (
            "Take more steps. If that does not help, its output is not linear in its neurons: leave the layer out. "
            "To have the scores all the same, pass a larger max_completeness_error."
        )
        raise IncompleteError(problem(wrong, f"at most {limit:.0%}", advice), attribution)
    warnings.warn(problem(wrong, f"at most {allowed:.0%}", "Take more steps."), UserWarning, stacklevel=3)
