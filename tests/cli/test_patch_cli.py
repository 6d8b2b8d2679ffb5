"""torch-simu patch does on checkpoints what NeuronPatch does on models, and says so in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.patch.test_patch import content, pair
from torch_simu.cli.app import main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["patch", *map(str, arguments)])
    return stopped.value.code


def test_a_patch_is_made_applied_verified_shown_and_taken_back(tmp_path: Path, capsys) -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    selection.save(tmp_path / "selection")
    patch = tmp_path / "patch"
    create = ("create", tmp_path / "base", tmp_path / "model", tmp_path / "selection", patch)
    assert run(*create) == 0
    assert "NeuronPatch(2 tensors, 16 of 160 neurons)" in capsys.readouterr().out
    assert run(*create) == 2
    assert "exists, expected a new file. Give another, or --force." in capsys.readouterr().err
    assert run(*create, "--force") == 0
    assert run("apply", patch, tmp_path / "base", tmp_path / "patched") == 0
    assert content(tmp_path / "patched") == content(tmp_path / "model")
    assert run("verify", patch, tmp_path / "base", tmp_path / "patched", "--out", tmp_path / "audit.json") == 0
    assert json.loads((tmp_path / "audit.json").read_text())["passed"]
    assert run("verify", patch, tmp_path / "base", tmp_path / "base") == 1
    assert "Not as the patch says" in capsys.readouterr().out
    assert run("show", patch) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj.weight" in shown and "8 of 80" in shown and "base: base" in shown
    assert run("revert", patch, tmp_path / "patched", tmp_path / "again") == 0
    assert content(tmp_path / "again") == content(tmp_path / "base")
    capsys.readouterr()
    assert run("apply", patch, tmp_path / "patched", tmp_path / "twice") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "The patch is applied already to tensor" in error
