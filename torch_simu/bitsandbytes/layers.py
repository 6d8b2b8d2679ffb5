"""Layers: the codes and the arithmetic of bitsandbytes' 8-bit and 4-bit layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from torch_simu._checks import problem
from torch_simu._hashes import sha256_of_all
from torch_simu.bitsandbytes.installed import require_bitsandbytes


def is_8bit(layer: nn.Module) -> bool:
    """Say whether a layer is bitsandbytes' `Linear8bitLt`."""
    return _is_named(layer, "Linear8bitLt")


def is_4bit(layer: nn.Module) -> bool:
    """Say whether a layer is bitsandbytes' `Linear4bit`."""
    return _is_named(layer, "Linear4bit")


def eight_bit_codes(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales of a layer, a `Linear8bitLt`, before or after its first forward pass.

    Returns:
        Codes, int8, `(out_features, in_features)`, and scales, float32, `(out_features,)`; code x scale / 127 is the
        weight.
    """
    weight, state = cast("Any", layer.weight), cast("Any", layer.state)
    codes = state.CB if state.CB is not None else weight.data
    scales = state.SCB if state.SCB is not None else weight.SCB
    return codes, scales


def take_codes(layer: Any) -> None:
    """Turn the codes and scales of a layer, a `Linear8bitLt`, into a plain frozen parameter and a buffer, in place."""
    codes, scales = eight_bit_codes(layer)
    layer.__dict__["_taken"] = (layer.state, layer._load_state_dict_pre_hooks)
    layer.threshold = layer.state.threshold
    del layer.state
    # Its hook takes the format out of a state dict that is loaded, in which this layer expects it.
    layer._load_state_dict_pre_hooks = type(layer._load_state_dict_pre_hooks)()
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.register_buffer("SCB", scales)
    # As bitsandbytes writes it, so that the state dict has the same keys.
    layer.register_buffer("weight_format", torch.tensor(0, dtype=torch.uint8))


def give_codes_back(layer: Any) -> None:
    """Undo `take_codes` on a layer."""
    from bitsandbytes.nn.modules import Int8Params

    codes, scales = cast("Tensor", layer.weight).data, cast("Tensor", layer.SCB)
    layer.state, layer._load_state_dict_pre_hooks = layer.__dict__.pop("_taken")
    for name in ("SCB", "weight_format", "threshold"):
        delattr(layer, name)
    layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    # As after its first forward pass; a new parameter would be quantized again when it is moved.
    layer.state.CB, layer.state.SCB = codes, scales


class _Linear8bit(torch.autograd.Function):
    """The arithmetic of bitsandbytes, without the input on the graph: the gradient needs the codes only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        threshold: float,
        decoded: bool,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        if decoded:
            return linear(x, _decoded(codes, scales, x.dtype), bias)
        functional, ops = require_bitsandbytes("8-bit layers"), torch.ops.bitsandbytes
        rows = x.reshape(-1, x.shape[-1])
        found, sizes, outliers = functional.int8_vectorwise_quant(rows.to(torch.float16), threshold=threshold)
        if threshold > 0.0:
            output = ops.int8_mixed_scaled_mm(rows, found, codes, sizes, scales, outliers, bias)[0]
        else:
            output = ops.int8_scaled_mm.default(found, codes, sizes, scales, bias=bias, dtype=x.dtype)
        return cast("Tensor", output.reshape(*x.shape[:-1], codes.shape[0]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        # Of torch operations, so that it can be differentiated again.
        codes, scales = ctx.saved_tensors
        weight = _decoded(codes, scales, gradient.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1]) @ weight
        return rows.reshape(*gradient.shape[:-1], weight.shape[1]), None, None, None, None, None


def linear_8bit(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, *, threshold: float, decoded: bool
) -> Tensor:
    """Compute what `Linear8bitLt` does, bit by bit, without keeping `x` for the backward pass.

    Args:
        x: Activations. Shape: `(..., in_features)`.
        codes: int8. Shape: `(out_features, in_features)`.
        scales: float32. Shape: `(out_features,)`.
        bias: Cast to the dtype of `x`, not in place. Shape: `(out_features,)`.
        threshold: Activations beyond it are multiplied in 16 bits; 0: none are.
        decoded: Whether to compute with the decoded weight instead of in 8 bits.
    """
    if not x.numel():
        return x.new_empty(*x.shape[:-1], len(codes))
    cast_bias = None if bias is None else bias.to(x.dtype)
    return cast("Tensor", _Linear8bit.apply(x, codes, scales, cast_bias, threshold, decoded))  # type: ignore[no-untyped-call]


def _decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # In this order, which bitsandbytes rounds in.
    return codes.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def check_unpacked(what: str, layer: nn.Module) -> None:
    """Raise where the codes of a layer were packed for inference: they pass no gradient on, and are not those loaded.

    Args:
        what: The layer, for the message.
        layer: Any layer.

    Raises:
        ValueError: If they were.
    """
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        advice = (
            "Load the model again, and call torch_simu.bitsandbytes.packing.keep_codes_as_loaded(model) "
            "before its first evaluation."
        )
        wrong = f"{what} were packed for inference by a pass without gradients"
        raise ValueError(problem(wrong, "codes as they were loaded", advice))


def holds_codes(layer: nn.Module) -> bool:
    """Say whether a layer's weight is quantized, with a delta or without."""
    return is_8bit(layer) or is_4bit(layer) or _has_plain_codes(layer)


def linear_4bit(layer: Any, x: Tensor) -> Tensor:
    """Compute what a `Linear4bit` does, without packing its codes for inference and without casting its bias.

    Args:
        layer: The layer.
        x: Activations. Shape: `(..., in_features)`.
    """
    from bitsandbytes.autograd._functions import matmul_4bit

    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    inner = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
    bias = None if layer.bias is None else layer.bias.to(inner.dtype)
    # Transposed, as its own layer passes it below version 0.50, which by that tells the sides of a square weight.
    found = matmul_4bit(inner, layer.weight.t(), bias=bias, quant_state=layer.weight.quant_state)
    return cast("Tensor", found.to(x.dtype))


def decoded_weight(layer: nn.Module) -> Tensor:
    """Return the values of a quantized layer's codes, in float32. Shape: `(out_features, in_features)`.

    Raises:
        ValueError: If 4-bit codes were packed for inference.
    """
    if is_4bit(layer):
        check_unpacked(f"The codes of a {type(layer).__name__}", layer)
        functional, weight = require_bitsandbytes("4-bit layers"), cast("Any", layer.weight)
        return cast("Tensor", functional.dequantize_4bit(weight.data, weight.quant_state)).to(torch.float32, copy=True)
    if _has_plain_codes(layer):
        return _decoded(cast("Tensor", layer.weight).detach(), cast("Tensor", layer.SCB), torch.float32)
    codes, scales = eight_bit_codes(layer)
    return _decoded(codes.detach(), scales, torch.float32)


def fingerprint(layer: nn.Module) -> str:
    """Return the sha256 of a layer's weight: of codes and scales where it is quantized.

    Raises:
        ValueError: If 4-bit codes were packed for inference.
    """
    check_unpacked(f"The codes of a {type(layer).__name__}", layer)
    parts: list[Tensor] = []
    if hasattr(layer, "state") and is_8bit(layer):
        parts += eight_bit_codes(layer)
    else:
        parts.append(cast("Tensor", layer.weight).detach())
        scales = getattr(layer, "SCB", None)
        parts += [scales] if isinstance(scales, Tensor) else []
        state = getattr(layer.weight, "quant_state", None)
        parts += [value for _, value in sorted(state.as_dict(packed=True).items())] if state is not None else []
    return sha256_of_all(("", part) for part in parts)


def _has_plain_codes(layer: nn.Module) -> bool:
    # What `take_codes` made of an 8-bit layer.
    return isinstance(layer._buffers.get("SCB"), Tensor)


def _is_named(layer: nn.Module, name: str) -> bool:
    # By name, because bitsandbytes must not be imported for models without such layers.
    return any(each.__name__ == name and each.__module__.startswith("bitsandbytes") for each in type(layer).__mro__)
