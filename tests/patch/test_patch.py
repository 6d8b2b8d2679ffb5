"""A patch applies and reverts bit-exactly, and refuses the wrong base (law 9); what is written is whole or absent."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.models import tiny
from tests.quantized import quantized
from tests.strategies import float_dtypes, generator, normal, seeds
from torch_simu import NeuronPatch, NeuronSelection, attach_deltas, detach_deltas
from torch_simu.columns import Columns
from torch_simu.deltas import attached_layers
from torch_simu.layers import attention_projections, neuron_dim, neuron_weight
from torch_simu.patch import apply_to_checkpoint, bits
from torch_simu.patch import change as change_module

pytestmark = pytest.mark.usefixtures("device")

ARCHITECTURES = st.sampled_from(["llama", "gpt2", "mixtral", "gpt_oss"])


def pair(name: str, dtype: torch.dtype, seed: int, *, attention: bool = False):
    """A base, the same with selected columns changed, and the selection."""
    base = tiny(name).to(dtype)
    model = copy.deepcopy(base)
    selection = NeuronSelection.random(base, 0.1, generator(seed))
    with torch.no_grad():
        for number, layer in enumerate(selection):
            module = model.get_submodule(layer)
            weight, columns = neuron_weight(module), Columns(neuron_dim(module), selection[layer])
            columns.add_(weight, normal(seed + number, *columns.shape_in(weight.shape), dtype=dtype))
        if attention:
            for projection in attention_projections(model).values():
                projection.weight.mul_(1.01)
    return base, model, selection


def raw(model: nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
        for name, value in model.state_dict().items()
    }


def assert_there_and_back(name: str, dtype: torch.dtype, seed: int, attention: bool) -> None:
    """Law 9."""
    base, model, selection = pair(name, dtype, seed, attention=attention)
    patch = NeuronPatch.between(base, model, selection)
    one = copy.deepcopy(base)
    patch.apply(one)
    assert raw(one) == raw(model)
    assert patch.verify(base, one)
    with pytest.raises(ValueError, match="is applied already to tensor"):
        patch.apply(one)
    assert raw(one) == raw(model)
    patch.revert(one)
    assert raw(one) == raw(base)
    with pytest.raises(ValueError, match="is not applied to tensor"):
        patch.revert(one)
    other = copy.deepcopy(base)
    last = neuron_weight(other.get_submodule(list(selection)[-1]))
    with torch.no_grad():
        last.view(-1)[0] += 1
    before = raw(other)
    with pytest.raises(ValueError, match=r"has sha256 .*, expected .* was made for another base"):
        patch.apply(other)
    # The first tensors fit and are left alone all the same.
    assert raw(other) == before


@given(ARCHITECTURES, float_dtypes, seeds, st.booleans())
def test_a_patch_goes_on_and_comes_off_to_the_last_bit(
    name: str, dtype: torch.dtype, seed: int, attention: bool
) -> None:
    assert_there_and_back(name, dtype, seed, attention)


def _adds(original: Callable) -> Callable:
    def flip(self: change_module.Change, tensor: torch.Tensor) -> None:
        bits.bits_of(tensor).add_(0)
        tensor.add_(1e-3)

    return flip


def _ignores_the_base(original: Callable) -> Callable:
    return lambda self, name, tensor, applied: None


def _next_column(original: Callable) -> Callable:
    def between(name, before, after, place):
        beside = place and place._replace(neurons=(place.neurons + 1) % before.shape[-1])
        return original(name, before, after, beside)

    return between


@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [
        (change_module.Change, "flip", _adds),
        (change_module.Change, "check", _ignores_the_base),
        (change_module, "change_between", _next_column),
    ],
)
def test_the_law_tells_mutants(monkeypatch: pytest.MonkeyPatch, owner, name: str, mutant: Callable) -> None:
    monkeypatch.setattr(owner, name, mutant(getattr(owner, name)))
    # pytest.raises of the law fails with its own exception.
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        assert_there_and_back("llama", torch.float32, 0, False)


@given(ARCHITECTURES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seeds)
def test_a_saved_patch_is_the_same_patch(tmp_path_factory, name: str, dtype: torch.dtype, seed: int) -> None:
    path = tmp_path_factory.mktemp("patch") / "p.safetensors"
    base, model, selection = pair(name, dtype, seed)
    NeuronPatch.between(base, model, selection, provenance={"seed": seed}).save(path)
    patch = NeuronPatch.load(path)
    assert patch.provenance == {"seed": seed}
    patch.apply(base)
    assert raw(base) == raw(model)


def test_a_patch_holds_the_selected_columns_only(tmp_path: Path) -> None:
    base, model, selection = pair("llama", torch.bfloat16, 0)
    patch = NeuronPatch.between(base, model, selection)
    assert repr(patch) == "NeuronPatch(2 tensors, 16 of 160 neurons)"
    patch.save(tmp_path / "p.safetensors")
    # Eight columns of 32 entries of 2 bytes in each of two layers, their indices, and a header.
    held = sum(change.value.numel() * change.value.element_size() for change in patch.changes.values())
    assert held == 2 * 8 * 32 * 2
    assert (tmp_path / "p.safetensors").stat().st_size < held + 3000


def test_changes_outside_the_selection_are_refused_and_named() -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    with pytest.raises(ValueError, match="No bit differs between base and model"):
        NeuronPatch.between(base, copy.deepcopy(base), selection)
    with torch.no_grad():
        model.model.norm.weight[0] = 2
    with pytest.raises(ValueError, match="Tensor 'model.norm.weight' differs and has no selected neuron"):
        NeuronPatch.between(base, model, selection)
    base, model, selection = pair("llama", torch.float32, 0)
    outside = next(index for index in range(80) if index not in selection["model.layers.1.mlp.down_proj"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, outside] += 1
    wrong = rf"Neuron {outside} of tensor 'model.layers.1.mlp.down_proj.weight' differs and is not selected \(1 such\)"
    with pytest.raises(ValueError, match=wrong):
        NeuronPatch.between(base, model, selection)
    with pytest.raises(ValueError, match="has shape .*, expected .* as in the base"):
        NeuronPatch.between(base, copy.deepcopy(base).bfloat16(), selection)
    with pytest.raises(ValueError, match="Tensor .* is in the .* only, expected the same tensors in both"):
        NeuronPatch.between(base, base.model, selection)
    patch = NeuronPatch.between(*pair("llama", torch.float32, 0))
    with pytest.raises(ValueError, match="has shape .*Was the patch made for another model"):
        patch.apply(tiny("llama").bfloat16())
    with pytest.raises(KeyError, match="is not in the model, expected the model that the patch was made for"):
        patch.apply(tiny("gpt2"))


def test_an_audit_finds_what_is_not_in_the_patch(tmp_path: Path) -> None:
    base, model, selection = pair("llama", torch.float32, 0, attention=True)
    patch = NeuronPatch.between(base, model, selection)
    audit = patch.verify(base, model)
    assert audit and audit.counts["columns"] == 2 and audit.counts["whole"] == 8
    audit.save(tmp_path / "audit.json")
    content = json.loads((tmp_path / "audit.json").read_text())
    assert content["passed"] and content["tensors"]["model.layers.0.mlp.down_proj.weight"]["selected"] == 8
    assert str(audit).startswith("Exactly what the patch says changed")
    with torch.no_grad():
        model.model.norm.weight[0] = 2
        model.model.layers[0].mlp.down_proj.weight[0] += 1
    audit = patch.verify(base, model)
    assert not audit and len(audit.problems) == 2
    assert "Tensor 'model.norm.weight' differs and is not in the patch" in audit.problems
    assert not patch.verify(base, base)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_patch_of_a_quantized_model_is_its_deltas_bound_to_the_codes(tmp_path: Path, kind: str) -> None:
    base = quantized(tiny("llama", hidden_size=64, intermediate_size=128), kind)
    ids = torch.tensor([[3, 4, 5]])
    model, other = copy.deepcopy(base), quantized(tiny("llama", seed=1, hidden_size=64, intermediate_size=128), kind)
    selection = NeuronSelection.random(base, 0.1, generator(0))
    with torch.no_grad():
        for delta in attach_deltas(model, selection).values():
            delta.normal_(generator=generator(1))
    patch = NeuronPatch.between(base, model, selection)
    patch.save(tmp_path / "p.safetensors")
    patch = NeuronPatch.load(tmp_path / "p.safetensors")
    assert patch.verify(base, model) and not patch.verify(base, base)
    with pytest.raises(ValueError, match="The weight of layer .* has sha256 .* The patch was made for another base"):
        patch.apply(other)
    assert not attached_layers(other)
    expected, plain = model(input_ids=ids).logits, copy.deepcopy(base)(input_ids=ids).logits
    patch.apply(base)
    assert torch.equal(base(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="The patch is applied already to layer"):
        patch.apply(base)
    patch.revert(base)
    assert torch.equal(base(input_ids=ids).logits, plain) or kind == "4bit"
    with pytest.raises(ValueError, match="The patch is not applied to layer"):
        patch.revert(base)
    detach_deltas(model)
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="The weight of layer .* in .*float' has sha256 .* in codes of other options"):
        apply_to_checkpoint(patch, tmp_path / "float", tmp_path / "out")


def test_damaged_and_changed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    NeuronPatch.between(*pair("llama", torch.float32, 0)).save(path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is unreadable"):
            NeuronPatch.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not have the sha256 that it names.*damaged, or was changed"):
        NeuronPatch.load(path)
    path.write_bytes(content.replace(b'\\"version\\": 2', b'\\"version\\": 7'))
    with pytest.raises(ValueError, match="has kind 'NeuronPatch', version 7"):
        NeuronPatch.load(path)


def test_a_model_without_data_is_refused_by_name() -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    with pytest.raises(ValueError, match="Tensor 'model.embed_tokens.weight' is on the meta device.*without offload"):
        NeuronPatch.between(base, model.to("meta"), selection)
    with pytest.raises(ValueError, match="is on the meta device"):
        NeuronPatch.between(base.to("meta"), base, selection)


def test_a_weight_that_is_computed_is_refused_by_name() -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    for each in (base, model):
        for layer in selection:
            nn.utils.parametrizations.weight_norm(each.get_submodule(layer))
    with pytest.raises(ValueError, match="is computed from other parameters"):
        NeuronPatch.between(base, model, selection)
