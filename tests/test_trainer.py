"""A Trainer makes the steps of a plain loop, however they are split, broken off or wrapped."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.models import tiny
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.data import Batches, Example, collate
from torch_simu.unlearning.objectives import GradDiff, Term, mean_answer_nll
from torch_simu.unlearning.pairs import ForgetRetainPairs, Pair, PairCollator
from torch_simu.unlearning.refresh import CurvatureRefresh, find_simu_optimizer
from torch_simu.unlearning.trainer import SIMUOptimizerFactory, UnlearningTrainer

OPTIONS = {"lr": 1e-2, "rho": 0.5, "hessian_interval": 2, "weight_decay": 0.1, "state_dtype": torch.float64}
STEPS = 5
SEED = 3


def some_rows(count, seed):
    """Rows of several lengths, so that micro-batches differ in padding and in scored tokens."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = ([draw.randrange(3, 97) for _ in range(draw.randint(1, most))] for most in (4, 7))
        rows.append(Example((*prompt, *answer), (-100,) * len(prompt) + tuple(answer)))
    return rows


FORGET, RETAIN = some_rows(6, 0), some_rows(9, 1)


def make_model():
    """A model in float64, where a rounding error turns no sign of a clipped step around."""
    return tiny("llama").double()


def make_selection(model):
    return NeuronSelection.random(model, 0.3, torch.Generator().manual_seed(0))


def make_refresh(retain=RETAIN, **options):
    return CurvatureRefresh(retain, **{"batch_size": 4, "seed": SEED, **options})


def make_trainer(model, folder, callbacks=(), objective=None, attention="frozen", pairs=None, **arguments):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    options = {"selection": make_selection(model), "attention": attention, **OPTIONS}
    return UnlearningTrainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        objective=objective or GradDiff(2.0),
        train_dataset=pairs or ForgetRetainPairs(FORGET, RETAIN, seed=SEED, num_pairs=4 * STEPS),
        optimizer_cls_and_kwargs=(SIMUOptimizerFactory, options),
        callbacks=[make_refresh(), *callbacks],
    )


def naive_refresh(model, optimizer, step):
    """One row at a time, unpadded; the gradient of the mean over all tokens."""
    rows = [RETAIN[i] for i in Batches(RETAIN, 4, 3 * SEED + 2).indices(step)]
    num_tokens = sum(row.num_scored for row in rows)
    for number, row in enumerate(rows):
        logits = model(torch.tensor([row.input_ids])).logits[0, -row.num_scored - 1 : -1]
        draw = torch.Generator().manual_seed(random.Random(f"{SEED} {step} {number}").getrandbits(63))
        sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        (functional.cross_entropy(logits, sampled, reduction="sum") / num_tokens).backward()
    optimizer.update_hessian(num_tokens)


def plain_loop(model, attention="frozen", steps=STEPS):
    """The loop that a Trainer stands for, with transformers' own loss."""
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, attention), **OPTIONS)
    for step in range(steps):
        batches = ((FORGET, 3 * SEED, -1.0), (RETAIN, 3 * SEED + 1, 2.0))
        for rows, seed, weight in batches:
            (weight * model(**Batches(rows, 4, seed).batch(step)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 2, 4):
            naive_refresh(model, optimizer, step)
            optimizer.zero_grad()
    return optimizer


def assert_same(model, optimizer, expected, expected_optimizer, exact=False):
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **tolerance)
    found, wanted = (find_simu_optimizer(o).state_dict() for o in (optimizer, expected_optimizer))
    scale = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(found["state"], wanted["state"], **scale)
    assert found["param_groups"] == wanted["param_groups"] or not exact


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
def test_gradient_checkpointing_changes_no_step(tmp_path, expected, use_reentrant):
    model = make_model()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = make_trainer(model, tmp_path, **options)
    trainer.train()
    assert model.is_gradient_checkpointing
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


def curvature(refresh, model=None, step=0, seed=0):
    """The curvature after one step of gradients that do not matter, and one refresh."""
    model = model or make_model()
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, "frozen"), **{**OPTIONS, "lr": 0.0})
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert refresh.after_step(model, optimizer, step) and not optimizer.hessian_due
    return torch.cat([entry["hessian"].flatten() for entry in optimizer.state.values()])


