"""4-bit layers pass the gradient on at every entry of the library, also where codes are packed for inference."""

from __future__ import annotations

import copy
from types import MappingProxyType

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from tests.models import tiny
from tests.quantized import four_bit, quantized
from tests.strategies import normal
from torch_simu import (
    NeuronSelection,
    attach_deltas,
    attribute_neurons,
    detach_deltas,
    register_neuron_hooks,
)
from torch_simu.bitsandbytes import packing
from torch_simu.bitsandbytes.layers import fingerprint, is_4bit, linear_4bit
from torch_simu.bitsandbytes.packing import check_codes, codes_as_loaded, keep_codes_as_loaded, let_codes_go

IDS = torch.tensor([[3, 4, 5, 6, 7]])
BATCH = MappingProxyType({"input_ids": IDS, "labels": IDS})


@pytest.fixture(autouse=True)
def _packs(monkeypatch):
    """A processor that packs, whatever this one does: a packed layer gives no gradient there, without an error."""

    def pack(weight, state, *_):
        state.packing_format_for_cpu = True
        return weight, state

    def packed(x, weight, out=None, state=None):
        return nn.functional.linear(x.detach(), bnb.functional.dequantize_4bit(weight, state).to(x.dtype))

    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", pack)
    monkeypatch.setattr(bnb.functional, "gemv_4bit", packed)
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


def model_4bit() -> nn.Module:
    return quantized(tiny("llama", hidden_size=64, intermediate_size=128), "4bit").eval()


def decoded(model: nn.Module) -> nn.Module:
    """A copy with float weights of the values of the codes."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if is_4bit(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.weight = nn.Parameter(values.float(), requires_grad=False)
            model.set_submodule(name, plain)
    return model


def packed(model: nn.Module) -> list[str]:
    found = [(name, layer) for name, layer in model.named_modules() if is_4bit(layer)]
    return [name for name, layer in found if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)]


def test_this_file_packs_like_such_a_processor() -> None:
    model = model_4bit()
    with torch.no_grad():
        model(**BATCH)
    assert len(packed(model)) == 14


@pytest.mark.parametrize("train", [False, True])
def test_deltas_train_on_the_right_gradient_after_an_evaluation(train: bool) -> None:
    model = model_4bit()
    reference = decoded(model)
    chosen = NeuronSelection.random(model, 0.2, torch.Generator().manual_seed(0))
    deltas, wanted = attach_deltas(model, chosen), attach_deltas(reference, chosen)
    with torch.no_grad():
        model(**BATCH)
    assert not packed(model)
    for each in (model, reference):
        each.train(train)(**BATCH).loss.backward()
    for name, delta in deltas.items():
        torch.testing.assert_close(delta.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
    detach_deltas(model)
    with torch.no_grad():
        model.eval()(**BATCH)
    assert packed(model)


def test_attribution_is_that_of_the_decoded_weights() -> None:
    model = model_4bit()
    found, wanted = (attribute_neurons(each, [dict(BATCH)], steps=4) for each in (model, decoded(model)))
    assert not packed(model)
    for name, scores in found.scores.items():
        torch.testing.assert_close(scores, wanted.scores[name], rtol=1e-3, atol=1e-6)


def test_hooks_capture_the_gradient_of_the_decoded_weights() -> None:
    model = model_4bit()
    found = {}
    for key, each in (("codes", model), ("decoded", decoded(model))):
        with register_neuron_hooks(each) as hooks:
            with torch.no_grad(), hooks.pause():
                each(**BATCH)
            each(**BATCH).loss.backward()
        found[key] = dict(hooks)
    for name, value in found["codes"].items():
        torch.testing.assert_close(value, found["decoded"][name], rtol=1e-3, atol=1e-6)


def test_groups_of_float_layers_keep_the_codes_behind_them() -> None:
    model = model_4bit()
    first = "model.layers.0.mlp.down_proj"
    model.set_submodule(first, decoded(model).get_submodule(first))
    NeuronSelection({first: [1]}, {first: 128}).param_groups(model, attention="frozen")
    with torch.no_grad():
        model(**BATCH)
    assert not packed(model)


def test_packed_codes_are_refused_by_every_entry_and_nothing_is_left_behind() -> None:
    model = model_4bit()
    with torch.no_grad():
        model(**BATCH)
    chosen = NeuronSelection.random(model, 0.2, torch.Generator().manual_seed(0))
    before = [dict(layer.__dict__) for layer in model.modules()]
    message = r"codes of the 4-bit layer '.*' were packed for inference.*keep_codes_as_loaded\(model\) before its first"
    for use in (
        lambda: attach_deltas(model, chosen),
        lambda: attribute_neurons(model, [dict(BATCH)], steps=2),
        lambda: register_neuron_hooks(model),
        lambda: NeuronSelection({}, {}).param_groups(model, attention="frozen"),
        lambda: keep_codes_as_loaded(model),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert [layer.__dict__.keys() for layer in model.modules()] == [each.keys() for each in before]


def test_packed_codes_have_no_fingerprint() -> None:
    layer = four_bit(0, 64, 32).eval()
    fingerprint(layer)
    layer(normal(1, 3, 64))
    with pytest.raises(ValueError, match="packed for inference .* expected codes as they were loaded"):
        fingerprint(layer)


def test_codes_are_kept_as_long_as_anyone_keeps_them() -> None:
    model = nn.Sequential(four_bit(0, 64, 32)).eval()
    x, switch = normal(1, 3, 64), "support_avx512bf16_for_cpu"
    before = dict(model[0].__dict__)
    first, second = register_neuron_hooks(model), register_neuron_hooks(model)
    first.remove()
    first.remove()
    with torch.no_grad():
        model(x)
    assert not packed(model) and model[0].__dict__[switch] is False
    second.remove()
    with codes_as_loaded(model):
        keep_codes_as_loaded(model)
        let_codes_go(model)
        assert model[0].__dict__[switch] is False
    assert model[0].__dict__[switch] == before[switch]
    assert not {key for key in model[0].__dict__ if key == packing._HELD}
    let_codes_go(model)
    assert model[0].__dict__[switch] == before[switch]


def test_layers_without_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="The 4-bit layer '0' has no codes, expected codes. Move it to its"):
        check_codes(nn.Sequential(bnb.nn.Linear4bit(64, 32)))


@pytest.mark.parametrize("width", [64, 32, 128])
def test_a_layer_is_computed_with_its_weight_and_not_with_the_transposed_one(width: int) -> None:
    layer, x = four_bit(0, 64, width), normal(2, 5, 64)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    expected = nn.functional.linear(x, weight.float(), layer.bias)
    torch.testing.assert_close(linear_4bit(layer, x), expected, rtol=1e-4, atol=1e-4)
