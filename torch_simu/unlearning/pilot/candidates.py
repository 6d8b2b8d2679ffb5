"""Candidates: what a pilot tries, one change after the other on the best so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.pilot.tries import Try, best_try
from torch_simu.unlearning.pilot.words import one_batch_size

_FACTOR = 4.0
_SHORTEST, _LONGEST = 16.0, 4.0
_MOMENTUM = 0.5
_FEW = 0.3

Change = Callable[[UnlearnConfig, UnlearnConfig, int], UnlearnConfig | None]
"""The best so far, the given one, the number of forget rows -> what to try; None where it says nothing of them."""


def candidates(given: UnlearnConfig, tries: Sequence[Try], *, num_forget: int) -> list[UnlearnConfig]:
    """Return the configurations that may come next, in their order: changes of the best so far that were not tried.

    The given one comes first. What brought most in our measurements comes before what brought less, so that a short
    pilot gives a good answer; what needs an attribution comes last. While every try failed, shorter steps follow.

    Args:
        given: What the pilot starts from.
        tries: Those that were made.
        num_forget: Rows that the pilot forgets.

    Examples:
        >>> candidates(UnlearnConfig(), [], num_forget=9) == [UnlearnConfig()]
        True
    """
    tried = [each.config for each in tries]
    if given not in tried:
        return [given]
    failed = all(each.failed for each in tries)
    best = tries[-1].config if failed else best_try(tries).config
    changes = (_shorter,) if failed else _CHANGES
    found = [changed for change in changes if (changed := change(best, given, num_forget)) is not None]
    return [each for number, each in enumerate(found) if each not in tried and each not in found[:number]]


def _other_retain_term(best: UnlearnConfig, given: UnlearnConfig, num_forget: int) -> UnlearnConfig:
    return best.updated(retain_term="nll" if best.retain_term == "kl" else "kl")


def _shorter(best: UnlearnConfig, given: UnlearnConfig, num_forget: int) -> UnlearnConfig | None:
    return _with_rate(best, best.lr / _FACTOR) if best.lr > 1.01 * given.lr / _SHORTEST else None


def _longer(best: UnlearnConfig, given: UnlearnConfig, num_forget: int) -> UnlearnConfig | None:
    return _with_rate(best, best.lr * _FACTOR) if best.lr < 0.99 * given.lr * _LONGEST else None


def _with_rate(best: UnlearnConfig, lr: float) -> UnlearnConfig:
    # Without the digits that a quotient leaves: people copy it.
    return best.updated(lr=float(f"{lr:.6g}"))


def _less_momentum(best: UnlearnConfig, given: UnlearnConfig, num_forget: int) -> UnlearnConfig | None:
    # AdamW keeps its own.
    momentum, curvature = best.betas
    return best.updated(betas=(_MOMENTUM, curvature)) if best.second_order and momentum > _MOMENTUM else None


def _larger_batches(best: UnlearnConfig, given: UnlearnConfig, num_forget: int) -> UnlearnConfig | None:
    size = best.forget_batch_size
    return one_batch_size(best, 2 * size) if size < num_forget and size < 2 * given.forget_batch_size else None


def _fixed(best: UnlearnConfig, given: UnlearnConfig, num_forget: int) -> UnlearnConfig | None:
    return best.updated(paced=False) if best.paced else None


def _fewer_neurons(best: UnlearnConfig, given: UnlearnConfig, num_forget: int) -> UnlearnConfig | None:
    return best.updated(fraction=_FEW) if best.where == "critical" and best.fraction > _FEW else None


_CHANGES: tuple[Change, ...] = (
    _other_retain_term,
    _shorter,
    _less_momentum,
    _longer,
    _larger_batches,
    _fixed,
    _fewer_neurons,
)
