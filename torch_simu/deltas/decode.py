"""Decode: a quantized model with its deltas as a plain model of float weights, which any loader opens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_simu.bitsandbytes.layers import decoded_weight, holds_codes
from torch_simu.deltas.attach import attached_layers, merge_deltas
from torch_simu.deltas.layer import DeltaLayer


@torch.no_grad()
def decode_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every quantized layer into an `nn.Linear` of the values of its codes, with its delta in them, in place.

    Deltas of float layers are merged, too; a model of transformers is no longer marked as quantized. Each weight is
    summed in float32 and rounded once. The model computes with float activations from now on, so that outputs differ
    from those of 8-bit arithmetic by its rounding.

    Args:
        model: The model; its other layers stay as they are.
        dtype: Of the new weights; None: that of the model's first float parameter.

    Raises:
        ValueError: If 4-bit codes were packed for inference.
    """
    if dtype is None:
        deltas = {id(delta) for layer in attached_layers(model).values() for delta in layer.deltas().values()}
        found = (param for param in model.parameters() if param.is_floating_point() and id(param) not in deltas)
        dtype = next((param.dtype for param in found), torch.float32)
    weights = {name: decoded_weight(layer) for name, layer in model.named_modules() if holds_codes(layer)}
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        bias = cast("Tensor | None", layer.bias)
        if isinstance(layer, DeltaLayer):
            layer.columns.add_(weight, layer.change)
            bias = layer.changed_bias()
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain.train(layer.training))
    if attached_layers(model):
        merge_deltas(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
