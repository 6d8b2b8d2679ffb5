"""Every objective runs by its name: in the driver, in a Trainer, in a loop of one's own and on the command line."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.unlearning.test_driver import FAST, _memorized, run
from tests.unlearning.trainer.test_driver_and_trainer import CONFIG
from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, make_model, make_selection, make_trainer
from tests.unlearning.trainer.whitened_runs import largest_difference
from torch_simu import SIMUOptimizer
from torch_simu.unlearning.data.examples import collate
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
