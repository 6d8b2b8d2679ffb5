"""Hiding: what positive influence loses and negative influence gains, neuron by neuron."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_simu.unlearning.metrics.hiding import influence_change


def scores_of(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=draw) for name, size in (("a", 7), ("b", 4))}


@given(st.integers(0, 2**31))
def test_the_change_is_that_of_a_loop_over_neurons(seed):
    before, after = scores_of(seed), scores_of(seed + 1)
    total = lost = gained = 0.0
    for name in before:
        for old, new in zip(before[name].tolist(), after[name].tolist(), strict=True):
            total += max(old, 0)
            if old > 0:
                lost += old - min(old, max(new, 0))
            if new < 0:
                gained += max(0, -new - max(-old, 0))
    change = influence_change(before, after)
    assert (change.lost, change.suppressing) == pytest.approx((lost / total, gained / total))
    assert change.hiding == pytest.approx(gained / (gained + lost))


def test_by_hand():
    before = {"down": torch.tensor([4.0, 2.0, 2.0, -1.0, -1.0])}
    # One neuron is erased by half, one untouched, one turned against the answer; of those against it one grows.
    after = {"down": torch.tensor([2.0, 2.0, -3.0, -2.0, 5.0])}
    change = influence_change(before, after)
    assert (change.lost, change.suppressing, change.hiding) == (4 / 8, 4 / 8, 0.5)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, (0.0, 0.0, 0.0)), (0.0, (1.0, 0.0, 0.0)), (2.0, None)])
def test_scores_that_vanish_are_erased_and_only_what_grows_against_the_answer_hides(factor, expected):
    before = {"down": torch.tensor([3.0, -1.0])}
    change = influence_change(before, {"down": before["down"] * factor})
    assert (change.lost, change.suppressing, change.hiding) == (expected or (0.0, 1 / 3, 1.0))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "The scores have layers .*'b'.*, expected .*'a'"),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, "The scores have layers"),
        ({"a": -torch.ones(2)}, {"a": torch.ones(2)}, "No neuron has a positive score before"),
        ({}, {}, "No neuron has a positive score before"),
    ],
)
def test_scores_that_do_not_compare_are_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        influence_change(before, after)
