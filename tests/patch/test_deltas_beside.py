"""The deltas beside a quantized checkpoint are a patch of its folder, bound to the codes in it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny
from tests.quantized import quantized
from tests.strategies import generator
from torch_simu import NeuronPatch, NeuronSelection, attach_deltas
from torch_simu.bitsandbytes.layers import fingerprint
from torch_simu.deltas import attached_layers, save_deltas
from torch_simu.patch import apply_to_checkpoint, patch_between_checkpoints, revert_checkpoint, verify_checkpoint
from torch_simu.patch.beside import stored_fingerprint
from torch_simu.patch.reading import opened

LAYER = "model.layers.1.mlp.down_proj"
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.parametrize("kind", ["8bit", "4bit"])]


def made(folder: Path, kind: str) -> tuple[NeuronSelection, NeuronPatch]:
    """The folders `base` and `model`, which has deltas; their selection, and the patch between the models."""
    base = quantized(tiny("llama", hidden_size=64, intermediate_size=128), kind)
    base.save_pretrained(folder / "base")
    base.save_pretrained(folder / "model")
    model, selection = copy.deepcopy(base), NeuronSelection.random(base, 0.1, generator(0))
    with torch.no_grad():
        for delta in attach_deltas(model, selection).values():
            delta.normal_(generator=generator(1))
    save_deltas(model, folder / "model" / "deltas.safetensors")
    for name, layer in attached_layers(model).items():
        with opened(folder / "base") as stored:
            assert stored_fingerprint(stored, name) == fingerprint(layer)
    return selection, NeuronPatch.between(base, model, selection)


def test_it_is_the_patch_between_the_models(kind: str, tmp_path: Path) -> None:
    selection, expected = made(tmp_path, kind)
    found = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)
    assert found.changes.keys() == expected.changes.keys()
    for name, change in found.changes.items():
        assert change.header() == expected.changes[name].header()
        assert torch.equal(change.value, expected.changes[name].value)
        assert torch.equal(change.neurons, expected.changes[name].neurons)


def test_other_neurons_are_refused(kind: str, tmp_path: Path) -> None:
    selection, _ = made(tmp_path, kind)
    other = selection - NeuronSelection({LAYER: selection[LAYER][:1]}, {LAYER: 128})
    with pytest.raises(ValueError, match=f"The delta of layer '{LAYER}' is of other neurons, expected those of the"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", other)


def test_codes_that_are_others_are_refused_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    selection, patch = made(tmp_path, kind)
    shutil.copytree(tmp_path / "model", tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{LAYER}.weight"].view(torch.uint8).view(-1)[0].bitwise_xor_(1)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"Tensor '{LAYER}.weight' differs and has no selected neuron"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "changed", selection)
    with pytest.raises(ValueError, match=f"The weight of layer '{LAYER}' in .*changed' has sha256 .* for another base"):
        revert_checkpoint(patch, tmp_path / "changed", tmp_path / "out")
    (tmp_path / "changed" / "deltas.safetensors").unlink()
    with pytest.raises(ValueError, match=f"The weight of layer '{LAYER}' in .*changed' has sha256 .* for another base"):
        apply_to_checkpoint(patch, tmp_path / "changed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_audit_knows_the_codes_of_the_patch(kind: str, tmp_path: Path) -> None:
    """Two folders with the same codes and the deltas of the patch, which was made for others."""
    _, patch = made(tmp_path, kind)
    assert verify_checkpoint(patch, tmp_path / "base", tmp_path / "model")
    for name in ("base", "model"):
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        tensors[f"{LAYER}.weight"].view(torch.uint8).view(-1)[0].bitwise_xor_(1)
        save_file(tensors, path, {"format": "pt"})
    audit = verify_checkpoint(patch, tmp_path / "base", tmp_path / "model")
    assert audit.problems == (f"Tensor '{LAYER}.delta' is not as the patch says",)


def test_deltas_go_on_once_and_come_off_once(kind: str, tmp_path: Path) -> None:
    _, patch = made(tmp_path, kind)
    with pytest.raises(ValueError, match=r"has deltas.safetensors \(the patch is applied already\), expected the base"):
        apply_to_checkpoint(patch, tmp_path / "model", tmp_path / "out")
    with pytest.raises(ValueError, match="base' holds no deltas, expected those of the patch. It is not"):
        revert_checkpoint(patch, tmp_path / "base", tmp_path / "out")
    apply_to_checkpoint(patch, tmp_path / "base", tmp_path / "applied")
    revert_checkpoint(patch, tmp_path / "applied", tmp_path / "reverted")
    for found, expected in (("applied", "model"), ("reverted", "base")):
        files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in (found, expected)]
        assert files[0] == files[1]
