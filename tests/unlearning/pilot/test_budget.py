"""A pilot keeps its time, and every try its share; one try is always made."""

from __future__ import annotations

import pytest

from tests.unlearning.pilot.test_tries import made
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.pilot.budget import Budget, goes_on
from torch_simu.unlearning.pilot.candidates import candidates


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_what_is_left_falls_with_the_time(clock):
    budget = Budget(60.0, clock=clock)
    clock.now += 45.0
    assert budget.left == 15.0


def test_the_first_try_is_made_without_time_and_no_other(clock):
    budget = Budget(10.0, clock=clock)
    clock.now += 30.0
    assert budget.allows([])
    assert not budget.allows([made(seconds=0.5)])


@pytest.mark.parametrize(
    ("before", "allowed"),
    [
        ([made(seconds=30.0)], True),
        ([made(seconds=50.0)], False),
        ([made(seconds=50.0), made(seconds=30.0)], True),
        ([made(seconds=50.0), made(seconds=1.0, reached=False)], False),
        ([made(seconds=30.0, reached=False)], True),
        ([made(seconds=50.0, reached=False)], False),
    ],
)
def test_another_try_begins_where_one_can_end_in_time(clock, before, allowed):
    assert Budget(40.0, clock=clock).allows(before) is allowed


def test_a_try_gets_half_of_the_time_until_one_has_reached_the_target(clock):
    budget = Budget(60.0, clock=clock)
    assert budget.share([], open_tries=1) == 30.0
    assert budget.share([made(reached=False)], open_tries=6) == 30.0


def test_a_try_gets_twice_the_shortest_or_its_part_of_what_is_left_if_that_is_more(clock):
    budget = Budget(60.0, clock=clock)
    before = [made(seconds=9.0), made(seconds=5.0), made(seconds=1.0, reached=False)]
    assert budget.share(before, open_tries=12) == 10.0
    assert budget.share(before, open_tries=3) == 20.0
    assert budget.share([made(seconds=50.0)], open_tries=3) == 60.0


@pytest.mark.parametrize(
    ("elapsed", "expected", "on"),
    [(9.0, None, True), (11.0, None, False), (11.0, 15.0, True), (11.0, 25.0, False), (30.0, 0.0, False)],
)
def test_a_try_goes_on_beyond_its_share_only_where_it_will_end_in_time(elapsed, expected, on):
    assert goes_on(elapsed, share=10.0, limit=30.0, expected=expected) is on


def outcome(config: UnlearnConfig, number: int) -> object:
    """A try whose figures depend on its number alone."""
    return made(config=config, kept=(7 * number % 10) / 10, seconds=1.0 + number)


@pytest.mark.parametrize(
    "given", [UnlearnConfig(), UnlearnConfig(method="simu_graddiff"), UnlearnConfig(method="fo_graddiff")]
)
def test_the_given_configuration_comes_first_and_none_comes_twice_until_nothing_is_left(given):
    tries = []
    while found := candidates(given, tries, num_forget=20):
        assert len(tries) < 60
        tries.append(outcome(found[0], len(tries)))
    tried = [each.config for each in tries]
    assert tried[0] == given and len(tried) > 3
    assert all(each not in tried[:number] for number, each in enumerate(tried))
    assert {each.forget_target for each in tried} == {given.forget_target} and {each.seed for each in tried} == {0}
    assert all(given.lr / 17 < each.lr < given.lr * 5 for each in tried)


def test_the_next_candidate_changes_one_choice_of_the_best_so_far():
    given = UnlearnConfig()
    best = given.updated(retain_term="kl")
    tries = [made(config=given, kept=0.5), made(config=best, kept=0.9)]
    for found in candidates(given, tries, num_forget=9):
        changed = {name for name, value in found.to_json().items() if value != best.to_json()[name]}
        assert len(changed) == 1


def test_batches_grow_only_where_the_rows_do_not_fit_into_one():
    tries = [made(config=UnlearnConfig())]
    sizes = [{each.forget_batch_size for each in candidates(UnlearnConfig(), tries, num_forget=n)} for n in (16, 17)]
    assert sizes == [{16}, {16, 32}]


def test_after_failures_only_the_steps_become_shorter():
    given = UnlearnConfig(lr=0.16)
    tries, rates = [], []
    while found := candidates(given, tries, num_forget=20):
        assert found[0] == given.updated(lr=found[0].lr)
        rates.append(found[0].lr)
        tries.append(made(config=found[0], failed=True))
    assert rates == [0.16, 0.04, 0.01]
