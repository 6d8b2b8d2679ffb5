"""A run that was stopped, killed or refused goes on bit for bit, and no other run goes on in its place."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unlearning.test_driver import FAST, LAST, _memorized, run
from torch_simu.unlearning.config import METHODS
from torch_simu.unlearning.objectives import Term, mean_answer_nll
from torch_simu.unlearning.steps import NonFiniteLossError


@pytest.fixture
def memorized():
    """A tiny model that memorized fiction, and its encoded sets; a copy, so that tests may change it."""
    model, examples = _memorized()
    return copy.deepcopy(model), examples


class Stopped(Exception):
    """Raised by a progress callback, to break a run at a step."""


def stop_at(stage, step):
    def tell(name, done, total, note=""):
        if name == stage and done >= step:
            raise Stopped

    return tell


@pytest.mark.parametrize("method", ["simu_graddiff", "fo_graddiff"])
@pytest.mark.parametrize(("stage", "step"), [("unlearn", 3), ("unlearn", 5), ("attribute retain", 1)])
def test_a_broken_run_continues_bit_for_bit(memorized, tmp_path, method, stage, step):
    model, examples = memorized
    config = FAST.updated(method=method, max_steps=8, checkpoint_interval=2)
    whole, broken = copy.deepcopy(model), copy.deepcopy(model)
    expected = run(whole, examples, config)
    if not (stage.startswith("attribute") and method == "fo_graddiff"):
        with pytest.raises(Stopped):
            run(broken, examples, config, checkpoint=tmp_path / "run", progress=stop_at(stage, step))
    resumed = copy.deepcopy(model)
    done = run(resumed, examples, config, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert done.log == expected.log and done.changed_share == expected.changed_share


class Plugin:
    """An objective whose repr is its address, and that of what it is made of."""

    def __init__(self, loss):
        self.loss = loss

    def terms(self, model, forget, retain):
        yield Term("forget", -1.0, self.loss(mean_answer_nll(model, forget)), "forget tokens")


class Scaled:
    """What is called, with a parameter."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, nll):
        return self.factor * nll


PLUGINS = {
    "lambda": lambda factor: Plugin(lambda nll: factor * nll),
    "partial": lambda factor: Plugin(functools.partial(torch.mul, factor)),
    "object": lambda factor: Plugin(Scaled(factor)),
}


@pytest.mark.parametrize("make", PLUGINS.values(), ids=PLUGINS)
def test_a_run_of_a_plug_in_objective_continues_bit_for_bit_and_another_one_is_refused(memorized, tmp_path, make):
    model, examples = memorized
    config = FAST.updated(max_steps=4, checkpoint_interval=2)
    whole, broken, resumed = (copy.deepcopy(model) for _ in range(3))
    run(whole, examples, config, objective=make(2.0))
    with pytest.raises(Stopped):
        run(broken, examples, config, objective=make(2.0), checkpoint=tmp_path / "run", progress=stop_at("unlearn", 3))
    with pytest.raises(ValueError, match="belongs to another run"):
        run(copy.deepcopy(model), examples, config, objective=make(3.0), checkpoint=tmp_path / "run")
    run(resumed, examples, config, objective=make(2.0), checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_killed_process_continues_bit_for_bit(memorized, tmp_path):
    model, examples = memorized
    model.save_pretrained(tmp_path / "model")
    rows = {name: [[row.input_ids, row.labels] for row in part] for name, part in examples.items()}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    script = Path(__file__).with_name("killed_run.py")
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": root}
    killed = subprocess.run([*command, "3"], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([*command, "0"], env=environment, check=True)
    found = type(model).from_pretrained(tmp_path / "result")
    expected = copy.deepcopy(model)
    run(expected, examples, FAST.updated(checkpoint_interval=1))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_a_checkpoint_of_another_run_is_refused(memorized, tmp_path):
    model, examples = memorized
    run(copy.deepcopy(model), examples, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to another run"):
        run(copy.deepcopy(model), examples, FAST.updated(seed=5), checkpoint=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run(copy.deepcopy(model), examples, checkpoint=tmp_path / "other")


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_stops_before_a_weight_changes_and_the_run_goes_on(memorized, tmp_path, method):
    model, examples = memorized
    config = FAST.updated(method=method, max_steps=5, checkpoint_interval=2)
    whole, stopped, short, resumed = (copy.deepcopy(model) for _ in range(4))
    expected = run(whole, examples, config)
    run(short, examples, config.updated(max_steps=3))
    name = "model.layers.1.self_attn.o_proj.weight" if method == "attention_only" else LAST
    broken = False

    def break_it(gradient):
        # An overflow: the loss stays finite.
        return gradient.index_fill(1, torch.arange(gradient.shape[1]), float("inf")) if broken else gradient

    def tell(stage, done, total, note=""):
        nonlocal broken
        broken = stage == "unlearn" and done == 3

    stopped.get_parameter(name).register_hook(break_it)
    message = re.escape(f"The gradient of step 4 is not finite in parameter {name!r}, expected finite numbers")
    with pytest.raises(NonFiniteLossError, match=message):
        run(stopped, examples, config, checkpoint=tmp_path / "run", progress=tell)
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), stopped.parameters(), strict=True))
    assert not torch.equal(short.get_parameter(name), model.get_parameter(name))
    done = run(resumed, examples, config, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert done.log == expected.log
