"""A balanced and whitened step is the same in a Trainer, in a loop of accelerate and by the formulas, however split."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.unlearning.trainer.trainer_runs import (
    FORGET,
    RETAIN,
    SEED,
    STEPS,
    assert_same,
    make_model,
    make_refresh,
)
from tests.unlearning.trainer.two_processes import run_two_processes
from tests.unlearning.trainer.whitened_runs import (
    RETAIN_WEIGHT,
    TOLERANCE,
    largest_difference,
    make_whitened_trainer,
    num_hooks,
    whitened_loop,
)
from torch_simu import SIMUOptimizer, register_neuron_hooks
from torch_simu.optimizer import GradientBalance
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.pairs import ForgetRetainPairs
from torch_simu.unlearning.differentiate import differentiate, retain_weight
from torch_simu.unlearning.objectives import GradDiff, Probability
from torch_simu.unlearning.trainer.covariances import CovarianceRefresh

CURVATURES = ("neurons", "both")


def test_covariances_of_the_forget_set_are_those_of_its_rows_alone(tmp_path, expected):
    model, wanted = make_model(), make_model()
    whitened_loop(wanted, "both", rows="forget")
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "covariance_of": "forget"}
    make_whitened_trainer(model, tmp_path, "both", **arguments).train()
    assert largest_difference(model, wanted) < TOLERANCE < 1e-2 * largest_difference(model, expected["both"])


@pytest.fixture(scope="module")
def expected():
    """Curvature -> the model behind the naive loop."""
    models = {curvature: make_model() for curvature in CURVATURES}
    for curvature, model in models.items():
        whitened_loop(model, curvature)
    return models


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_trainer_makes_the_steps_of_the_naive_loop_in_any_micro_batches(tmp_path, expected, curvature, micro_batch):
    model = make_model()
    arguments = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 4 // micro_batch}
    make_whitened_trainer(model, tmp_path, curvature, **arguments).train()
    assert largest_difference(model, expected[curvature]) < TOLERANCE < 1e-4 * largest_difference(model, make_model())


def test_a_last_micro_batch_of_fewer_pairs_counts_as_its_tokens_do(tmp_path):
    model, wanted = make_model(), make_model()
    whitened_loop(wanted, "both", steps=1)
    pairs = ForgetRetainPairs(FORGET, RETAIN, seed=SEED, num_pairs=4)
    arguments = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 1}
    make_whitened_trainer(model, tmp_path, "both", pairs=pairs, **arguments).train()
    assert largest_difference(model, wanted) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("curvature", CURVATURES)
def test_two_processes_with_micro_batches_make_the_steps_of_the_naive_loop(tmp_path, expected, curvature):
    wanted = {name: value for name, value in expected[curvature].state_dict().items() if "down_proj" in name}
    for found in run_two_processes(tmp_path, curvature):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def without_balance():
    """A Trainer that forgets to balance: both gradients go into one sum."""

    def forgets(terms, *, balance=None, **options):
        return differentiate(terms, **options)

    return (
        mock.patch("torch_simu.unlearning.trainer.gradients.differentiate", forgets),
        mock.patch.object(GradientBalance, "combine_", lambda self, **options: None),
    )


def on_all_rows():
    """A Trainer whose hooks record the retain rows, too."""

    def records(*arguments, recording, **options):
        return register_neuron_hooks(*arguments, **options)

    return (mock.patch("torch_simu.optimizer.curvature.hooking.register_neuron_hooks", records),)


def on_retain_rows():
    """A Trainer whose hooks record the retain rows instead of the forget rows."""
    return (*on_all_rows(), mock.patch.object(CovarianceRefresh, "forget", lambda self: self._hooks.pause()))


@pytest.mark.parametrize("mutant", [without_balance, on_all_rows, on_retain_rows])
def test_a_wrong_step_is_seen(tmp_path, expected, mutant):
    model = make_model()
    with ExitStack() as patches:
        for patch in mutant():
            patches.enter_context(patch)
        make_whitened_trainer(model, tmp_path, "both").train()
    assert largest_difference(model, expected["both"]) > 100 * TOLERANCE


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, stop):
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole, resumed = make_model(), make_model()
    unbroken = make_whitened_trainer(whole, tmp_path, "both", **arguments)
    unbroken.train()
    trainer = make_whitened_trainer(resumed, tmp_path, "both", **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert trainer.state.global_step == STEPS
    assert_same(resumed, trainer.optimizer, whole, unbroken.optimizer, exact=True)


class Watcher(TrainerCallback):
    """Counts hooks in each step, and breaks off a run."""

    def __init__(self, model, stop=None):
        self.model, self.stop, self.counts = model, stop, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.counts.append(num_hooks(self.model))
        if len(self.counts) == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [None, 2])
def test_a_trainer_leaves_no_hooks_even_when_it_is_broken_off(tmp_path, stop):
    model = make_model()
    watcher = Watcher(model, stop)
    trainer = make_whitened_trainer(model, tmp_path, "both", [watcher])
    if stop is None:
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    # On each of two layers, in front and behind.
    assert watcher.counts == [4] * (stop or STEPS) and num_hooks(model) == 0


class OutOfMemory(TrainerCallback):
    """Fails once, between the micro-batches of the first step."""

    def __init__(self, model):
        self.model, self.failed, self.counts = model, False, []

    def on_substep_end(self, args, state, control, **kwargs):
        self.counts.append(num_hooks(self.model))
        if not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")


def test_a_run_that_starts_again_with_smaller_batches_is_one_that_started_with_them(tmp_path):
    model, wanted = make_model(), make_model()
    memory = OutOfMemory(model)
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 2}
    again = {"per_device_train_batch_size": 2, "auto_find_batch_size": True}
    make_whitened_trainer(model, tmp_path, "both", [memory], **arguments, **again).train()
    make_whitened_trainer(wanted, tmp_path, "both", **arguments, per_device_train_batch_size=1).train()
    assert memory.counts == [4, 4, 4] and num_hooks(model) == 0
    assert largest_difference(model, wanted) == 0


def test_a_trainer_is_freed_as_soon_as_nothing_refers_to_it(tmp_path):
    trainer = make_whitened_trainer(make_model(), tmp_path, "both", max_steps=1)
    trainer.train()
    found = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert found() is None
    finally:
        gc.enable()


def test_the_cache_of_the_device_is_emptied_as_often_as_the_trainer_is_told(tmp_path):
    counts = []
    for every in (None, 2):
        with mock.patch("accelerate.utils.memory.clear_device_cache") as emptied:
            make_whitened_trainer(make_model(), tmp_path, "both", torch_empty_cache_steps=every).train()
        counts.append(emptied.call_count)
    # The Trainer itself empties it at the end of a run.
    assert counts[1] - counts[0] == 3


def test_one_graph_is_held_at_a_time(tmp_path):
    model, left = make_model(), []

    class Logged(GradDiff):
        def terms(self, model, forget, retain):
            for number, term in enumerate(super().terms(model, forget, retain)):
                if number:
                    left.append(any(param.grad is not None for param in model.parameters()))
                yield term

    make_whitened_trainer(model, tmp_path, "both", objective=Logged(2.0), balance=False, max_steps=2).train()
    assert left == [True, True]


def balanced_gradient(model):
    """The balanced gradient of the first step, by the functions that the driver steps with."""
    batches = [Batches(*of).batch(0) for of in ((FORGET, 4, 3 * SEED), (RETAIN, 4, 3 * SEED + 1))]
    balance = GradientBalance(torch.optim.SGD(model.parameters(), lr=1.0))
    found = differentiate(Probability(RETAIN_WEIGHT).terms(model, *batches), balance=balance)
    balance.combine_(retain_weight=retain_weight(found))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_any_optimizer_is_balanced_and_the_balanced_gradient_is_clipped(tmp_path, max_grad_norm):
    model, twin, before = make_model(), make_model(), make_model()
    balanced_gradient(twin)
    if max_grad_norm:
        assert nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm) > 10 * max_grad_norm
    trainer = make_whitened_trainer(model, tmp_path, "both", max_grad_norm=max_grad_norm, max_steps=1)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 1.0})
    trainer.train()
    for now, start, param in zip(model.parameters(), before.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(start - now, param.grad, rtol=1e-6, atol=1e-12)


def test_bfloat16_steps_are_near_those_of_full_precision(tmp_path):
    models = [make_model().float() for _ in range(3)]
    for model, options in zip(models, ({"bf16": True}, {"bf16": False}, {"balance": False}), strict=True):
        make_whitened_trainer(model, tmp_path, "both", options={"state_dtype": torch.float32}, **options).train()
    moved = largest_difference(models[1], make_model().float())
    assert 0 < largest_difference(models[0], models[1]) < 0.1 * moved < largest_difference(models[2], models[1])


def test_accumulation_under_fsdp2_is_refused_where_gradients_are_balanced(tmp_path):
    trainer = make_whitened_trainer(
        make_model(), tmp_path, "both", per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    # Of the step alone, because the rest of the run would look for shards.
    trainer.create_optimizer()
    sharded = mock.patch.object(type(trainer.accelerator), "is_fsdp2", True)
    with sharded, pytest.raises(ValueError, match="gradient_accumulation_steps=2 under FSDP2, expected grad"):
        trainer.training_step(trainer.model, {"forget": {}, "retain": {}})


def test_a_refresh_on_retain_rows_beside_covariances_is_refused(tmp_path):
    trainer = make_whitened_trainer(make_model(), tmp_path, "both", [make_refresh()])
    with pytest.raises(ValueError, match="'both', which retain rows do not refresh, expected 'gnb'. Leave the refresh"):
        trainer.train()


def test_groups_of_both_kinds_are_refreshed_side_by_side(tmp_path):
    model = make_model()
    trainer = make_whitened_trainer(model, tmp_path, "both", [make_refresh()])
    layers = model.requires_grad_(False).model.layers
    params = [layers[0].mlp.down_proj.weight.requires_grad_(True), layers[1].mlp.down_proj.weight.requires_grad_(True)]
    groups = [{"params": [params[0]], "curvature": "both"}, {"params": [params[1]]}]
    trainer.optimizer = SIMUOptimizer(groups, lr=1e-3, hessian_interval=2)
    trainer.train()
    state = trainer.optimizer.state
    assert "neuron_factor" in state[params[0]] and "hessian" not in state[params[0]]
    assert state[params[1]]["hessian"].any() and "neuron_factor" not in state[params[1]]
