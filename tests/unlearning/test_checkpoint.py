"""A run goes on from its folder to the same log, and a folder without anything of a run is in nobody's way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from torch_simu import NeuronSelection
from torch_simu._files import load_tensors, save_tensors
from torch_simu.unlearning.checkpoint import RunCheckpoint, saved_steps
from torch_simu.unlearning.report.runs import how_to_go_on

LOG = [{"step": 1, "loss": 0.5, "forget": -1.0}, {"step": 2, "monitor": {"world": {"em": 1.0}, "retain": {"em": 0.5}}}]


def saved(folder: Path) -> tuple[RunCheckpoint, dict[str, nn.Parameter], torch.optim.Optimizer]:
    """The checkpoint of a run of two steps."""
    params = {"weight": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.SGD(params.values())
    checkpoint = RunCheckpoint.open(folder, "a" * 64)
    checkpoint.save(params, optimizer, LOG)
    return checkpoint, params, optimizer


@pytest.mark.parametrize("earlier", [False, True])
def test_the_log_of_a_run_comes_back_as_it_was(earlier: bool, tmp_path: Path) -> None:
    checkpoint, params, optimizer = saved(tmp_path)
    if earlier:
        # As a part of the header, whose keys are sorted.
        tensors, header = load_tensors(tmp_path / "run.safetensors", "UnlearningRun")
        save_tensors(
            tmp_path / "run.safetensors", "UnlearningRun", tensors, {"counters": header["counters"], "log": LOG}
        )
    log = checkpoint.load(params, optimizer)
    assert log == LOG and saved_steps(tmp_path) == 2
    if not earlier:
        assert [list(record) for record in log] == [list(record) for record in LOG]
        assert list(log[1]["monitor"]) == ["world", "retain"]


def test_another_run_may_begin_where_nothing_is_saved_and_nowhere_else(tmp_path: Path) -> None:
    RunCheckpoint.open(tmp_path, "b" * 64)
    saved(tmp_path)
    with pytest.raises(ValueError, match="belongs to another run"):
        RunCheckpoint.open(tmp_path, "b" * 64)


def test_what_is_saved_of_a_run_says_where_it_goes_on(tmp_path: Path) -> None:
    RunCheckpoint.open(tmp_path, "a" * 64)
    assert how_to_go_on(tmp_path).endswith("it starts anew.")
    (tmp_path / "attribution.retain").touch()
    assert how_to_go_on(tmp_path).endswith("to go on within the attribution.")
    NeuronSelection({"a": [1]}, {"a": 2}).save(tmp_path / "selection.safetensors")
    assert how_to_go_on(tmp_path).endswith("to go on after the attribution.")
    saved(tmp_path)
    assert how_to_go_on(tmp_path).endswith("to go on after step 2.")
    (tmp_path / "run.safetensors").write_bytes(b"damaged")
    assert saved_steps(tmp_path) == 0
    assert how_to_go_on(None).endswith("it starts anew.")
