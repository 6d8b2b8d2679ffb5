"""differentiate: the terms of an objective, one after the other, so that one graph is held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from torch_simu.optimizer import GradientBalance
from torch_simu.unlearning.objectives import Term

_NOWHERE: Callable[[], AbstractContextManager[None]] = nullcontext


def differentiate(
    terms: Iterable[Term],
    *,
    balance: GradientBalance | None = None,
    at: Callable[[], AbstractContextManager[None]] = _NOWHERE,
    beside: Callable[[], AbstractContextManager[None]] = _NOWHERE,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> dict[str, tuple[float, Tensor]]:
    """Leave the gradient of an objective in `.grad`.

    The first term is that of the forget set. With a `balance` its gradient is kept apart, and the others are weighted
    among themselves: call `balance.combine_(retain_weight=...)` with the weight of the first of them, behind the last
    micro-batch of a step.

    Args:
        terms: Of an `Objective`; each is made when the one before was differentiated.
        balance: Brings the forget gradient to the norm of the others.
        at: Makes a context in which the forget term is made and differentiated, as `Adversary.in_place`.
        beside: The same for each of the others.
        backward: Differentiates a loss; accelerate's, say.

    Returns:
        Name -> (weight, loss without a graph) of each term.
    """
    found: dict[str, tuple[float, Tensor]] = {}
    remaining = iter(terms)
    with at():
        first = next(remaining, None)
        if first is None:
            return found
        found[first.name] = (first.weight, first.loss.detach())
        with balance.forget() if balance is not None else nullcontext():
            backward(first.weight * first.loss)
    unit = None
    while True:
        with beside():
            term = next(remaining, None)
            if term is None:
                return found
            unit = term.weight if unit is None else unit
            found[term.name] = (term.weight, term.loss.detach())
            backward((term.weight if balance is None else _share(term.weight, unit)) * term.loss)


def retain_weight(found: dict[str, tuple[float, Tensor]]) -> float:
    """Return the weight of the first term found behind that of the forget set; 0 where there is none."""
    return next((weight for weight, _ in list(found.values())[1:]), 0.0)


def _share(weight: float, unit: float) -> float:
    return weight / unit if unit else 1.0
