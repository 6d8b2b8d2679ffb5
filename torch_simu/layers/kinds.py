"""Kinds of layers that hold neurons: linear layers, GPT-2's Conv1D, and experts fused into one parameter."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from torch_simu._checks import problem
from torch_simu.columns import NeuronDim


def is_neuron_layer(module: nn.Module) -> bool:
    """Say whether the inputs of `module` are neurons: `nn.Linear`, its quantized kinds, or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def is_fused_experts(module: nn.Module) -> bool:
    """Say whether `module` holds the down projections of all its experts in one parameter of three dimensions.

    So do the mixtures of experts of transformers 5. Their neurons are the hidden activations inside the module, expert
    by expert, which no input or output of a module shows.
    """
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def kind_of(module: nn.Module) -> str:
    """Return the class of a module for a message: with its path, unless it is one of torch's own."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__qualname__}"


def has_neurons(module: nn.Module) -> bool:
    """Say whether `module` holds neurons, as its inputs or inside."""
    return is_neuron_layer(module) or is_fused_experts(module)


def neuron_weight(module: nn.Module) -> nn.Parameter:
    """Return the parameter whose columns belong to the neurons.

    Raises:
        TypeError: If `module` has no neurons.

    Examples:
        >>> neuron_weight(nn.Linear(4, 2)).shape
        torch.Size([2, 4])
    """
    if is_fused_experts(module):
        return cast("nn.Parameter", module.down_proj)
    return cast("nn.Parameter", _checked(module).weight)


def neuron_dim(module: nn.Module) -> NeuronDim:
    """Return what of the weight the neurons are: -1 for linear layers, 0 for GPT-2's `Conv1D`.

    For fused experts it is (0, 2), or (0, 1) where the parameter is transposed: neuron `k` of expert `e` of
    `num_experts` has index `e * num_neurons / num_experts + k`.

    Raises:
        TypeError: If `module` has no neurons.

    Examples:
        >>> neuron_dim(nn.Linear(4, 2))
        -1
    """
    if is_fused_experts(module):
        return (0, 1) if _is_transposed(module) else (0, 2)
    return 0 if _is_conv1d(_checked(module)) else -1


def output_dim(module: nn.Module) -> int:
    """Return which dimension of the weight the outputs of a linear layer are: 0, or -1 for GPT-2's `Conv1D`.

    Raises:
        TypeError: If `module` is no linear layer.

    Examples:
        >>> output_dim(nn.Linear(4, 2))
        0
    """
    return -1 if _is_conv1d(_checked(module)) else 0


def num_neurons(module: nn.Module) -> int:
    """Return the number of input features of a linear layer, also where its weight is packed; of experts, of all.

    Raises:
        TypeError: If `module` has no neurons.

    Examples:
        >>> num_neurons(nn.Linear(4, 2))
        4
    """
    if is_fused_experts(module):
        shape = neuron_weight(module).shape
        return shape[0] * shape[1 if _is_transposed(module) else 2]
    return int(getattr(_checked(module), "nx" if _is_conv1d(module) else "in_features"))


def d_model(module: nn.Module) -> int:
    """Return the number of output features of a layer with neurons."""
    if is_fused_experts(module):
        return neuron_weight(module).shape[2 if _is_transposed(module) else 1]
    return int(getattr(_checked(module), "nf" if _is_conv1d(module) else "out_features"))


def _is_transposed(module: nn.Module) -> bool:
    shape: torch.Size = neuron_weight(module).shape
    width = getattr(module, "hidden_dim", None) or getattr(module, "hidden_size", None)
    if isinstance(width, int) and shape[1] != shape[2]:
        return shape[2] == width
    return bool(getattr(module, "is_transposed", False))


def _is_conv1d(module: nn.Module) -> bool:
    # By name, because transformers must not be imported for models that do not come from there.
    return (
        any(each.__name__ == "Conv1D" for each in type(module).__mro__)
        and hasattr(module, "nx")
        and hasattr(module, "nf")
    )


def _checked(module: nn.Module) -> nn.Module:
    if not is_neuron_layer(module):
        raise TypeError(problem(f"The layer is a {kind_of(module)}", "nn.Linear, Conv1D or fused experts"))
    return module
