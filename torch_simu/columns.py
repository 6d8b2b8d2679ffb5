"""Columns: the entries of a tensor that belong to some of its neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

NeuronDim: TypeAlias = int | tuple[int, ...]
"""The dimension that neurons are counted along, or several, which count them together, the last one fastest."""


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Which entries of a tensor: those of the neurons `indices`, counted along `dim`.

    Taken along one dimension, the neurons keep their place among the dimensions; taken along several, also along a
    tuple of one, they come first: `(num_selected, *rest)`.

    Attributes:
        dim: What counts the neurons.
        indices: Which, without duplicates, on the device of the tensors; None: every entry. Shape: `(num_selected,)`.

    Examples:
        >>> weight = torch.arange(6).reshape(2, 3)
        >>> Columns(-1, torch.tensor([0, 2])).gather(weight)
        tensor([[0, 2],
                [3, 5]])
        >>> Columns((0, 1), torch.tensor([0, 5])).gather(weight)
        tensor([0, 5])
    """

    dim: NeuronDim
    indices: Tensor | None

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the entries as a new tensor; the tensor itself where they are all of it.

        Shape: that of the tensor, with as many neurons in `dim` as are selected; neurons first where `dim` is several.
        """
        if self.indices is None:
            return tensor
        if isinstance(self.dim, int):
            return tensor.index_select(self.dim, self.indices)
        # What brackets call: they look for the driver of a device first, which fake tensors do not need.
        found: Tensor = torch.ops.aten.index.Tensor(self._first(tensor), list(self._coordinates(tensor)))
        return found

    def write_(self, tensor: Tensor, value: Tensor) -> None:
        """Write the entries. Shape of `value`: as `gather` returns it."""
        if self.indices is None:
            tensor.copy_(value)
        elif isinstance(self.dim, int):
            tensor.index_copy_(self.dim, self.indices, value)
        else:
            self._first(tensor).index_put_(self._coordinates(tensor), value)

    def add_(self, tensor: Tensor, value: Tensor) -> None:
        """Add to the entries. Shape of `value`: as `gather` returns it."""
        if self.indices is None:
            tensor.add_(value)
        elif isinstance(self.dim, int):
            # It reads the scattered entries once, where gathering and writing reads them twice.
            tensor.index_add_(self.dim, self.indices, value)
        else:
            self.write_(tensor, self.gather(tensor) + value)

    def xor_(self, tensor: Tensor, change: Tensor) -> None:
        """Flip bits of the entries of a tensor of whole numbers. Shape of `change`: as `gather` returns it."""
        self.write_(tensor, self.gather(tensor) ^ change)

    def shape_in(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of what `gather` returns of a tensor of this shape.

        Examples:
            >>> Columns((0, 2), torch.tensor([1, 4])).shape_in((2, 3, 4))
            torch.Size([2, 3])
        """
        return compact_shape(shape, self.dim, None if self.indices is None else self.indices.numel())

    def _first(self, tensor: Tensor) -> Tensor:
        return neurons_first(tensor, self.dim)

    def _coordinates(self, tensor: Tensor) -> tuple[Tensor, ...]:
        assert self.indices is not None
        assert not isinstance(self.dim, int)
        # By arithmetic, because torch.unravel_index copies the sizes to the device each time, and waits for it.
        rest, coordinates = self.indices, []
        for size in (tensor.shape[dim] for dim in reversed(self.dim)):
            coordinates.append(rest % size)
            rest = rest // size
        return tuple(reversed(coordinates))


def dims_of(dim: NeuronDim) -> tuple[int, ...]:
    """Return the dimensions that count neurons, as a tuple."""
    return (dim,) if isinstance(dim, int) else tuple(dim)


def neurons_first(tensor: Tensor, dim: NeuronDim) -> Tensor:
    """Return a tensor with the dimensions that count neurons first, sharing its memory.

    Shape: the sizes of `dim` in its order, then the others in theirs.
    """
    dims = dims_of(dim)
    return tensor.movedim(dims, tuple(range(len(dims))))


def num_columns(shape: Sequence[int], dim: NeuronDim) -> int:
    """Return how many neurons a tensor of this shape has, counted along `dim`.

    Examples:
        >>> num_columns((2, 3, 4), (0, 2))
        8
    """
    return torch.Size([shape[each] for each in dims_of(dim)]).numel()


def compact_shape(shape: Sequence[int], dim: NeuronDim, count: int | None) -> torch.Size:
    """Return the shape of the entries of `count` neurons along `dim` of a tensor of this shape; None: of all entries.

    Examples:
        >>> compact_shape((2, 3), -1, 1)
        torch.Size([2, 1])
    """
    sizes = list(shape)
    if count is None:
        return torch.Size(sizes)
    if isinstance(dim, int):
        sizes[dim] = count
        return torch.Size(sizes)
    neurons = {each % len(sizes) for each in dim}
    return torch.Size([count, *(size for each, size in enumerate(sizes) if each not in neurons)])
