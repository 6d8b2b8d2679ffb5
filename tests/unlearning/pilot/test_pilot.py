"""A pilot says what the model itself bears, keeps its time, and leaves the model as it was to the last bit."""

from __future__ import annotations

import time

import pytest
import torch

from tests.quantized import quantized
from tests.unlearning.pilot.test_tries import made
from tests.unlearning.test_driver import memorized  # noqa: F401 (a fixture)
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.bitsandbytes.layers import fingerprint, holds_codes
from torch_simu.deltas import attached_layers
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.pilot import candidates, pilot
from torch_simu.unlearning.pilot.pilot import recommend
from torch_simu.unlearning.pilot.recommendation import Sizes, expected, recommended
from torch_simu.unlearning.pilot.rows import pilot_rows
from torch_simu.unlearning.pilot.words import one_batch_size
from torch_simu.unlearning.steps import NonFiniteLossError

EASY = one_batch_size(UnlearnConfig(forget_target=0.5, attribution_steps=2, max_completeness_error=None), 8)
MOMENT = 1e-6
"""Minutes in which no more than the first step of a try can be made."""


def state(model):
    """All that a model computes with, and what of it trains."""
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    codes = {name: fingerprint(layer) for name, layer in model.named_modules() if holds_codes(layer)}
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return tensors, codes, flags, modes, [type(module) for module in model.modules()]


def assert_as_before(model, before):
    after = state(model)
    assert after[1:] == before[1:] and after[0].keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())


def some(examples, minutes=10.0, config=EASY, **changes):
    """The arguments of a pilot on the demo's sets."""
    sets = {"forget": examples["forget"], "retain": examples["retain"], **changes}
    return (sets["forget"], sets["retain"]), {"minutes": minutes, "config": config}


@pytest.fixture
def few(monkeypatch):
    """One change only: how many there are says nothing of a pilot."""
    monkeypatch.setattr(candidates, "_CHANGES", candidates._CHANGES[:1])


@pytest.mark.usefixtures("few")
def test_the_run_that_is_recommended_reaches_the_target_in_about_the_expected_steps(memorized):  # noqa: F811
    model, examples = memorized
    before = state(model)
    told = []
    sets, options = some(examples)
    found = recommend(model, *sets, **options, progress=lambda stage, done, total, note="": told.append(stage))
    assert_as_before(model, before)
    assert len(found.tries) == 2 and found.best.reached
    assert found.tries[0].config == EASY and found.tries[0].name == "as given"
    assert found.config == found.best.config.updated(max_steps=found.config.max_steps)
    assert f"try {len(found.tries)}" in told and "try 1" in told
    done = unlearn(model, *sets, config=found.config)
    assert done.reached and done.steps <= found.config.max_steps
    assert found.expected_steps / 2 <= done.steps <= found.expected_steps * 2


