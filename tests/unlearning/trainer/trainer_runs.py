"""Runs of a Trainer on a tiny model, and the naive loop that they must equal."""

from __future__ import annotations

import random

import torch
from torch.nn import functional
from transformers import TrainingArguments

from tests.devices.placing import here
from tests.models import tiny
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.pairs import ForgetRetainPairs
from torch_simu.unlearning.objectives import GradDiff
from torch_simu.unlearning.refresh import find_simu_optimizer
from torch_simu.unlearning.trainer.refresh import CurvatureRefresh
from torch_simu.unlearning.trainer.trainer import SIMUOptimizerFactory, UnlearningTrainer

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


def make_trainer(
    model,
    folder,
    callbacks=(),
    objective=None,
    attention="frozen",
    pairs=None,
    options=None,
    refresh_seed=SEED,
    balance=False,
    covariance_of="both",
    **arguments,
):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "use_cpu": here().type == "cpu",
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    options = {"selection": make_selection(model), "attention": attention, **OPTIONS, **(options or {})}
    # Covariances need no callback.
    refreshes = [] if options.get("curvature") in ("neurons", "both") else [make_refresh(seed=refresh_seed)]
    return UnlearningTrainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        objective=objective or GradDiff(2.0),
        train_dataset=pairs or ForgetRetainPairs(FORGET, RETAIN, seed=SEED, num_pairs=4 * STEPS),
        optimizer_cls_and_kwargs=(SIMUOptimizerFactory, options),
        callbacks=[*refreshes, *callbacks],
        balance=balance,
        covariance_of=covariance_of,
    )


def answer_logits_of(model, row):
    """The logits that predict the answer of one row."""
    return model(torch.tensor([row.input_ids])).logits[0, -row.num_scored - 1 : -1]


def naive_refresh(model, optimizer, step):
    """One row at a time, unpadded; the gradient of the mean over all tokens."""
    rows = [RETAIN[i] for i in Batches(RETAIN, 4, 3 * SEED + 2).indices(step)]
    num_tokens = sum(row.num_scored for row in rows)
    for number, row in enumerate(rows):
        logits = answer_logits_of(model, row)
        draw = torch.Generator(logits.device).manual_seed(random.Random(f"{SEED} {step} {number}").getrandbits(63))
        sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        (functional.cross_entropy(logits, sampled, reduction="sum") / num_tokens).backward()
    optimizer.update_hessian(num_tokens)


def plain_loop(model, attention="frozen", steps=STEPS):
    """The loop that a Trainer stands for: one row at a time, unpadded, each with the weight of its tokens."""
    optimizer = SIMUOptimizer(make_selection(model).param_groups(model, attention), **OPTIONS)
    for step in range(steps):
        batches = ((FORGET, 3 * SEED, -1.0), (RETAIN, 3 * SEED + 1, 2.0))
        for examples, seed, weight in batches:
            rows = [examples[i] for i in Batches(examples, 4, seed).indices(step)]
            for row in rows:
                nll = functional.cross_entropy(
                    answer_logits_of(model, row), torch.tensor(row.labels[-row.num_scored :])
                )
                (weight * nll * row.num_scored / sum(row.num_scored for row in rows)).backward()
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
