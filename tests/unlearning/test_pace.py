"""A paced run takes steps as long as the forget set asks for, whatever the scale of the largest one is."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.unlearning.test_driver import FAST, _memorized, run
from torch_simu.unlearning.pace import FIRST_SHARE, pace, paced_rate

rates = st.floats(1e-8, 1.0)


@given(rates, rates, st.floats(-1.0, 1.0))
def test_a_rate_stays_below_the_largest_and_follows_the_fall(rate, largest, fall):
    rate = min(rate, largest)
    found = paced_rate(rate, largest=largest, fall=fall)
    assert 0 < found <= largest
    assert (found < rate) == (fall > 0.06)
    assert found >= rate or fall > 0.06


def optimizer_at(rate):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize(
    ("log", "rate"),
    [
        ([], 0.01),
        ([{"step": 1, "forget_probability": 0.9}], 0.01),
        ([{"step": 1, "forget_probability": 0.9}, {"step": 2, "forget_probability": 0.899}], 0.015),
        ([{"step": 1, "forget_probability": 0.9}, {"step": 2, "forget_probability": 0.87}], 0.01),
        ([{"step": 1, "forget_probability": 0.9}, {"step": 2, "forget_probability": 0.5}], 0.005),
        # The same fall over ten steps is one of four in a hundred per step.
        ([{"step": 1, "forget_probability": 0.9}, {"step": 5}, {"step": 11, "forget_probability": 0.6}], 0.01),
        # Nothing was measured at the last step.
        ([{"step": 1, "forget_probability": 0.9}, {"step": 2, "forget_probability": 0.5}, {"step": 3}], 0.01),
        ([{"step": 1, "forget_probability": 0.0}, {"step": 2, "forget_probability": 0.0}], 0.015),
    ],
)
def test_the_last_two_measurements_set_the_rate(log, rate):
    optimizer = optimizer_at(0.01)
    pace(optimizer, log, largest=1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("largest", [0.3, 30.0])
def test_a_run_reaches_its_target_from_any_largest_step_and_keeps_the_rest(largest):
    model, examples = _memorized()
    config = FAST.updated(method="simu", lr=largest, max_steps=150, forget_target=0.3)
    assert config.paced
    twin = copy.deepcopy(model)
    done = run(twin, examples, config, monitor={"retain": examples["retain"]})
    assert done.reached and done.log[-1]["monitor"]["retain"]["probability"] > 0.5
    falls = [
        1 - after["forget_probability"] / before["forget_probability"]
        for before, after in zip(done.log, done.log[1:], strict=False)
    ]
    assert max(falls) < 0.5


def test_a_paced_run_is_resumed_to_the_same_bits(tmp_path):
    model, examples = _memorized()
    config = FAST.updated(method="simu", lr=1.0, max_steps=12, checkpoint_interval=5, forget_target=0.0)
    whole, killed, resumed = (copy.deepcopy(model) for _ in range(3))
    expected = run(whole, examples, config)
    run(killed, examples, config.updated(max_steps=5), checkpoint=tmp_path / "run")
    assert run(resumed, examples, config, checkpoint=tmp_path / "run").log == expected.log
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_what_sets_the_pace_belongs_to_the_run(tmp_path):
    model, examples = _memorized()
    config = FAST.updated(method="simu", lr=1.0, max_steps=2)
    run(copy.deepcopy(model), examples, config, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to another run"):
        run(copy.deepcopy(model), examples, config.updated(eval_interval=2), checkpoint=tmp_path / "run")


def test_a_run_that_is_not_paced_takes_its_rate_from_the_first_step():
    model, examples = _memorized()
    moved = {}
    for paced in (False, True):
        twin = copy.deepcopy(model)
        run(twin, examples, FAST.updated(method="simu", lr=0.1, max_steps=1, paced=paced))
        weight = "model.layers.0.mlp.down_proj.weight"
        moved[paced] = (twin.get_parameter(weight) - model.get_parameter(weight)).norm().item()
    assert moved[True] == pytest.approx(FIRST_SHARE * moved[False], rel=1e-3)
