"""Bits: tensors as whole numbers, so that a change is exact and can be taken back."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.columns import Columns, NeuronDim, dims_of, neurons_first

_WHOLE = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})


def bits_of(tensor: Tensor) -> Tensor:
    """Return a tensor's bits as whole numbers of the same size, sharing its memory.

    Examples:
        >>> bits_of(torch.tensor([1.0, -0.0]))
        tensor([ 1065353216, -2147483648], dtype=torch.int32)
    """
    return tensor.detach().view(_WHOLE[tensor.element_size()])


def columns_of(tensor: Tensor, dim: NeuronDim, neurons: Tensor) -> Columns:
    """Return the entries of some neurons of a tensor, to be taken with the neurons first: `(num_selected, ...)`."""
    return Columns(dims_of(dim), neurons.to(tensor.device))


def differing_neurons(before: Tensor, after: Tensor, dim: NeuronDim) -> Tensor:
    """Return the neurons in whose entries two tensors differ by a bit. Shape: `(num_differing,)`."""
    dims = len(dims_of(dim))
    different = neurons_first(bits_of(before) != bits_of(after), dim).flatten(0, dims - 1)
    # Of a bias there are no other dimensions.
    different = different.unsqueeze(-1).flatten(1)
    return different.any(dim=1).nonzero()[:, 0] if different.numel() else torch.zeros(0, dtype=torch.int64)


def check_alike(name: str, before: Tensor, after: Tensor, advice: str = "") -> None:
    """Raise where two tensors cannot differ by bits alone.

    Raises:
        ValueError: If their shapes or dtypes differ.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        wrong = f"Tensor {name!r} has shape {tuple(after.shape)} and dtype {after.dtype}"
        raise ValueError(problem(wrong, f"{tuple(before.shape)} and {before.dtype}, as in the base", advice))
