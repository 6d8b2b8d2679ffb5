"""Trust steps: a whitened gradient moves each layer by a share of the norm of its selected weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.columns import NeuronDim
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.optimizer.counters import unrefreshed
from torch_simu.optimizer.entries import Entry, local, stored, summed_over_shards
from torch_simu.optimizer.groups import selects_rows
from torch_simu.optimizer.stepping.directions import Directions
from torch_simu.optimizer.stepping.writing import adds, selected_weight, step_size, write_weight
from torch_simu.optimizer.storage import read, write
from torch_simu.whitening import trust_step_, trust_update_, whiten


def waits_for_state(group: Mapping[str, Any]) -> bool:
    """Say whether a step is of size zero before any refresh.

    So torch.distributed.checkpoint makes the state of a new optimizer, before it loads into it.
    """
    if not unrefreshed(group):
        return False
    lr = group["lr"]
    return bool(lr == 0) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else False


def make_room(group: Mapping[str, Any], entries: Sequence[Entry], states: Sequence[dict[str, Any]]) -> None:
    """Put zeros into the state where a refresh puts factors and the norm of the weights."""
    for entry, state in zip(entries, states, strict=True):
        state["weight_norm"] = entry.grad.new_zeros(())
        if entry.param.dim() != 2:
            continue
        dim = cast("int", group["neuron_dim"]) % 2
        for key in factor_keys(group):
            # Of the whole other side, also where this process holds a part of it; neurons are whole in every process.
            size = entry.grad.shape[dim] if key == "neuron_factor" else entry.param.shape[1 - dim]
            state[key] = entry.grad.new_zeros(size, size)


def factor_keys(group: Mapping[str, Any]) -> list[str]:
    """Return the keys of the state that hold the factors of a group's curvature.

    Columns are whitened by their neurons, and with "both" by their outputs beside them; rows by their inputs, and with
    "both" by the gradients of the selected outputs.
    """
    both = group["curvature"] == "both"
    if selects_rows(group):
        return ["neuron_factor", "input_factor"] if both else ["input_factor"]
    return ["neuron_factor", "output_factor"] if both else ["neuron_factor"]


def trust_entries(
    group: Mapping[str, Any],
    entries: Sequence[Entry],
    states: Sequence[dict[str, Any]],
    finite: Tensor | bool,
    kept: Directions,
) -> None:
    """Make one step of a group.

    Args:
        group: Its options.
        entries: Of its parameters that have a gradient.
        states: Aligned with `entries`.
        finite: True, or a scalar on the device; where that is false nothing changes.
        kept: Directions that were made before.

    Raises:
        RuntimeError: If the curvature was never refreshed.
    """
    if unrefreshed(group) or any("weight_norm" not in state for state in states):
        wrong = f"The curvature {group['curvature']!r} was never refreshed for these neurons"
        advice = "Call it before step whenever hessian_due says so."
        raise RuntimeError(problem(wrong, "update_curvature(hooks) before the first step", advice))
    directions = []
    for entry, state in zip(entries, states, strict=True):
        direction = kept.take(group, entry, state)
        directions.append(whitened(group, entry, state) if direction is None else direction)
    squares = [square_norm(direction) for direction in directions]
    norms = [each.sqrt() for each in summed_over_shards(squares, [entry.param for entry in entries])]
    for entry, state, direction, norm in zip(entries, states, directions, norms, strict=True):
        _step(group, entry, state, direction, norm, finite.to(norm.device) if isinstance(finite, Tensor) else True)


def whitened(group: Mapping[str, Any], entry: Entry, state: Mapping[str, Any]) -> Tensor:
    """Return the whitened gradient, in the shape of the compact one."""
    grad = -entry.grad if group["maximize"] else entry.grad
    factor, other = state.get("neuron_factor"), state.get("output_factor", state.get("input_factor"))
    dim = group["neuron_dim"]
    if factor is not None:
        grad = neurons_last(whiten(neurons_last(grad, dim), factor), dim)
    if other is None:
        return grad
    if not is_dtensor(entry.param):
        return neurons_last(whiten(neurons_last(grad, dim), None, other), dim)
    from torch.distributed.tensor import distribute_tensor

    # The other side is spread over the processes, and every part of it depends on all.
    spread = stored(grad, entry.param, entry.columns)
    assert is_dtensor(spread)
    whole = neurons_last(whiten(neurons_last(spread.full_tensor(), dim), None, other), dim)
    return local(distribute_tensor(whole, spread.device_mesh, spread.placements, src_data_rank=None))


def square_norm(direction: Tensor) -> Tensor:
    """Return the square of the norm of a matrix, as a scalar."""
    # By rows first: in one pass the float32 sum of a large layer is wrong in the fourth digit, and squares that are
    # written out cost more than the sum. A shard may be without rows.
    rows = torch.linalg.vector_norm(direction, dim=-1) if direction.dim() else direction
    norm: Tensor = torch.linalg.vector_norm(rows)
    return norm.square()


def neurons_last(matrix: Tensor, dim: NeuronDim) -> Tensor:
    """Return a weight, or what has its shape, as `(d_model, num_selected)`; applied twice it is as it was."""
    return matrix if dim in (-1, 1) else matrix.T


def _step(
    group: Mapping[str, Any],
    entry: Entry,
    state: dict[str, Any],
    direction: Tensor,
    norm: Tensor,
    finite: Tensor | bool,
) -> None:
    exp_avg = read(state, "exp_avg", direction.dtype)
    if isinstance(finite, Tensor):
        # lerp(m, m) is m exactly, and a step of length zero keeps the weight: nothing changes, without a sync.
        direction, norm = torch.where(finite, direction, exp_avg), torch.where(finite, norm, 1.0)
    options: dict[str, Any] = {
        "lr": step_size(group["lr"], finite),
        "beta1": group["betas"][0],
        "direction_norm": norm,
        "weight_norm": state["weight_norm"].to(direction),
    }
    if adds(group, entry, state, finite):
        entry.add(trust_update_(direction, exp_avg, **{**options, "lr": -options["lr"]}))
    else:
        weight = selected_weight(entry, state)
        trust_step_(weight, direction, exp_avg, weight_decay=group["weight_decay"], **options)
        write_weight(group, entry, weight, finite)
    write(state, "exp_avg", exp_avg)
    state["step"] += finite if isinstance(finite, Tensor) else 1
