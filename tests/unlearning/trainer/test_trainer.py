"""A Trainer makes the steps of a plain loop, however they are split, broken off or wrapped."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from tests.unlearning.trainer.trainer_runs import (
    FORGET,
    OPTIONS,
    RETAIN,
    SEED,
    STEPS,
    assert_same,
    make_model,
    make_refresh,
    make_selection,
    make_trainer,
    plain_loop,
)
from tests.unlearning.trainer.two_processes import run_two_processes
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import collate
from torch_simu.unlearning.data.pairs import ForgetRetainPairs, PairCollator
from torch_simu.unlearning.objectives import GradDiff, Term, mean_answer_nll
from torch_simu.unlearning.refresh import find_simu_optimizer
from torch_simu.unlearning.trainer.trainer import SIMUOptimizerFactory


@pytest.fixture(scope="module")
def expected():
    """The model and the optimizer behind the plain loop."""
    model = make_model()
    return model, plain_loop(model)


@pytest.mark.parametrize("attention", ["frozen", "full"])
def test_a_trainer_makes_the_steps_of_a_plain_loop(tmp_path, expected, attention):
    model, wanted = make_model(), expected
    if attention == "full":
        wanted = (twin := make_model(), plain_loop(twin, attention))
    trainer = make_trainer(model, tmp_path, attention=attention)
    trainer.train()
    assert_same(model, trainer.optimizer, *wanted)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_a_step_in_micro_batches_is_the_same_step(tmp_path, expected, micro_batch):
    model = make_model()
    # In threes, the pass over 4 pairs ends with a micro-batch of one: the counts differ, and so do the weights.
    pairs = ForgetRetainPairs(FORGET, RETAIN, seed=SEED, num_pairs=4) if micro_batch == 3 else None
    arguments = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": -(-4 // micro_batch)}
    if micro_batch == 3:
        arguments["max_steps"] = 1
        twin = make_model()
        expected = twin, plain_loop(twin, steps=1)
    trainer = make_trainer(model, tmp_path, pairs=pairs, **arguments)
    trainer.train()
    assert_same(model, trainer.optimizer, *expected)


class MeanOverPairs:
    """An objective whose loss is a mean over rows, each of them a mean over its tokens."""

    def terms(self, model, forget, retain):
        rows = [{name: value[i : i + 1] for name, value in forget.items()} for i in range(len(forget["labels"]))]
        yield Term("forget", -1.0, torch.stack([mean_answer_nll(model, row) for row in rows]).mean())


def test_a_mean_over_rows_is_the_same_in_micro_batches(tmp_path):
    models = [make_model() for _ in range(2)]
    for model, size in zip(models, (4, 2), strict=True):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 2}
        make_trainer(model, tmp_path, objective=MeanOverPairs(), **arguments).train()
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_step(tmp_path, expected, use_reentrant):
    model, calls = make_model(), []
    # Before it, since the recomputation ends as soon as nothing more is needed.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    arguments = {"activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = make_trainer(model, tmp_path, activation_checkpointing=True, **arguments)
    trainer.train()
    # Twice for each forward pass: two of the objective per step, and one of each of three refreshes.
    assert len(calls) == 2 * (2 * STEPS + 3)
    assert_same(model, trainer.optimizer, *expected)


@pytest.mark.parametrize("strategy", ["sequential", "random"])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, strategy, stop):
    # Passes of three steps: the checkpoints lie behind a refresh, between two, and in the second pass.
    pairs = ForgetRetainPairs(FORGET, RETAIN, seed=SEED, num_pairs=6)
    arguments = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "train_sampling_strategy": strategy,
        "pairs": pairs,
    }
    whole = make_model()
    unbroken = make_trainer(whole, tmp_path, **arguments)
    unbroken.train()
    resumed = make_model()
    trainer = make_trainer(resumed, tmp_path, **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert trainer.state.global_step == STEPS
    assert_same(resumed, trainer.optimizer, whole, unbroken.optimizer, exact=True)


def test_unselected_weights_are_bit_identical(tmp_path):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    selection = make_selection(model)
    make_trainer(model, tmp_path).train()
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        changed = (value != before[name]).flatten(1).any(dim=0) if value.dim() > 1 else value != before[name]
        assert torch.equal(changed, selection.mask(layer) if layer in selection else torch.zeros_like(changed))


class Recorder(TrainerCallback):
    """What is true when a step is over: whether the curvature is still due, and which gradients are left."""

    def __init__(self):
        self.due, self.curvature, self.gradients = [], [], 0

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.due.append(find_simu_optimizer(optimizer).hessian_due)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        assert not find_simu_optimizer(optimizer).hessian_due
        self.gradients += sum(param.grad is not None for param in model.parameters())
        self.curvature.append([entry["hessian"].clone() for entry in find_simu_optimizer(optimizer).state.values()])


def test_the_curvature_is_refreshed_at_the_due_steps_and_no_others(tmp_path):
    recorder = Recorder()
    make_trainer(make_model(), tmp_path, [recorder]).train()
    assert recorder.due == [True, False, True, False, True] and recorder.gradients == 0
    changed = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(recorder.curvature, recorder.curvature[1:], strict=False)
    ]
    assert changed == [False, True, False, True]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_accelerate_loop_makes_the_steps_of_a_plain_loop(expected, accumulation):
    model, refresh = make_model(), make_refresh()
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, "frozen"), **OPTIONS)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        for half in range(accumulation):
            with accelerator.accumulate(model):
                # The whole batch in each part: the gradient is its own mean.
                whole = [Batches(*of).batch(step) for of in ((FORGET, 4, 3 * SEED), (RETAIN, 4, 3 * SEED + 1))]
                accelerator.backward(sum(t.weight * t.loss for t in GradDiff(2.0).terms(model, *whole)))
                optimizer.step()
                optimizer.zero_grad()
                # Called in between, too: it is due only behind a step that was made.
                done = refresh.after_step(model, optimizer, step)
                assert done == (half + 1 == accumulation and step % 2 == 0)
    assert_same(model, optimizer, *expected)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path, expected):
    model, optimizer = expected
    wanted = {name: value for name, value in model.state_dict().items() if "down_proj" in name}
    for found in run_two_processes(tmp_path, "gnb"):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)
        for number, entry in enumerate(optimizer.state.values()):
            torch.testing.assert_close(found[f"hessian{number}"], entry["hessian"], rtol=1e-7, atol=1e-9)


def test_an_evaluation_reports_the_mean_loss_of_plain_rows(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=9)
    loss = trainer.evaluate(RETAIN)["eval_loss"]
    assert loss == pytest.approx(mean_answer_nll(model, collate(RETAIN, 0)).item(), rel=1e-5)


def test_a_trainer_without_the_optimizer_is_refused_before_a_step(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 1.0})
    before = model.lm_head.weight.clone()
    with pytest.raises(TypeError, match="The optimizer is AcceleratedOptimizer, expected a SIMUOptimizer. Pass"):
        trainer.train()
    assert torch.equal(model.lm_head.weight, before)


def test_the_callback_works_in_an_ordinary_trainer(tmp_path):
    model, recorder = make_model(), Recorder()
    trainer = Trainer(
        model,
        make_trainer(make_model(), tmp_path).args,
        train_dataset=RETAIN,
        data_collator=PairCollator(),
        optimizer_cls_and_kwargs=(SIMUOptimizerFactory, {"selection": make_selection(model), **OPTIONS}),
        callbacks=[make_refresh(), recorder],
    )
    trainer.train()
    assert recorder.due == [True, False, True, False, True]


def test_training_on_rows_that_are_no_pairs_is_refused(tmp_path):
    trainer = make_trainer(make_model(), tmp_path, pairs=RETAIN)
    with pytest.raises(ValueError, match="The training batch holds 'input_ids', 'labels', 'attention_mask', expected"):
        trainer.train()


def test_the_factory_refuses_a_selection_of_another_model():
    selection = NeuronSelection({"down": [1]}, {"down": 5})
    with pytest.raises(ValueError, match="Layer 'down' has 4 neurons, the selection counts 5"):
        SIMUOptimizerFactory()(nn.ModuleDict({"down": nn.Linear(4, 2)}), selection=selection, attention="frozen")
