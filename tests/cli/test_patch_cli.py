"""torch-simu patch does on checkpoints what NeuronPatch does on models, and says so in one line."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.patch.test_checkpoints import content
from tests.patch.test_patch import pair
from torch_simu import NeuronPatch, __version__
from torch_simu._hashes import sha256_of_hashes
from torch_simu.cli.app import main
from torch_simu.cli.recording import tensor_hashes
from torch_simu.patch.change import Place, change_between


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
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["passed"] and [audit[part]["name"] for part in ("base", "model", "patch")] == [
        "base",
        "patched",
        "patch",
    ]
    assert audit["version"] == __version__ and datetime.fromisoformat(audit["date"]).tzinfo is not None
    for part, place in (("base", "base"), ("model", "patched")):
        hashes = tensor_hashes(AutoModelForCausalLM.from_pretrained(tmp_path / place))
        assert audit[part]["sha256"] == sha256_of_hashes(hashes)
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


def test_text_from_a_patch_is_shown_and_not_acted_on(tmp_path: Path, capsys, monkeypatch) -> None:
    """A file that others made names its tensors and its provenance as it likes."""
    monkeypatch.setenv("COLUMNS", "500")
    base, model = nn.Linear(4, 2), nn.Linear(4, 2)
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        model.weight[:, 1] += 1
    made = change_between("weight", base.weight, model.weight, Place(-1, torch.tensor([1])))
    assert made is not None
    evil = "[bold]x[/bold] [/] \x1b[2J\x1b]0;t\x07 \u202eflip \x9b31m a\nb\r\x00"
    NeuronPatch({evil.replace("/", "."): made}, {"base": evil, evil: 1}).save(tmp_path / "[red]p")
    assert run("show", tmp_path / "[red]p") == 0
    shown = capsys.readouterr().out
    assert "base: [bold]x[/bold] [/] \\x1b[2J\\x1b]0;t\\x07 \\u202eflip \\x9b31m a\\nb\\r\\x00\n" in shown
    assert not [each for each in shown if each != "\n" and not each.isprintable()]
    assert run("show", tmp_path / "[red]none\x1b[2J") == 2
    error = capsys.readouterr().err
    assert "[red]none\\x1b[2J" in error and error.count("\n") == 1 and "\x1b" not in error
