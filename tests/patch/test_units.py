"""A patch of units has rows beside columns, bit-exactly; without units rows that differ are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.models import tiny
from tests.patch.test_patch import raw
from tests.strategies import float_dtypes, generator, normal, seeds
from torch_simu import NeuronPatch, NeuronSelection
from torch_simu.cli.app import main
from torch_simu.columns import Columns
from torch_simu.patch import patch_between_checkpoints, revert_checkpoint, verify_checkpoint
from torch_simu.patch.model import neurons_of

ARCHITECTURES = st.sampled_from(["llama", "gpt2", "phi3", "opt"])


def pair(name: str, dtype: torch.dtype, seed: int) -> tuple[nn.Module, nn.Module, NeuronSelection]:
    """A base, the same with every entry of some units changed, and the selection."""
    base = tiny(name).to(dtype)
    model = copy.deepcopy(base)
    selection = NeuronSelection.random(base, 0.1, generator(seed))
    params = dict(model.named_parameters())
    groups = selection.param_groups(model, units=True)
    trained = [
        (group["neuron_dim"], *each) for group in groups for each in zip(group["params"], group["neurons"], strict=True)
    ]
    assert len(trained) < len(params)
    with torch.no_grad():
        for number, (dim, param, neurons) in enumerate(trained):
            columns = Columns(dim, torch.tensor(neurons))
            columns.add_(param, normal(seed + number, *columns.shape_in(param.shape), dtype=dtype))
    return base, model.requires_grad_(False), selection


@given(ARCHITECTURES, float_dtypes, seeds)
def test_a_patch_of_units_goes_on_and_comes_off_to_the_last_bit(
    tmp_path_factory, name: str, dtype: torch.dtype, seed: int
) -> None:
    base, model, selection = pair(name, dtype, seed)
    path = tmp_path_factory.mktemp("patch") / "p.safetensors"
    NeuronPatch.between(base, model, selection, units=True).save(path)
    patch, one = NeuronPatch.load(path), copy.deepcopy(base)
    patch.apply(one)
    assert raw(one) == raw(model)
    audit = patch.verify(base, one)
    assert audit.passed and audit.counts["rows"] == sum(change.kind == "rows" for change in patch.changes.values())
    patch.revert(one)
    assert raw(one) == raw(base)


def test_rows_are_counted_apart_from_neurons() -> None:
    base, model, selection = pair("phi3", torch.float32, 0)
    patch = NeuronPatch.between(base, model, selection, units=True)
    # Of two layers of 80 neurons, each made by two rows.
    assert repr(patch) == "NeuronPatch(4 tensors, 16 of 160 neurons, 32 of 320 rows)"
    rows = {name: change.neurons.tolist() for name, change in patch.changes.items() if change.kind == "rows"}
    for layer in selection:
        chosen = selection[layer].tolist()
        assert rows[layer.replace("down", "gate_up") + ".weight"] == chosen + [80 + each for each in chosen]


def test_rows_that_differ_are_refused_where_they_may_not() -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    with pytest.raises(ValueError, match="'model.layers.0.mlp.gate_proj.weight' differs and has no selected neuron"):
        NeuronPatch.between(base, model, selection)
    other = next(row for row in range(80) if row not in selection["model.layers.1.mlp.down_proj"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[other, 0] += 1
    with pytest.raises(ValueError, match=rf"Row {other} of tensor 'model.layers.1.mlp.up_proj.weight' differs and is"):
        NeuronPatch.between(base, model, selection, units=True)


def test_a_file_whose_rows_are_no_rows_is_refused(tmp_path: Path) -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    patch = NeuronPatch.between(base, model, selection, units=True)
    name = next(name for name, change in patch.changes.items() if change.kind == "rows")
    header = patch.changes[name].header()
    for wrong, message in (({"dim": -1}, "does not count"), ({"kind": "lines"}, "its kind is 'lines'")):
        with pytest.raises(ValueError, match=message):
            type(patch.changes[name]).from_file(
                {**header, **wrong}, patch.changes[name].neurons, patch.changes[name].value
            )


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, NeuronSelection]:
    base, model, selection = pair("gpt2", torch.bfloat16, 0)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    selection.save(tmp_path / "selection")
    return tmp_path, selection


def test_checkpoints_on_disk_are_patched_without_loading_the_model(folders) -> None:
    folder, selection = folders
    base, model = folder / "base", folder / "model"
    with pytest.raises(ValueError, match="differs and has no selected neuron"):
        patch_between_checkpoints(base, model, selection)
    patch = patch_between_checkpoints(base, model, selection, units=True)
    assert {change.kind for change in patch.changes.values()} == {"columns", "rows"}
    assert verify_checkpoint(patch, base, model).passed
    revert_checkpoint(patch, model, folder / "back")
    assert verify_checkpoint(patch, base, folder / "back").problems
    assert (folder / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_model_that_is_not_known_is_refused(folders) -> None:
    folder, selection = folders
    config = json.loads((folder / "base" / "config.json").read_text())
    for name in ("base", "model"):
        (folder / name / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ValueError, match="units is True, and the model of .* is not known"):
        patch_between_checkpoints(folder / "base", folder / "model", selection, units=True)


def test_the_command_line_makes_shows_and_verifies_them(folders, capsys: pytest.CaptureFixture) -> None:
    folder, _ = folders
    paths = [str(folder / name) for name in ("base", "model", "selection", "patch")]

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["patch", *arguments])
        return int(stop.value.code or 0)

    assert run("create", *paths) == 2 and run("create", *paths, "--units") == 0
    capsys.readouterr()
    assert run("show", paths[3]) == 0
    shown = capsys.readouterr().out
    assert "mlp.c_fc.weight  rows  13 of 128 rows" in shown and "mlp.c_fc.bias  rows  13 of 128 rows" in shown
    assert "mlp.c_proj.weight  columns  13 of 128 neurons" in shown
    assert run("verify", paths[3], *paths[:2]) == 0


def test_the_places_of_rows_are_those_that_train() -> None:
    model = tiny("gpt2")
    selection = NeuronSelection.random(model, 0.2, generator(0))
    names = {param: name for name, param in model.named_parameters()}
    trained = {
        names[param]: (group["neuron_dim"], neurons)
        for group in selection.param_groups(model, units=True)
        for param, neurons in zip(group["params"], group["neurons"], strict=True)
    }
    found = neurons_of(model, selection, units=True)
    assert {name: (place.dim, place.neurons.tolist()) for name, place in found.items()} == trained
