"""Entry: the selected entries of one parameter in one step, as far as this process holds them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from torch_simu._checks import problem

NeuronDim: TypeAlias = int | tuple[int, ...]
"""The dimension that neuron indices count, or several, which they count together, the last one fastest."""


class Entry(NamedTuple):
    """Where a parameter is in the groups, which of its entries train, and their gradient.

    Attributes:
        param: The parameter, perhaps sharded.
        number: Of its group.
        position: In its group.
        chosen: Indices of the selected neurons; None: all.
        dim: What they count.
        grad: Compact gradient of this process's shard. Shape: of the shard with the selected neurons only.
    """

    param: Tensor
    number: int
    position: int
    chosen: Tensor | None
    dim: NeuronDim
    grad: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the selected entries of this process's shard of a tensor that is laid out like the parameter."""
        tensor = local(tensor)
        if self.chosen is None:
            return tensor
        if isinstance(self.dim, int):
            return tensor.index_select(self.dim, self.chosen)
        return tensor.movedim(self.dim, tuple(range(len(self.dim))))[self._coordinates(tensor)]

    def write(self, value: Tensor) -> None:
        """Write the selected entries of this process's shard of the parameter."""
        param = local(self.param)
        if self.chosen is None:
            param.copy_(value)
        elif isinstance(self.dim, int):
            param.index_copy_(self.dim, self.chosen, value)
        else:
            param.movedim(self.dim, tuple(range(len(self.dim))))[self._coordinates(param)] = value

    @property
    def addable(self) -> bool:
        """Whether `add` knows how to."""
        return self.chosen is not None and isinstance(self.dim, int)

    def add(self, value: Tensor) -> None:
        """Add to the selected entries of this process's shard of the parameter."""
        assert self.chosen is not None
        assert isinstance(self.dim, int)
        local(self.param).index_add_(self.dim, self.chosen, value)

    def stored(self, compact: Tensor) -> Tensor:
        """Return a compact tensor of this process as the state keeps it: sharded like the parameter."""
        if not isinstance(self.param, DTensor):
            return compact
        shape, placements = compact_layout(self.param, self.dim, None if self.chosen is None else len(self.chosen))
        # Strides of the whole: the shards may be uneven or empty.
        stride = torch.empty(shape, device="meta").stride()
        mesh = self.param.device_mesh
        return DTensor.from_local(compact, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def _coordinates(self, tensor: Tensor) -> tuple[Tensor, ...]:
        assert self.chosen is not None
        assert not isinstance(self.dim, int)
        return torch.unravel_index(self.chosen, [tensor.shape[dim] for dim in self.dim])


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a distributed tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compact_layout(param: Tensor, dim: NeuronDim, count: int | None) -> tuple[list[int], list[Placement]]:
    """Return the whole shape of a parameter's compact state, and how it is spread over the processes.

    Args:
        param: The parameter.
        dim: What its neurons are counted along.
        count: Number of selected neurons; None: the state has the parameter's shape.
    """
    shape, placements = list(param.shape), list(param.placements) if isinstance(param, DTensor) else []
    if count is None:
        return shape, placements
    if isinstance(dim, int):
        shape[dim] = count
        return shape, placements
    neurons = {each % len(shape) for each in dim}
    rest = [each for each in range(len(shape)) if each not in neurons]
    moved = [Shard(1 + rest.index(each.dim)) if isinstance(each, Shard) else each for each in placements]
    return [count, *(shape[each] for each in rest)], moved


def num_indices(shape: torch.Size, dim: NeuronDim) -> int:
    """Return how many neurons a parameter of this shape has."""
    return shape[dim] if isinstance(dim, int) else torch.Size([shape[each] for each in dim]).numel()


def aligned(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient laid out over the processes like its parameter."""
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def check_unsharded(param: Tensor, dim: NeuronDim, name: str) -> None:
    """Raise when the neurons of a distributed parameter are spread over processes.

    Raises:
        ValueError: If they are.
    """
    if not isinstance(param, DTensor):
        return
    dims = {each % param.dim() for each in ((dim,) if isinstance(dim, int) else dim)}
    for placement in param.placements:
        if isinstance(placement, Shard) and placement.dim in dims:
            free = next((each for each in range(param.dim()) if each not in dims), None)
            advice = (
                "" if free is None else f"Shard it by fully_shard(..., shard_placement_fn=lambda p: Shard({free}))."
            )
            wrong = f"{name} of shape {tuple(param.shape)} is sharded along its neurons (dimension {placement.dim})"
            raise ValueError(problem(wrong, "neurons whole in every process", advice))


def agreed(finite: Tensor, entries: list[Entry]) -> Tensor:
    """Return whether the gradients are finite in every process that holds a shard of a parameter."""
    meshes = {entry.param.device_mesh for entry in entries if isinstance(entry.param, DTensor)}
    for mesh in sorted(meshes, key=str):
        flag = finite.to(mesh.device_type, torch.int32)
        for dim in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        finite = flag.bool()
    return finite