@pytest.mark.parametrize("method", ["so_graddiff", "attention_only", "simu_graddiff"])
def test_the_weights_that_another_method_trains_are_put_back(memorized, method):  # noqa: F811
    model, examples = memorized
    before = state(model.train())
    sets, options = some(examples, MOMENT, EASY.updated(method=method, attention="full"))
    recommend(model, *sets, **options)
    assert_as_before(model, before)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_quantized_model_keeps_its_codes_and_the_deltas_of_an_earlier_request(memorized, kind, earlier):  # noqa: F811
    model = quantized(memorized[0], kind)
    if earlier:
        layer = "model.layers.0.mlp.down_proj"
        attach_deltas(model, NeuronSelection({layer: [1, 5]}, {layer: 64}))[layer].data.fill_(0.01)
    held = {name: layer.delta for name, layer in attached_layers(model).items()}
    before = state(model)
    sets, options = some(memorized[1], MOMENT)
    found = recommend(model, *sets, **options)
    assert found.tries[0].steps == 1
    assert_as_before(model, before)
    assert all(layer.delta is held[name] for name, layer in attached_layers(model).items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_put_back_when_a_try_is_interrupted(memorized, error):  # noqa: F811
    model, examples = memorized
    before = state(model)

    def interrupt(stage, done, total, note=""):
        if done == 3:
            raise error

    sets, options = some(examples)
    with pytest.raises(error):
        recommend(model, *sets, **options, progress=interrupt)
    assert_as_before(model, before)


def test_one_try_is_made_in_no_time_and_the_answer_says_that_it_is_none(memorized):  # noqa: F811
    model, examples = memorized
    sets, options = some(examples, MOMENT)
    found = recommend(model, *sets, **options)
    (only,) = found.tries
    assert (only.steps, only.reached, only.note) == (1, False, "its time was over")
    assert found.expected_steps is found.expected_minutes is None
    assert found.config == EASY.updated(max_steps=EASY.max_steps)
    assert "No try reached the target of 0.5" in found.reason and "Give the pilot more minutes." in found.reason


def test_the_time_is_kept(memorized):  # noqa: F811
    model, examples = memorized
    sets, options = some(examples, 0.02, EASY.updated(forget_target=0.001))
    started = time.perf_counter()
    found = recommend(model, *sets, **options)
    # One step and the measurement after it may have begun.
    longest = max(each.seconds_per_step for each in found.tries)
    assert time.perf_counter() - started < 1.2 + 20 * longest + 0.5
    assert "The time was over before all was tried." in found.reason


def fail(times, error, monkeypatch):
    """Let the first runs fail after they have changed the model."""
    calls = []

    def failing(model, forget, retain, *, config, **options):
        calls.append(config)
        done = unlearn(model, forget, retain, config=config.updated(max_steps=1), **options)
        if len(calls) <= times:
            raise error
        return done

    monkeypatch.setattr(pilot, "unlearn", failing)
    return calls


@pytest.mark.usefixtures("few")
def test_after_a_loss_that_is_not_finite_shorter_steps_are_tried(memorized, monkeypatch):  # noqa: F811
    model, examples = memorized
    before = state(model)
    calls = fail(1, NonFiniteLossError("The loss is nan."), monkeypatch)
    sets, options = some(examples)
    found = recommend(model, *sets, **options)
    assert_as_before(model, before)
    assert calls[1].lr == EASY.lr / 4 and found.tries[0].failed and not found.tries[1].failed
    assert found.tries[0].note == "The loss is nan."


def test_what_is_wrong_with_every_try_is_raised(memorized, monkeypatch):  # noqa: F811
    model, examples = memorized
    before = state(model)
    calls = fail(99, NonFiniteLossError("The loss is nan."), monkeypatch)
    sets, options = some(examples)
    with pytest.raises(NonFiniteLossError, match="The loss is nan"):
        recommend(model, *sets, **options)
    assert len(calls) == 3
    assert_as_before(model, before)


def test_what_is_wrong_with_the_given_configuration_is_raised_at_once(memorized):  # noqa: F811
    model, examples = memorized
    sets, options = some(examples, config=EASY.updated(layers="nothing"))
    with pytest.raises(ValueError, match="nothing"):
        recommend(model, *sets, **options)


def test_weights_that_give_no_number_count_as_a_failure(memorized, monkeypatch):  # noqa: F811
    model, examples = memorized

    def breaking(model, *_, **__):
        model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))

    monkeypatch.setattr(pilot, "unlearn", breaking)
    sets, options = some(examples)
    with pytest.raises(NonFiniteLossError, match="The probability of row .* is nan, expected a finite number"):
        recommend(model, *sets, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, r"minutes is 0, expected a finite number in \(0, inf\)"),
        ({"forget": []}, "The forget set is empty, expected at least one example"),
        ({"retain": []}, "The retain set is empty"),
        ({"config": EASY.updated(forget_target=None)}, "forget_target is None, expected a probability"),
        (
            {"config": EASY.updated(forget_target=1.0)},
            "The mean forget probability is 0.9.* before anything is forgotten, expected more than the target of 1.0",
        ),
    ],
)
def test_what_cannot_be_tried_is_refused(memorized, changes, message):  # noqa: F811
    model, examples = memorized
    before = state(model)
    sets, options = some(examples, **changes)
    with pytest.raises(ValueError, match=message):
        recommend(model, *sets, **options)
    assert_as_before(model, before)


@pytest.mark.parametrize(
    ("count", "most", "left"), [(1, 9, (1, 1)), (3, 9, (2, 1)), (40, 99, (30, 10)), (40, 12, (9, 3))]
)
def test_a_quarter_of_the_retain_rows_is_in_no_batch(count, most, left):
    rows = list(range(count))
    found = pilot_rows(rows, rows, seed=3, most=most)
    assert (len(found.retain), len(found.held_out)) == left
    assert len(found.forget) == min(count, most) and set(found.forget) <= set(rows)
    assert count == 1 or not set(found.retain) & set(found.held_out)
    assert found == pilot_rows(rows, rows, seed=3, most=most)
    if count == 40:
        assert found.held_out != pilot_rows(rows, rows, seed=4, most=most).held_out
        assert max(found.forget) >= 36 and min(found.forget) == 0


def test_what_is_expected_of_all_rows_grows_with_them():
    some_rows, all_rows = (Sizes(40, part, 9, 3, start=0.9, row_seconds=0.5) for part in (10, 40))
    paced = made(config=UnlearnConfig(), steps=50, seconds=104.0, attribution_seconds=4.0)
    assert expected(paced, all_rows) == (50, 104.0)
    assert expected(paced, some_rows) == (50, 16.0 + 50 * (2.0 + 30 * 0.5))
    fixed = made(config=UnlearnConfig(paced=False), steps=50, seconds=104.0, attribution_seconds=4.0)
    assert expected(fixed, some_rows) == (200, 16.0 + 200 * 17.0)


def test_the_reason_names_the_best_and_the_next_and_what_was_not_tried():
    sizes = Sizes(40, 10, 9, 3, start=0.9, row_seconds=0.0)
    tries = [made(name="as given", kept=0.8), made(name="--lr 0.01", kept=0.9234, probability=0.0987, steps=30)]
    found = recommended(UnlearnConfig(), tries, sizes, complete=False)
    assert found.best is tries[1] and found.config.max_steps == 60
    for said in (
        "`--lr 0.01` reaches a mean forget probability of 0.099 (target 0.1) in 30 steps and keeps 92.3% of",
        "of 3 retain rows that it did not train on.",
        "Next is the configuration as given, which keeps 80.0%",
        "On all 40 forget rows expect about 30 steps and",
        "The time was over before all was tried.",
        "It was tried on 10 of them",
    ):
        assert said in found.reason
    tied = [made(name="as given", kept=0.9, seconds=9.0), made(name="--lr 0.16", kept=0.895, seconds=5.0)]
    found = recommended(UnlearnConfig(), tied, sizes, complete=True)
    assert found.best is tied[1] and "As much keeps the configuration as given" in found.reason
