"""Pace: a step size that follows how fast the forget set is forgotten, because no one fits all models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch.optim import Optimizer

from torch_simu.unlearning.checkpoint import Record

FIRST_SHARE = 0.01
"""The share of the largest step size that a paced run begins with."""

_SLOW, _FAST = 0.02, 0.06
_LONGER, _SHORTER = 1.5, 0.5


def paced_rate(rate: float, *, largest: float, fall: float) -> float:
    """Return the next step size.

    It grows while the forget probability falls by less than 2 % of itself per step, and is halved where it falls by
    more than 6 %: a run takes some fifty to a hundred steps then, whether a layer of the model bears changes of a
    hundredth of its norm or of a ten thousandth.

    Args:
        rate: The step size of the last step.
        largest: What it never exceeds.
        fall: By which share of itself the forget probability fell per step.

    Examples:
        >>> paced_rate(0.01, largest=0.04, fall=0.0), paced_rate(0.03, largest=0.04, fall=0.0)
        (0.015, 0.04)
        >>> paced_rate(0.01, largest=0.04, fall=0.04), paced_rate(0.01, largest=0.04, fall=0.3)
        (0.01, 0.005)
    """
    if fall > _FAST:
        return rate * _SHORTER
    return min(rate * _LONGER, largest) if fall < _SLOW else rate


def pace(optimizer: Optimizer, log: Sequence[Record], *, largest: float) -> None:
    """Set the step size of the next step by the last two records of a log that measured the forget probability.

    Args:
        optimizer: Its groups have one step size.
        log: Of the run so far.
        largest: What the step size never exceeds.
    """
    measured = list(islice((record for record in reversed(log) if "forget_probability" in record), 2))
    if len(measured) < 2 or measured[0] is not log[-1]:
        return
    after, before = (record["forget_probability"] for record in measured)
    steps = measured[0]["step"] - measured[1]["step"]
    fall = 1.0 - (after / before) ** (1.0 / steps) if before > 0 else 0.0
    for group in optimizer.param_groups:
        group["lr"] = paced_rate(group["lr"], largest=largest, fall=fall)
