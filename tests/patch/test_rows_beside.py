"""A patch of units beside codes has deltas of columns and of rows, of models and of folders alike."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from tests.quantized import quantized
from tests.strategies import generator
from torch_simu import NeuronPatch, NeuronSelection, attach_deltas
from torch_simu.deltas import attached_layers, load_deltas, save_deltas
from torch_simu.deltas.attach import NOTHING, attach_places
from torch_simu.patch import apply_to_checkpoint, patch_between_checkpoints, revert_checkpoint, verify_checkpoint

LAYER = "model.layers.1.mlp.down_proj"
pytestmark = pytest.mark.usefixtures("device")
kinds = pytest.mark.parametrize(("name", "kind"), [("llama", "8bit"), ("phi3", "4bit"), ("phi", "8bit")])


def made(name: str, kind: str) -> tuple[torch.nn.Module, torch.nn.Module, NeuronSelection]:
    """A quantized base, a copy with deltas of units, and their selection."""
    base = quantized(tiny(name, hidden_size=64, intermediate_size=128), kind)
    model, selection = copy.deepcopy(base), NeuronSelection.random(base, 0.1, generator(0))
    with torch.no_grad():
        attach_deltas(model, selection, units=True)
        for number, layer in enumerate(attached_layers(model).values()):
            for delta in layer.deltas().values():
                delta.normal_(generator=generator(number))
    return base, model, selection


def places(model: torch.nn.Module) -> dict[str, tuple[bool, list[int], list[bytes]]]:
    return {
        name: (layer.rows, layer.idx.tolist(), [each.detach().numpy().tobytes() for each in layer.deltas().values()])
        for name, layer in attached_layers(model).items()
    }


@kinds
def test_it_goes_on_and_comes_off_to_the_last_bit(name: str, kind: str, tmp_path: Path) -> None:
    base, model, selection = made(name, kind)
    NeuronPatch.between(base, model, selection, units=True).save(tmp_path / "patch")
    patch, one, ids = NeuronPatch.load(tmp_path / "patch"), copy.deepcopy(base), torch.tensor([[3, 4, 5]])
    before = one(ids).logits
    patch.apply(one)
    assert places(one) == places(model) and torch.equal(one(ids).logits, model(ids).logits)
    audit = patch.verify(base, one)
    # Of each of two layers gate and up, one that holds both, or one with a bias.
    of_rows = {"llama": 2, "phi3": 1, "phi": 2}[name]
    assert audit.passed and (audit.counts["delta"], audit.counts["delta_rows"]) == (2, 2 * of_rows)
    assert repr(patch).endswith("26 of 256 neurons, 52 of 512 rows)")
    patch.revert(one)
    assert not attached_layers(one) and torch.equal(one(ids).logits, before)


@kinds
def test_of_folders_it_is_the_same(name: str, kind: str, tmp_path: Path) -> None:
    base, model, selection = made(name, kind)
    expected = NeuronPatch.between(base, model, selection, units=True)
    for folder in ("base", "model"):
        base.save_pretrained(tmp_path / folder)
    save_deltas(model, tmp_path / "model" / "deltas.safetensors")
    with pytest.raises(ValueError, match="is of rows that make neurons, expected columns .* Pass units=True"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)
    found = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection, units=True)
    assert {name: change.header() for name, change in found.changes.items()} == {
        name: change.header() for name, change in expected.changes.items()
    }
    assert all(torch.equal(each.value, expected.changes[name].value) for name, each in found.changes.items())
    assert verify_checkpoint(found, tmp_path / "base", tmp_path / "model")
    apply_to_checkpoint(found, tmp_path / "base", tmp_path / "applied")
    revert_checkpoint(found, tmp_path / "applied", tmp_path / "reverted")
    for folder, wanted in (("applied", "model"), ("reverted", "base")):
        files = [{path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in (folder, wanted)]
        assert files[0] == files[1]
    one = copy.deepcopy(base)
    load_deltas(one, tmp_path / "applied" / "deltas.safetensors")
    assert places(one) == places(model)


def test_rows_of_other_neurons_are_refused() -> None:
    base, model, selection = made("llama", "8bit")
    with pytest.raises(ValueError, match="is of rows that make neurons, expected columns .* Pass units=True"):
        NeuronPatch.between(base, model, selection)
    up = model.model.layers[1].mlp.up_proj
    up.idx = (up.idx + 1) % 128
    with pytest.raises(ValueError, match=r"The delta of layer 'model.layers.1.mlp.up_proj' is of other neurons, exp"):
        NeuronPatch.between(base, model, selection, units=True)


@pytest.mark.parametrize("rows", [False, True])
def test_the_same_values_at_other_places_are_no_applied_patch(rows: bool, tmp_path: Path) -> None:
    """The hash of a delta is that of its values alone."""
    base, model, selection = made("llama", "8bit")
    patch = NeuronPatch.between(base, model, selection, units=True)
    layer = model.model.layers[1].mlp.up_proj if rows else model.get_submodule(LAYER)
    layer.idx = (layer.idx + 1) % 128
    audit = patch.verify(base, model)
    assert len(audit.problems) == 1 and "mlp" in audit.problems[0] and "is not as the patch says" in audit.problems[0]
    with pytest.raises(ValueError, match="is of other neurons, expected those of the patch"):
        patch.revert(model)
    for folder in ("base", "model"):
        base.save_pretrained(tmp_path / folder)
    save_deltas(model, tmp_path / "model" / "deltas.safetensors")
    assert verify_checkpoint(patch, tmp_path / "base", tmp_path / "model").problems == audit.problems
    with pytest.raises(ValueError, match="holds other deltas, expected those of the patch"):
        revert_checkpoint(patch, tmp_path / "model", tmp_path / "out")


def test_a_patch_whose_bias_has_other_rows_is_refused_and_nothing_is_attached(tmp_path: Path) -> None:
    base, model, selection = made("phi", "8bit")
    patch = NeuronPatch.between(base, model, selection, units=True)
    name, message = "model.layers.1.mlp.fc1.delta_bias", "deltas of layer 'model.layers.1.mlp.fc1' and of its bias are"
    change = patch.changes[name]
    moved = NeuronPatch({**patch.changes, name: replace(change, neurons=(change.neurons + 1) % 128)})
    base.save_pretrained(tmp_path / "base")
    for use in (lambda: moved.apply(base), lambda: apply_to_checkpoint(moved, tmp_path / "base", tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match="Layer 'model.layers.1.mlp.fc1' has a bias, expected as in the patch's base"):
        NeuronPatch({key: each for key, each in patch.changes.items() if key != name}).apply(base)
    assert not attached_layers(base) and not (tmp_path / "out").exists()


def test_rows_are_not_taken_for_columns_of_the_same_values() -> None:
    """Of a square layer whose every row, or column, has a delta."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    all_of_it = NeuronSelection({"0": range(4)}, {"0": 4})
    columns, rows = copy.deepcopy(base), copy.deepcopy(base)
    attach_deltas(columns, all_of_it)
    attach_places(rows, NOTHING, all_of_it)
    patch = NeuronPatch.between(base, columns, all_of_it)
    assert patch.verify(base, columns) and not patch.verify(base, rows)
    with pytest.raises(ValueError, match="is of other neurons, expected those of the patch"):
        patch.revert(rows)
