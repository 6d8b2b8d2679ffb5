"""Law 10: two processes give the result of one, and their checkpoints load in any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.distributed import distributed_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two processes have run every scenario; the folder they wrote to, and what went wrong."""
    folder = tmp_path_factory.mktemp("two")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.distributed_run", str(folder)],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
    return folder, [json.loads((folder / f"outcomes{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in distributed_run.SCENARIOS])
def test_two_processes(run, scenario):
    _, outcomes = run
    wrong = [each[scenario] for each in outcomes]
    assert wrong == ["", ""], "\n".join(wrong)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_loads_in_one(run):
    folder, _ = run
    model = distributed_run.make_model(seed=1)
    optimizer = distributed_run.make_optimizer(model)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, checkpoint_id=folder / "two", no_dist=True)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    expected, theirs = distributed_run.one_process(3)
    distributed_run.assert_same(model, optimizer, expected, theirs)
    for each in ((model, optimizer), (expected, theirs)):
        distributed_run.train(*each, 3, 5)
    distributed_run.assert_same(model, optimizer, expected, theirs)
    assert torch.equal(model[0].bias, expected[0].bias)
