"""Entry: the selected entries of one parameter in one step, as far as this process holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.columns import Columns, NeuronDim, dims_of
from torch_simu.layers.dtensors import is_dtensor, shard_dims

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


class Entry(NamedTuple):
    """A parameter, which of its entries train, and their gradient.

    Attributes:
        param: The parameter, perhaps sharded.
        columns: Its entries that train.
        grad: Compact gradient of this process's shard. Shape: of the shard with the selected neurons only.
        salt: A number of its own, which sets its random draws apart from those of the other parameters.
    """

    param: Tensor
    columns: Columns
    grad: Tensor
    salt: int

    def gather(self) -> Tensor:
        """Return the selected entries of this process's shard of the parameter."""
        return self.columns.gather(local(self.param))

    def write(self, value: Tensor) -> None:
        """Write the selected entries of this process's shard of the parameter."""
        self.columns.write_(local(self.param), value)

    def add(self, value: Tensor) -> None:
        """Add to the selected entries of this process's shard of the parameter."""
        self.columns.add_(local(self.param), value)


class Selected:
    """The columns of the parameters of an optimizer, each on its device, made anew only where the neurons changed."""

    def __init__(self) -> None:
        # (group, position, device) -> (the index list it was made from, the same on the device)
        self._indices: dict[tuple[int, int, torch.device], tuple[list[int], Tensor]] = {}

    def columns(self, group: Mapping[str, Any], number: int, position: int) -> Columns:
        """Return the columns of a parameter, by the number of its group and its position there.

        Raises:
            ValueError: If the parameter is distributed, and sharded along its neurons.
        """
        param, neurons, dim = group["params"][position], group["neurons"][position], group["neuron_dim"]
        if neurons is None:
            return Columns(dim, None)
        check_unsharded(param, dim, f"Parameter {position} of group {number}")
        device = local(param).device
        cached = self._indices.get((number, position, device))
        if cached is None or cached[0] is not neurons:
            cached = neurons, torch.tensor(neurons, dtype=torch.int64, device=device)
            self._indices[number, position, device] = cached
        return Columns(dim, cached[1])

    def clear(self) -> None:
        """Forget them."""
        self._indices.clear()


def entries_of(
    groups: Sequence[Mapping[str, Any]],
    numbers: Iterable[int],
    selected: Selected,
    grads: Mapping[Tensor, Tensor] | None = None,
) -> Iterator[Entry]:
    """Yield the entries of all parameters of some groups that have a gradient.

    Args:
        groups: All groups.
        numbers: Which of them.
        selected: The columns of their parameters.
        grads: Gradients to take instead of those that the parameters hold.

    Raises:
        RuntimeError: If a gradient is sparse.
        ValueError: If a distributed parameter is sharded along its neurons.
    """
    for number in numbers:
        for position, param in enumerate(groups[number]["params"]):
            grad = param.grad if grads is None else grads.get(param)
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(problem("A gradient is sparse", "dense gradients", "Use sparse=False."))
            columns = selected.columns(groups[number], number, position)
            # Half precision is gathered first and widened then, so that no dense copy is ever made.
            wide = torch.float64 if param.dtype == torch.float64 else torch.float32
            compact = columns.gather(local(aligned(grad, param))).to(wide)
            yield Entry(param, columns, compact, number * 10_007 + position)


def stored(compact: Tensor, param: Tensor, columns: Columns) -> Tensor:
    """Return a compact tensor of this process as the state keeps it: sharded like the parameter."""
    if not is_dtensor(param):
        return compact
    from torch.distributed.tensor import DTensor

    shape = columns.shape_in(param.shape)
    placements = compact_placements(param, columns.dim, whole=columns.indices is None)
    # Strides of the whole: the shards may be uneven or empty.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(compact, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a distributed tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def compact_placements(param: DTensor, dim: NeuronDim, *, whole: bool) -> list[Placement]:
    """Return how the compact state of a parameter is spread over the processes."""
    if whole or isinstance(dim, int):
        return list(param.placements)
    from torch.distributed.tensor import Shard

    neurons = {each % param.dim() for each in dim}
    rest = [each for each in range(param.dim()) if each not in neurons]
    return [Shard(1 + rest.index(each.dim)) if isinstance(each, Shard) else each for each in param.placements]


def aligned(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient laid out over the processes like its parameter."""
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def check_unsharded(param: Tensor, dim: NeuronDim, name: str) -> None:
    """Raise when the neurons of a distributed parameter are spread over processes.

    Raises:
        ValueError: If they are.
    """
    if not is_dtensor(param):
        return
    dims = {each % param.dim() for each in dims_of(dim)}
    for along in shard_dims(param):
        if along in dims:
            free = next((each for each in range(param.dim()) if each not in dims), None)
            advice = (
                "" if free is None else f"Shard it by fully_shard(..., shard_placement_fn=lambda p: Shard({free}))."
            )
            wrong = f"{name} of shape {tuple(param.shape)} is sharded along its neurons (dimension {along})"
            raise ValueError(problem(wrong, "neurons whole in every process", advice))


def summed_over_shards(values: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return scalars of the shards of parameters, each summed over the processes that hold the others.

    One exchange serves all that are spread alike.
    """
    found = list(values)
    alike: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for number, param in enumerate(params):
        if is_dtensor(param):
            dims = tuple(dim for dim, along in enumerate(shard_dims(param)) if along is not None)
            alike.setdefault((str(param.device_mesh), dims), []).append(number)
    for (_, dims), numbers in sorted(alike.items()):
        mesh = cast("DTensor", params[numbers[0]]).device_mesh
        stacked = torch.stack([values[number] for number in numbers])
        for dim in dims:
            dist.all_reduce(stacked, dist.ReduceOp.SUM, group=mesh.get_group(dim))
        for number, value in zip(numbers, stacked.unbind(), strict=True):
            found[number] = value
    return found


def agreed(finite: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return whether the gradients are finite in every process that holds a shard of a parameter."""
    meshes = {param.device_mesh for param in params if is_dtensor(param)}
    for mesh in sorted(meshes, key=str):
        flag = finite.to(mesh.device_type, torch.int32)
        for dim in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        finite = flag.bool()
    return finite