def test_the_labels_of_a_refresh_are_sampled_from_the_model():
    expected = curvature(make_refresh())
    # Other labels at the same positions: they only say which positions count.
    relabeled = [Example(row.input_ids, tuple(min(label, 5) for label in row.labels)) for row in RETAIN]
    assert torch.equal(curvature(make_refresh(relabeled)), expected)
    # Other draws, by seed or step; the batch has all rows, so that nothing else differs.
    draws = [curvature(make_refresh(batch_size=9, seed=seed), step=step) for seed, step in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_a_refresh_in_micro_batches_is_the_same(micro_batch_size):
    found = curvature(make_refresh(micro_batch_size=micro_batch_size))
    torch.testing.assert_close(found, curvature(make_refresh()), rtol=1e-9, atol=0)


def test_a_refresh_leaves_gradients_and_the_shared_randomness_as_they_were():
    model = make_model()
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, "frozen"), **OPTIONS)
    model(**collate(RETAIN[:2], 0)).loss.backward()
    optimizer.step()
    before = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    copies, state = {name: grad.clone() for name, grad in before.items()}, torch.get_rng_state()
    assert make_refresh().after_step(model, optimizer, 0)
    for name, param in model.named_parameters():
        assert param.grad is before.get(name) and (param.grad is None or torch.equal(param.grad, copies[name]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_accelerate_loop_makes_the_steps_of_a_plain_loop(expected, accumulation):
    model, refresh = make_model(), make_refresh()
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, "frozen"), **OPTIONS)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        for half in range(accumulation):
            with accelerator.accumulate(model):
                rows, seeds = (FORGET, RETAIN), (3 * SEED, 3 * SEED + 1)
                forget, retain = (Batches(*of, 0).indices(step) for of in zip(rows, (4, 4), seeds, strict=True))
                del forget, retain
                whole = [Batches(r, 4, s).batch(step) for r, s in zip(rows, seeds, strict=True)]
                loss = sum(t.weight * t.loss for t in GradDiff(2.0).terms(model, *whole))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                # Called in between, too: it is due only behind a step that was made.
                done = refresh.after_step(model, optimizer, step)
                assert done == (half + 1 == accumulation and step % 2 == 0)
    assert_same(model, optimizer, *expected)


def test_the_scale_of_a_grad_scaler_is_taken_out_of_the_curvature():
    class Wrapped(torch.optim.SGD):
        def __init__(self, optimizer):
            self.optimizer, self.scaler = optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Scaled(CurvatureRefresh):
        def after_step(self, model, optimizer, step):
            wrapped = Wrapped(optimizer)
            done = super().after_step(model, wrapped, step)
            # Nothing was unscaled through it, so the next step may do so.
            assert not wrapped.scaler._per_optimizer_states
            return done

    found = curvature(Scaled(RETAIN, batch_size=4, seed=SEED))
    assert torch.equal(found, curvature(make_refresh()))


def test_two_processes_make_the_steps_of_one(tmp_path, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, root = Path(__file__).with_name("two_processes.py"), str(Path(__file__).parent.parent)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": root}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    model, optimizer = expected
    wanted = {name: value for name, value in model.state_dict().items() if "down_proj" in name}
    for rank in range(2):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)
        for number, entry in enumerate(optimizer.state.values()):
            torch.testing.assert_close(found[f"hessian{number}"], entry["hessian"], rtol=1e-7, atol=1e-9)


def test_pairs_in_order_are_the_batches_of_both_sets():
    pairs = ForgetRetainPairs(FORGET, RETAIN, seed=SEED, num_pairs=40)
    for step in range(10):
        batch = PairCollator()([pairs[index] for index in range(4 * step, 4 * step + 4)])
        for name, rows, seed in (("forget", FORGET, 3 * SEED), ("retain", RETAIN, 3 * SEED + 1)):
            torch.testing.assert_close(batch[name], Batches(rows, 4, seed).batch(step))


def test_a_pair_depends_on_the_seed_and_the_index_alone():
    pairs = ForgetRetainPairs(FORGET, RETAIN, num_pairs=30)
    forward = list(pairs)
    assert len(forward) == 30 and [pairs[index] for index in reversed(range(30))] == forward[::-1]
    assert list(ForgetRetainPairs(FORGET, RETAIN, num_pairs=30, seed=1)) != forward
    default = ForgetRetainPairs(FORGET, RETAIN)
    assert {pair.retain for pair in default} == set(RETAIN) and {pair.forget for pair in default} == set(FORGET)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_refresh([]), "The retain set is empty, expected at least one example"),
        (lambda: make_refresh([Example((5, 6), (5, -100))]), "Retain example 0 has no scored token"),
        (lambda: make_refresh(batch_size=0), "batch_size is 0"),
        (lambda: make_refresh(micro_batch_size=0), "micro_batch_size is 0"),
        (lambda: ForgetRetainPairs([], RETAIN), "The forget set is empty, expected at least one example"),
        (lambda: ForgetRetainPairs(FORGET, []), "The retain set is empty, expected at least one example"),
        (lambda: ForgetRetainPairs(FORGET, RETAIN, num_pairs=0), "num_pairs is 0"),
        (lambda: ForgetRetainPairs(FORGET, RETAIN)[9], "index is 9, expected 0 <= index < 9"),
        (lambda: ForgetRetainPairs(FORGET, RETAIN)[-1], "index is -1"),
        (lambda: PairCollator()([{"labels": [1]}]), "The batch holds dict, expected Pair or Example"),
        (lambda: PairCollator()([Pair(*FORGET[:2]), FORGET[0]]), "The batch holds Example, Pair"),
        (lambda: find_simu_optimizer(None), "The optimizer is NoneType, expected a SIMUOptimizer"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        make()


def test_training_on_rows_that_are_no_pairs_is_refused(tmp_path):
    trainer = make_trainer(make_model(), tmp_path, pairs=RETAIN)
    with pytest.raises(ValueError, match="The training batch holds 'input_ids', 'labels', 'attention_mask', expected"):
        trainer.train()


def test_the_factory_refuses_a_selection_of_another_model():
    selection = NeuronSelection({"down": [1]}, {"down": 5})
    with pytest.raises(ValueError, match="Layer 'down' has 4 neurons, the selection counts 5"):
        SIMUOptimizerFactory()(nn.ModuleDict({"down": nn.Linear(4, 2)}), selection=selection, attention="frozen")
