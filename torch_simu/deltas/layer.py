"""Layers with a delta: what a frozen layer computes, plus a trainable change of some of its columns or rows."""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_simu.bitsandbytes.layers import (
    eight_bit_codes,
    give_codes_back,
    is_4bit,
    is_8bit,
    linear_4bit,
    linear_8bit,
    take_codes,
)
from torch_simu.columns import Columns
from torch_simu.layers import d_model, neuron_dim, num_neurons, output_dim

if TYPE_CHECKING:
    _Layer = nn.Linear
else:
    _Layer = object


class DeltaLayer(_Layer):
    r"""What every layer with a delta is, whatever it was before: $y = \text{base}(x) + \Delta \, x_S$.

    With a delta of rows it is $y_R = \text{base}(x)_R + \Delta \, x$, plus a change of the bias where there is one, and
    $y = \text{base}(x)$ off $R$. It keeps the layer's name, parameters and hooks: only its class is another one, until
    the delta is detached.

    Attributes:
        delta: The trainable change of the selected columns, float32. Shape: `(d_model, num_selected)`; of rows
            `(num_rows, num_neurons)`.
        delta_bias: The trainable change of these outputs' entries of the bias, float32; None without a bias, and of
            columns. Shape: `(num_rows,)`.
        idx: The selected neurons, or the outputs whose rows change. Shape: `(num_selected,)` or `(num_rows,)`.
        rows: Whether the delta is of rows.
    """

    delta: nn.Parameter
    delta_bias: nn.Parameter | None
    idx: Tensor
    rows: bool

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the change of the selected columns or rows in it.

        Args:
            x: Activations. Shape: `(..., num_neurons)`.
        """
        if self.rows:
            bias = None if self.delta_bias is None else self.delta_bias.to(x.dtype)
            output, change = self._base(x), functional.linear(x, self.delta.to(x.dtype), bias)
            return output.index_add(-1, self.idx, change.to(output.dtype))
        chosen = x.index_select(-1, self.idx)
        return self._base(x) + functional.linear(chosen, self.delta.to(x.dtype))

    @property
    def columns(self) -> Columns:
        """Which entries of the weight change; of codes, of their values with the outputs first."""
        return Columns(cast("int", output_dim(self) if self.rows else neuron_dim(self)), self.idx)

    @property
    def change(self) -> Tensor:
        """The delta in the layout of the weight's own entries: those of `columns`, without a gradient."""
        delta = self.delta.detach()
        return delta if neuron_dim(self) == -1 else delta.T

    def deltas(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its name in the layer: the delta, and that of the bias where there is one."""
        bias = {} if self.delta_bias is None else {"delta_bias": self.delta_bias}
        return {"delta": self.delta, **bias}

    @torch.no_grad()
    def changed_bias(self) -> Tensor | None:
        """Return the bias with its change in it, in float32 or wider; None without a bias."""
        bias = cast("Tensor | None", self.bias)
        if bias is None or self.delta_bias is None:
            return bias
        wide = bias.to(torch.promote_types(bias.dtype, torch.float32), copy=True)
        return wide.index_add_(0, self.idx, self.delta_bias.to(wide.dtype))

    @torch.no_grad()
    def fold_bias_(self) -> None:
        """Add the change of the bias to the bias itself, rounded once."""
        if self.delta_bias is not None:
            self.bias.copy_(cast("Tensor", self.changed_bias()))

    def _base(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Delta8bit(DeltaLayer):
    """A delta beside the codes of bitsandbytes' `Linear8bitLt`, which are taken over with their scales.

    It computes what that layer does, bit by bit, but holds no activation for the backward pass, keeps the bias as it
    is, and has the scales as a buffer, so that everything is in the state dict and can be sharded.
    """

    SCB: Tensor
    threshold: float

    def _base(self, x: Tensor) -> Tensor:
        # On a processor bitsandbytes computes with the decoded weight in train mode, and in 8 bits in eval mode.
        decoded = self.training and x.device.type in ("cpu", "xpu")
        return linear_8bit(x, self.weight, self.SCB, self.bias, threshold=self.threshold, decoded=decoded)


class Delta4bit(DeltaLayer):
    """A delta beside bitsandbytes' `Linear4bit`, whose codes are never packed anew and whose bias is never cast."""

    def _base(self, x: Tensor) -> Tensor:
        return linear_4bit(self, x)


def attach(layer: nn.Module, indices: Tensor, *, rows: bool = False) -> nn.Parameter:
    """Turn a layer into one with a delta of zero, in place, and freeze its own parameters.

    Args:
        layer: The layer.
        indices: The neurons whose columns change, or with `rows` the outputs whose rows do.
        rows: Which of both.
    """
    base: Any = type(layer)
    if is_8bit(layer):
        device = eight_bit_codes(layer)[0].device
        # Its methods go by a state that this layer no longer has.
        take_codes(layer)
        layer.__class__ = _with_delta(Delta8bit, cast("Any", nn.Linear), base)
    else:
        device = cast("Tensor", layer.weight).device
        layer.__class__ = _with_delta(Delta4bit if is_4bit(layer) else DeltaLayer, base, base)
    # What was trainable is so again when the delta is detached.
    trainable = [name for name, param in layer.named_parameters(recurse=False) if param.requires_grad]
    layer.__dict__["_trainable"] = trainable
    for param in layer.parameters(recurse=False):
        param.requires_grad_(False)
    _rebind(layer, base)
    shape = delta_shape(layer, len(indices), rows=rows)
    delta = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
    layer.register_parameter("delta", delta)
    biased = rows and layer.bias is not None
    bias = nn.Parameter(torch.zeros(len(indices), dtype=torch.float32, device=device)) if biased else None
    layer.register_parameter("delta_bias", bias)
    layer.register_buffer("idx", indices.to(device))
    layer.__dict__["rows"] = rows
    return delta


def delta_shape(layer: nn.Module, count: int, *, rows: bool) -> tuple[int, int]:
    """Return the shape of a layer's delta of so many columns, or rows."""
    return (count, num_neurons(layer)) if rows else (d_model(layer), count)


def detach(layer: nn.Module) -> None:
    """Turn a layer with a delta into what it was."""
    for name in ("delta", "delta_bias", "idx", "rows"):
        delattr(layer, name)
    base = type(layer)._before  # type: ignore[attr-defined]
    _rebind(layer, type(layer), to=base)
    layer.__class__ = base
    if is_8bit(layer):
        give_codes_back(layer)
    for name in layer.__dict__.pop("_trainable"):
        getattr(layer, name).requires_grad_(True)


def has_own_forward(layer: nn.Module) -> bool:
    """Say whether a forward that stands on the layer itself passes by that of its class, for good.

    One that accelerate put there calls the layer's former forward by a name, and can be led back to the class.
    """
    former = layer.__dict__.get("_old_forward", layer.__dict__.get("forward"))
    return former is not None and not _is_of(former, type(layer), layer)


def _rebind(layer: nn.Module, before: Any, to: Any = None) -> None:
    """Lead the forwards that accelerate keeps on the layer from those of one class to those of another."""
    for key in ("forward", "_old_forward"):
        if key in layer.__dict__ and _is_of(layer.__dict__[key], before, layer):
            layer.__dict__[key] = MethodType((to or type(layer)).forward, layer)


def _is_of(method: object, kind: Any, layer: nn.Module) -> bool:
    return isinstance(method, MethodType) and method.__self__ is layer and method.__func__ is kind.forward


@cache
def _with_delta(kind: Any, base: Any, before: Any) -> type[nn.Module]:
    return type(f"Delta{before.__name__}", (kind, base), {"_before": before, "__doc__": kind.__doc__})
