"""The tap: an identity on the edge into a layer, which meets the activation and this layer's gradient together."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torch_simu._checks import problem
from torch_simu.hooks.record import LayerRecord, NeuronHookError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a forward is called with: the positional arguments and the named ones."""


def input_dim(layer: nn.Module) -> int:
    """Return the dimension of the layer's input that the neurons are: the channels of a convolution, else the last.

    Counted from the end, so that it is the same with and without a batch.
    """
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


class InputTap:
    """Puts the identity in front of one layer: its `arg`, however it is passed, goes through it.

    Args:
        layer: The layer that will be called.
        record: Where activations and gradients go.
        arg: Position or name of the argument of the layer's `forward`.
    """

    def __init__(self, layer: nn.Module, record: LayerRecord, arg: int | str) -> None:
        self.record, self.arg, self.dim = record, arg, input_dim(layer)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(layer.forward).parameters.items()
        self.names = [name for name, parameter in parameters if parameter.kind in kinds]
        # Code that changes its input in place must not meet a view, which autograd would refuse.
        in_place = any(getattr(inner, "inplace", False) for inner in layer.modules())
        self.copies = in_place or next(layer.children(), None) is not None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> Arguments:
        """Return the arguments with the tapped input in its place."""
        position, name = self._locate(args)
        value = args[position] if position is not None else kwargs.get(name)
        activation = self._checked(value)
        if mask is not None:
            _check_mask(self.record.layer, activation.movedim(self.dim, -1).shape[:-1], mask)
        self.record.num_calls += 1
        passes_on = activation.requires_grad
        if not passes_on:
            activation = activation.detach().requires_grad_()
        call = (self, self.record.num_calls, mask)
        tapped = _Tap.apply(activation, call, self.copies, passes_on)  # type: ignore[no-untyped-call]
        if position is not None:
            return (*args[:position], tapped, *args[position + 1 :]), kwargs
        return args, {**kwargs, name: tapped}

    def _locate(self, args: tuple[Any, ...]) -> tuple[int | None, str]:
        names, arg = self.names, self.arg
        name = arg if isinstance(arg, str) else names[arg] if arg < len(names) else ""
        position = arg if isinstance(arg, int) else names.index(arg) if arg in names else len(args)
        return (position if position < len(args) else None), name

    def _checked(self, value: object) -> Tensor:
        layer = self.record.layer
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < -self.dim:
            kind = f"{value.dim()}-D tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            shape = "..., num_neurons" + ", size" * (-1 - self.dim)
            wrong = f"Argument {self.arg!r} of layer {layer!r} is a {kind}"
            advice = "Name another argument of its forward with arg=."
            raise NeuronHookError(problem(wrong, f"a floating-point tensor ({shape})", advice))
        if value.is_inference():
            wrong = f"The input of layer {layer!r} was made under torch.inference_mode()"
            raise NeuronHookError(problem(wrong, "a tensor that can have a gradient", "Clone it outside of that mode."))
        return value

    def positions(self, tensor: Tensor, mask: Tensor | None) -> Tensor:
        """Return the positions of an input, or of its gradient, that count. Shape: `(num_positions, num_neurons)`.

        On a GPU those that do not count are zeros where sums are made of them.
        """
        return positions(tensor, self.dim, mask, pick=_picks(tensor, self.record))


class OutputTap:
    """Meets the gradient of what one layer returns.

    Args:
        layer: The layer that will be called.
        record: Where gradients go.
    """

    def __init__(self, layer: nn.Module, record: LayerRecord) -> None:
        self.record, self.dim = record, input_dim(layer)

    def __call__(self, output: object, mask: Tensor | None) -> None:
        """Let the gradient of an output be recorded once it is there."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < -self.dim:
            wrong = f"Layer {self.record.layer!r} returns a {type(output).__name__}"
            raise NeuronHookError(problem(wrong, "one floating-point tensor", "Leave outputs=True for such layers."))
        self.record.num_calls += 1
        number = self.record.num_calls

        def meet(gradient: Tensor) -> None:
            if not self.record.closed:
                with torch.no_grad():
                    found = positions(gradient, self.dim, mask, pick=_picks(gradient, self.record))
                    self.record.add(number, found, found)

        if output.requires_grad:
            # On the tensor: of an output all consumers count.
            output.register_hook(meet)


def positions(tensor: Tensor, dim: int, mask: Tensor | None, *, pick: bool) -> Tensor:
    """Return the positions that count, or all of them, with zeros for those that do not.

    Args:
        tensor: An activation or a gradient.
        dim: Its neurons.
        mask: Which positions count; None: all.
        pick: Whether to leave the others out; on a GPU this waits for how many there are.
    """
    flat = rearrange(tensor.detach().movedim(dim, -1), "... neuron -> (...) neuron")
    if mask is None:
        return flat
    counts = mask.to(flat.device).flatten()
    return flat[counts] if pick else torch.where(counts.unsqueeze(-1), flat, 0)


def _picks(tensor: Tensor, record: LayerRecord) -> bool:
    # A sum is the same without them and with zeros for them, and a processor is faster without.
    return tensor.is_cpu or not isinstance(record.reduce, str)


class _Tap(torch.autograd.Function):
    """The identity, which hands its input and the gradient of its output over together.

    On the edge into the layer it meets this layer's share of the gradient only; a hook on the tensor would also sum
    the gradients of its other consumers.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, call: tuple[InputTap, int, Tensor | None], copies: bool, passes_on: bool
    ) -> Tensor:
        # Not an attribute of ctx, so that checkpointing can drop the tensor and compute it again.
        ctx.save_for_backward(activation)
        ctx.call, ctx.passes_on = call, passes_on
        return activation.clone() if copies else activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        tap, number, mask = ctx.call
        if not tap.record.closed:
            with torch.no_grad():
                tap.record.add(number, *(tap.positions(tensor, mask) for tensor in (*ctx.saved_tensors, *gradients)))
        # A gradient for an input that wanted none would only pile up in memory.
        return (gradients[0] if ctx.passes_on else None), None, None, None


def _check_mask(layer: str, leading: torch.Size, mask: Tensor) -> None:
    # Some models flatten batch and tokens before the layer; then the count is all there is to compare.
    fits = mask.shape == leading if mask.dim() == len(leading) else mask.numel() == leading.numel()
    if not fits:
        wrong = f"position_mask has shape {tuple(mask.shape)}, but layer {layer!r} has positions {tuple(leading)}"
        raise NeuronHookError(problem(wrong, "one entry per position", "Set hooks.position_mask before each forward."))
