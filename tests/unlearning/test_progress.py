"""The expected end of a run is where a straight line through its last measurements meets the target."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unlearning.test_driver import FAST, memorized, run  # noqa: F401 (a fixture)
from torch_simu.unlearning.progress import steps_left


@given(
    st.integers(2, 30),
    st.integers(1, 5),
    st.floats(1e-3, 0.5),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
def test_a_straight_line_is_followed_to_its_target(count, interval, slope, target, left) -> None:
    last = interval * count
    measured = [(step, target + slope * (last + left - step)) for step in range(interval, last + 1, interval)]
    assert steps_left(measured, target) in (max(1, left), left + 1)
    # Half a step more is a whole one.
    assert steps_left(measured, target - slope / 2) == left + 1


def test_what_lies_before_the_window_does_not_count() -> None:
    late = [(10, 0.5), (11, 0.4), (12, 0.3)]
    assert steps_left([(1, 0.9), (9, 0.9), *late], 0.1, window=3) == steps_left(late, 0.1) == 2


@pytest.mark.parametrize("values", [[], [0.9], [0.9, 0.9], [0.5, 0.6], [0.5, math.nan]])
def test_a_measure_that_does_not_fall_has_no_expected_end(values) -> None:
    assert steps_left(list(enumerate(values, 1)), 0.1) is None


def told(model, examples, **changes):
    """What a run tells of its steps: done, of how many, and a note."""
    found = []

    def tell(stage, done, total, note=""):
        if stage == "unlearn":
            found.append((done, total, note))

    done = run(model, examples, FAST.updated(**changes), progress=tell)
    return found, done


def test_a_run_tells_its_steps_of_those_expected_and_ends_complete(memorized) -> None:  # noqa: F811
    found, done = told(*memorized, max_steps=80, forget_target=0.3, fraction=0.3)
    assert done.reached and found[-1][:2] == (done.steps, done.steps) and "left" not in found[-1][2]
    values = [record["forget_probability"] for record in done.log]
    for step, total, note in found[:-1]:
        expected = steps_left(list(enumerate(values[:step], 1)), 0.3)
        assert total == (80 if expected is None else min(80, step + expected)) > step
        said = re.findall(r"about (\d+) steps left", note)
        assert said == ([] if total == 80 else [str(total - step)])
        assert note.startswith(f"forget prob. {values[step - 1]:.3f}")
    assert any("left" in note for _, _, note in found)


def test_a_run_without_a_target_counts_to_its_last_step(memorized) -> None:  # noqa: F811
    found, _ = told(*memorized, max_steps=4, forget_target=None)
    assert [(step, total) for step, total, _ in found] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not any("left" in note for _, _, note in found)


def test_a_run_measured_at_times_is_never_told_complete_before_its_end(memorized) -> None:  # noqa: F811
    found, done = told(*memorized, max_steps=80, forget_target=0.3, fraction=0.3, eval_interval=4)
    assert found[0][2] == "" and found[-1][:2] == (done.steps, done.steps)
    assert all(step < total for step, total, _ in found[:-1])
