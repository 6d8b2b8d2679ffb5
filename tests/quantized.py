"""Layers of bitsandbytes on the processor, seeded, for tests of what is done beside their codes."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from tests.devices.placing import here
from tests.strategies import normal


def place() -> torch.device:
    """Where a test makes its layers, if bitsandbytes has kernels for it."""
    if here().type == "emulated":
        pytest.skip("bitsandbytes has no kernels for an emulated device")
    return here()


def eight_bit(seed: int, num_neurons: int, width: int, *, bias: bool = True, threshold: float = 0.0) -> nn.Module:
    """A `Linear8bitLt` with codes."""
    layer = bnb.nn.Linear8bitLt(num_neurons, width, bias=bias, has_fp16_weights=False, threshold=threshold)
    values = normal(seed, width, num_neurons)
    layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    if bias:
        layer.bias = nn.Parameter(normal(seed + 1, width))
    return layer.to(place())


def four_bit(seed: int, num_neurons: int, width: int, *, bias: bool = True) -> nn.Module:
    """A `Linear4bit` with NF4 codes."""
    layer = bnb.nn.Linear4bit(num_neurons, width, bias=bias, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(normal(seed, width, num_neurons), requires_grad=False, quant_type="nf4")
    if bias:
        layer.bias = nn.Parameter(normal(seed + 1, width))
    return layer.to(place())


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """A copy of a model whose linear layers, the head aside, have "8bit" or "4bit" codes."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if kind == "8bit":
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*sizes, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        if layer.bias is not None:
            new.bias = layer.bias
        model.set_submodule(name, new.to(place()))
    return model
