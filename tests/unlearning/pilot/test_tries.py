"""The best try is one that reached the target, keeps most, and of those that keep as much the shortest."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.pilot.tries import TIE, Try, best_try, kept_share

shares = st.floats(0.0, 1.0)
tries = st.builds(
    Try,
    name=st.just("--lr 0.1"),
    config=st.just(UnlearnConfig()),
    reached=st.booleans(),
    probability=shares,
    kept=shares,
    steps=st.integers(1, 99),
    seconds=st.floats(0.1, 99.0),
    failed=st.booleans(),
)


def made(**changes: object) -> Try:
    usual = {"name": "", "config": UnlearnConfig(), "reached": True, "probability": 0.1, "kept": 0.9, "steps": 9}
    return Try(**{**usual, "seconds": 5.0, **changes})


@given(st.lists(tries, min_size=1, max_size=6))
def test_no_try_is_better_than_the_best(found):
    sound = [each for each in found if not each.failed]
    if not sound:
        with pytest.raises(ValueError, match=f"{len(found)} tries failed, expected at least one"):
            best_try(found)
        return
    best = best_try(found)
    assert best in sound
    for other in sound:
        if other.reached:
            assert best.reached and other.kept <= best.kept + TIE
            assert not (other.kept >= best.kept and other.seconds < best.seconds)
        elif not best.reached:
            assert other.probability >= best.probability


@given(st.lists(tries.filter(lambda each: not each.failed), min_size=2, max_size=6))
def test_the_order_of_the_tries_says_nothing(found):
    figures = [
        (each.reached, each.probability, each.kept, each.seconds) for each in map(best_try, (found, found[::-1]))
    ]
    assert figures[0][0] == figures[1][0]
    if figures[0][0]:
        assert figures[0][2:] == figures[1][2:]
    else:
        assert figures[0][1] == figures[1][1]


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"reached": False, "probability": 0.11, "kept": 1.0}, {"kept": 0.2}),
        ({"kept": 0.88, "seconds": 0.1}, {"kept": 0.9, "seconds": 60.0}),
        ({"kept": 0.9, "seconds": 60.0}, {"kept": 0.895, "seconds": 5.0}),
        ({"failed": True, "kept": 1.0}, {"reached": False, "probability": 0.8, "kept": 0.1}),
        ({"reached": False, "probability": 0.5, "kept": 1.0}, {"reached": False, "probability": 0.4, "kept": 0.5}),
    ],
)
def test_what_is_better_wins(worse, better):
    worse, better = made(**worse), made(**better)
    assert best_try([worse, better]) is best_try([better, worse]) is better


@given(st.lists(st.tuples(shares, st.floats(0.001, 1.0)), min_size=1))
def test_what_is_kept_is_a_share_and_all_of_it_where_nothing_was_lost(rows):
    after, before = zip(*rows, strict=True)
    assert 0.0 <= kept_share(after, before) <= 1.0
    assert kept_share(before, before) == 1.0
    assert kept_share([0.0] * len(before), before) == 0.0
    assert kept_share([2 * value for value in before], before) == 1.0


def test_the_time_of_a_step_is_without_the_attribution():
    found = made(steps=4, seconds=10.0, attribution_seconds=2.0)
    assert found.seconds_per_step == 2.0
    assert dataclasses.replace(found, steps=0).seconds_per_step == 8.0
