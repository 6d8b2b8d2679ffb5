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


def test_nothing_but_an_earlier_result_is_replaced(tmp_path: Path, capsys) -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    selection.save(tmp_path / "selection")
    patch, weights = tmp_path / "patch", tmp_path / "base" / "model.safetensors"
    create = ("create", tmp_path / "base", tmp_path / "model", tmp_path / "selection")
    verify = ("verify", patch, tmp_path / "base", tmp_path / "model")
    assert run(*create, patch) == 0
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for taken in (weights, tmp_path / "base" / "config.json", tmp_path / "selection"):
        for arguments in ((*create, taken), (*verify, "--out", taken)):
            capsys.readouterr()
            assert run(*arguments) == 2
            assert "exists, expected a new file. Give another, or --force." in capsys.readouterr().err
            assert run(*arguments, "--force") == 2
            assert "exists and is no earlier result, expected a new file" in capsys.readouterr().err
    assert run(*verify, "--out", patch, "--force") == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    audit = tmp_path / "audit.json"
    assert run(*verify, "--out", audit) == 0 and run(*verify, "--out", audit) == 2
    assert run(*verify, "--out", audit, "--force") == 0
    for missing in (tmp_path / "none" / "file", tmp_path / "base"):
        assert run(*create, missing) == 2 and run(*verify, "--out", missing) == 2
