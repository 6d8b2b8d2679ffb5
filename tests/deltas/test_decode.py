"""A quantized model with deltas becomes a plain model of float weights that computes what both did."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.deltas.test_deltas import KINDS, SIZE, WIDTH
from tests.models import tiny
from tests.quantized import quantized
from tests.strategies import normal
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.bitsandbytes.layers import decoded_weight, holds_codes
from torch_simu.deltas import attached_layers, decode_model

pytestmark = pytest.mark.usefixtures("device")

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def values(layer: nn.Module) -> torch.Tensor:
    """By bitsandbytes' own functions."""
    if hasattr(layer.weight, "quant_state"):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * layer.weight.SCB[:, None] / 127


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bit" in kind])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_that_of_codes_and_delta_rounded_once(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(KINDS[kind](0))
    expected = values(model[0])
    torch.testing.assert_close(decoded_weight(model[0]), expected, rtol=1e-6, atol=1e-7)
    delta = attach_deltas(model, NeuronSelection({"0": [1, 5]}, {"0": SIZE}))["0"]
    delta.data.copy_(normal(3, WIDTH, 2))
    torch.testing.assert_close(decoded_weight(model[0]), expected, rtol=1e-6, atol=1e-7)
    wanted = decoded_weight(model[0])
    wanted[:, [1, 5]] += delta.data
    bias = model[0].bias
    decode_model(model, dtype)
    assert type(model[0]) is nn.Linear and not attached_layers(model) and not holds_codes(model[0])
    assert torch.equal(model[0].weight, wanted.to(dtype))
    assert bias is None or torch.equal(model[0].bias, bias.to(dtype))


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_language_model_computes_on_and_is_plain_on_disk(kind: str, tmp_path) -> None:
    model = quantized(tiny("llama", hidden_size=64, intermediate_size=128), kind)
    deltas = attach_deltas(model, NeuronSelection.random(model, 0.1, torch.Generator().manual_seed(0)))
    for delta in deltas.values():
        delta.data.fill_(0.05)
    # In train mode bitsandbytes computes with decoded weights.
    before = model.train()(input_ids=IDS).logits
    decode_model(model)
    assert not any(holds_codes(layer) for layer in model.modules())
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_deltas_of_float_layers_are_merged() -> None:
    model, x = nn.Sequential(nn.Linear(SIZE, WIDTH)), normal(0, 3, SIZE)
    attach_deltas(model, NeuronSelection({"0": [1]}, {"0": SIZE}))["0"].data.fill_(1.0)
    before = model(x)
    decode_model(model)
    assert not attached_layers(model)
    torch.testing.assert_close(model(x), before)
