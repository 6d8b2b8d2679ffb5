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


def check_complete(attribution: Attribution, limit: float = 0.2) -> None:
    """Refuse scores of a layer that miss more than a share of the change that they explain.

    Args:
        attribution: The scores.
        limit: The largest `Attribution.incompleteness` that is not refused.

    Raises:
        IncompleteError: If a layer misses more.

    Examples:
        >>> import torch
        >>> scores = {"mlp": torch.tensor([1.0, 2.0]).double()}
        >>> check_complete(Attribution(scores, {"mlp": -0.5}, 1, {}, change_size={"mlp": 3.5}))
        >>> try:
        ...     check_complete(Attribution(scores, {"mlp": -7.0}, 1, {}, change_size={"mlp": 10.0}))
        ... except IncompleteError as error:
        ...     error.attribution.incompleteness
        {'mlp': 0.7}
    """
    if wrong := _worst(attribution, limit):
        advice = (
            "Take more steps. If that does not help, what the layer gives is not linear in its neurons: leave it out. "
            "To have the scores all the same, set max_completeness_error."
        )
        raise IncompleteError(problem(wrong, f"at most {limit:.0%}", advice), attribution)


def warn_incomplete(attribution: Attribution) -> None:
    """Warn of scores that miss more than 1 % of the change that they explain."""
    if wrong := _worst(attribution, _WORTH_A_WARNING):
        text = problem(wrong, f"at most {_WORTH_A_WARNING:.0%}", "Take more steps.")
        warnings.warn(text, UserWarning, stacklevel=3)


def _worst(attribution: Attribution, limit: float) -> str:
    """Say which layer misses more than the limit; an empty text where none does."""
    # Scores that are not finite are refused where they are used.
    found = {layer: share for layer, share in attribution.incompleteness.items() if not math.isnan(share)}
    beyond = [layer for layer, share in found.items() if share > limit]
    if not beyond:
        return ""
    worst = max(beyond, key=lambda layer: found[layer])
    count = f"{len(beyond)} of {len(found)} layers miss more than {limit:.0%}"
    return f"The scores of layer {worst!r} miss {found[worst]:.1%} of the change that they explain ({count})"
