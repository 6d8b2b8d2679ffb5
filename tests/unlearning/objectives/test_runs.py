"""Every objective runs by its name: in the driver, in a Trainer, in a loop of one's own and on the command line."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models import tiny
from tests.unlearning.test_driver import FAST, _memorized, run
from tests.unlearning.trainer.test_driver_and_trainer import CONFIG
from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, make_model, make_selection, make_trainer
from tests.unlearning.trainer.whitened_runs import largest_difference
from torch_simu import SIMUOptimizer
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import Example, collate
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import OBJECTIVES, REFUSING, make_objective
from torch_simu.unlearning.trainer.gradients import StepGradients

REFUSALS = [(5, 6, 2), (7, 2)]


def refusals_for(name):
    return REFUSALS if name in REFUSING else None


def mean_probability(model, examples):
    scores = score_answers(model, examples, batch_size=8, pad_id=0)["probability"]
    return sum(scores) / len(scores)


@pytest.fixture
def memorized():
    model, examples = _memorized()
    return copy.deepcopy(model), examples


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_few_balanced_steps_of_a_run_forget(memorized, name):
    model, examples = memorized
    before = mean_probability(model, examples["forget"])
    config = FAST.updated(method="all_neurons", objective=name, balance=True, max_steps=8)
    done = run(model, examples, config, refusals=refusals_for(name))
    assert done.log[-1]["forget_probability"] < before - 0.05


def test_a_whitened_run_moves_no_layer_that_the_objective_does_not_reach(memorized):
    model, examples = memorized
    weights = [layer.mlp.down_proj.weight.detach().clone() for layer in model.model.layers]
    run(model, examples, UnlearnConfig(objective="rmu", max_steps=2))
    moved = [
        not torch.equal(layer.mlp.down_proj.weight, w) for layer, w in zip(model.model.layers, weights, strict=True)
    ]
    assert moved == [True, False]


def test_a_run_without_refusals_is_refused_before_anything_changes(memorized):
    model, examples = memorized
    with pytest.raises(ValueError, match=r"refusals is None, .*encode_refusals\(tokenizer\)"):
        run(model, examples, FAST.updated(method="all_neurons", objective="idk"))


def test_refusals_that_do_not_fit_the_model_are_refused_with_the_row():
    model = tiny("gpt2", n_positions=5)
    row = Example((5, 6, 7, 8), (-100, -100, -100, 8), "rows.jsonl:3")
    config = FAST.updated(method="all_neurons", objective="idk")
    with pytest.raises(DataError, match="rows.jsonl:3 with a refusal: the row takes 6 tokens and the model has 5"):
        unlearn(model, [row], [row], config=config, refusals=REFUSALS)


@pytest.mark.parametrize("changed", [None, [(5, 6, 2), (7, 3)]])
def test_a_checkpoint_of_other_refusals_is_that_of_another_run(memorized, tmp_path, changed):
    model, examples = memorized
    twin = copy.deepcopy(model)
    config = FAST.updated(method="all_neurons", objective="idk", max_steps=1, checkpoint_interval=1)
    run(model, examples, config, refusals=REFUSALS, checkpoint=tmp_path / "run")
    again = {"config": config.updated(max_steps=2), "checkpoint": tmp_path / "run"}
    if changed is None:
        assert run(twin, examples, refusals=[list(each) for each in REFUSALS], **again).steps == 2
        return
    with pytest.raises(ValueError, match="belongs to another run"):
        run(twin, examples, refusals=changed, **again)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loop_of_ones_own_balances_the_forget_term_against_the_others(memorized, name):
    model, examples = memorized
    optimizer = SIMUOptimizer(model.parameters(), lr=3e-3)
    objective = make_objective(name, model=model, refusals=refusals_for(name))
    batches = [collate(examples[each], 0) for each in ("forget", "retain")]
    before = mean_probability(model, examples["forget"])
    with StepGradients(model, optimizer, balance=True) as gradients:
        for _ in range(4):
            optimizer.zero_grad()
            found = gradients.add(objective.terms(model, *batches))
            optimizer.step()
    assert next(iter(found)) == "forget" and mean_probability(model, examples["forget"]) < before - 0.05


# One of each kind: its own start model, refusals under tokens or under pairs, a part of the layers only.
@pytest.mark.parametrize("name", ["undial", "jensun", "dpo", "rmu"])
def test_the_driver_and_a_trainer_in_micro_batches_make_the_same_steps(tmp_path, name):
    driven, trained, before = make_model(), make_model(), make_model()
    config = CONFIG.updated(objective=name, balance=True, max_steps=2)
    unlearn(driven, FORGET, RETAIN, config=config, selection=make_selection(driven), refusals=refusals_for(name))
    objective = make_objective(name, model=trained, refusals=refusals_for(name))
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    make_trainer(
        trained, tmp_path, objective=objective, balance=True, options={"state_dtype": torch.float32}, **arguments
    ).train()
    assert largest_difference(driven, trained) < 1e-6 < 1e-3 < largest_difference(driven, before)
