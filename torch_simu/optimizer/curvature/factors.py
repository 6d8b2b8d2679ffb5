"""Factors: what hooks saw of each trained layer, as the covariances by which its gradient is whitened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.bitsandbytes.layers import decoded_weight, holds_codes
from torch_simu.columns import neurons_first
from torch_simu.hooks import NeuronHookError, NeuronHooks
from torch_simu.layers import neuron_dim, output_dim
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.optimizer.counters import unrefreshed
from torch_simu.optimizer.entries import Entry, local, summed_over_shards
from torch_simu.optimizer.groups import selects_rows
from torch_simu.optimizer.stepping.trust import factor_keys
from torch_simu.whitening import damped_cholesky, undamped


class Trained(NamedTuple):
    """The selected entries of a parameter, and the hooked layer that it is of.

    Attributes:
        entry: The entries; its gradient is not looked at, but for its dtype.
        group: The options of its group.
        layer: The layer.
        name: Name of the layer.
        neurons: The layer's neurons whose columns train, or its outputs whose rows do, in order. Shape:
            `(num_selected,)`.
    """

    entry: Entry
    group: Mapping[str, Any]
    layer: nn.Module
    name: str
    neurons: Tensor


class Covariances(NamedTuple):
    """What one refresh found of a layer, over all processes: means over `num_positions`, which may be zero.

    Those of gradients have a mean diagonal of one. `sides` has them by the key of the state that their factor goes to.
    """

    sides: Mapping[str, Tensor]
    num_positions: Tensor


def trained_layers(entries: Iterable[tuple[Mapping[str, Any], Entry]], hooks: NeuronHooks) -> Iterator[Trained]:
    """Yield entries of weights, given with their groups, each with its hooked layer.

    Raises:
        ValueError: If no hook sees the layer of one of them.
    """
    owners: dict[Tensor, tuple[str, nn.Module]] = {}
    for name, layer in hooks.layers.items():
        owners.update((param, (name, layer)) for param in layer.parameters(recurse=False))
    for group, entry in entries:
        param, dim, shape = entry.param, group["neuron_dim"], tuple(entry.param.shape)
        if param.dim() != 2:
            # A bias has no neurons: it moves along its plain gradient.
            continue
        if param not in owners:
            advice = 'Pass hooks of register_neuron_hooks(model, selection, reduce="covariance").'
            wrong = f"No hook sees the layer of a parameter that trains, of shape {shape}"
            raise ValueError(problem(wrong, "a hook on every layer that trains", advice))
        name, layer = owners[param]
        indices, delta = entry.columns.indices, is_delta(param, layer)
        check_side(group, param, name, layer)
        if delta and layer.rows and is_dtensor(param):
            advice = 'Take curvature="gnb", or processes that each hold the whole model (DDP).'
            raise ValueError(problem(f"The delta of rows of layer {name!r} is sharded", "a whole one", advice))
        if indices is None:
            columns = cast("Tensor", layer.idx) if delta else torch.arange(shape[dim], device=local(param).device)
        else:
            columns = cast("Tensor", layer.idx).index_select(0, indices) if delta else indices
        yield Trained(entry, group, layer, name, columns)


def check_side(group: Mapping[str, Any], param: Tensor, name: str, layer: nn.Module) -> None:
    """Raise where a group selects the other side of a layer than it says.

    Raises:
        ValueError: If it selects outputs as neurons, or neurons as outputs.
    """
    delta = is_delta(param, layer)
    # A delta has its outputs first, whatever the layout of the weight.
    rows = group["neuron_dim"] % 2 != (1 if delta else cast("int", neuron_dim(layer)) % 2)
    if selects_rows(group) == rows and (not delta or layer.rows == rows):
        return
    wrong = f"The optimizer selects {'inputs' if selects_rows(group) else 'outputs'} of layer {name!r}"
    expected = "outputs, as its group says" if selects_rows(group) else "neurons, which are its inputs"
    groups = "torch_simu.deltas.trained_groups" if delta else "selection.param_groups"
    advice = f'Take curvature="gnb" for that group, or groups of {groups}, with units=True.'
    raise ValueError(problem(wrong, expected, advice))


def covariances(
    layers: Sequence[Trained], hooks: NeuronHooks, process_group: dist.ProcessGroup | None
) -> Iterator[Covariances]:
    """Yield what all processes recorded of each of some layers, made as it is asked for.

    Raises:
        ValueError: If the hooks are of other neurons than those that train.
        NeuronHookError: If none of the layers recorded anything in this process.
    """
    recorded = [hooks.recorded(trained.name) for trained in layers]
    if layers and not any(recorded):
        # The error of any of them names the likely causes.
        raise NeuronHookError(str(_error(hooks, layers[0].name)))
    for trained, has in zip(layers, recorded, strict=True):
        grad, shape, dim = trained.entry.grad, trained.entry.param.shape, cast("int", trained.group["neuron_dim"])
        keys = factor_keys(trained.group)
        # Of the whole other side, also where this process holds a part of it only.
        sizes = {"neuron_factor": len(trained.neurons)}
        sides = {key: grad.new_zeros(size, size) for key in keys for size in [sizes.get(key, shape[(dim + 1) % 2])]}
        count = torch.zeros((), dtype=torch.int64, device=grad.device)
        if has:
            sides = {key: _seen(trained, hooks, key).to(grad) for key in keys}
            count = hooks.num_positions(trained.name).to(grad.device)
        if dist.is_available() and dist.is_initialized():
            # Sums that were added up before are only scaled, and the count with them; what hooks hold stays as it is.
            count, sides = count.clone(), {key: each.clone() for key, each in sides.items()}
            for each in (*sides.values(), count):
                dist.all_reduce(each, dist.ReduceOp.SUM, process_group)
        of_gradients = "neuron_factor" if selects_rows(trained.group) else "output_factor"
        means = {key: _unit(each) if key == of_gradients else each / count.clamp(min=1) for key, each in sides.items()}
        yield Covariances(means, count)


def _seen(trained: Trained, hooks: NeuronHooks, key: str) -> Tensor:
    """Return what hooks summed up for one side of a layer: of what trains, or of the whole other side."""
    rows = selects_rows(trained.group)
    outputs = key == "output_factor" or (rows and key == "neuron_factor")
    total = hooks.outputs[trained.name] if outputs else hooks[trained.name]
    if key == "output_factor":
        return total
    if key == "input_factor":
        seen, width = hooks.neurons(trained.name), trained.entry.param.shape[(trained.group["neuron_dim"] + 1) % 2]
        if seen is not None and len(seen) != width:
            wrong = f"The hooks on layer {trained.name!r} see {len(seen)} of its {width} inputs"
            raise ValueError(problem(wrong, "all, since rows of it train", "Register them with its name alone."))
        return total
    places = _places(trained, hooks, outputs=outputs)
    if len(places) == len(total) and trained.entry.columns.indices is None and not _trains_delta(trained):
        return total
    places = places.to(total.device)
    return total.index_select(0, places).index_select(1, places)


def _unit(covariance: Tensor) -> Tensor:
    """Return a covariance with a mean diagonal of one: gradients come at the scale of a loss, which says nothing."""
    return covariance / covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)


def fold_factors(state: dict[str, Any], trained: Trained, found: Covariances, finite: Tensor | bool) -> None:
    """Average covariances into the state of a parameter, which keeps their Cholesky factors only.

    Where no position was reached, or `finite` is false, a factor stays what it was.
    """
    beta2, damping = trained.group["betas"][1], trained.group["damping"]
    # A model may be spread over several devices, and one of them says whether all is finite.
    chosen = found.num_positions > 0
    chosen = chosen & (finite.to(chosen.device) if isinstance(finite, Tensor) else finite)
    for key, covariance in found.sides.items():
        covariance = torch.where(chosen, covariance, 0)
        before = None if unrefreshed(trained.group) else state.get(key)
        mixed = covariance if before is None else torch.lerp(undamped(before, damping=damping), covariance, 1 - beta2)
        factor = damped_cholesky(mixed, damping=damping)
        state[key] = factor if before is None else torch.where(chosen, factor, before)
    state["weight_norm"] = weight_norm(trained.entry, trained)


def weight_norm(entry: Entry, trained: Trained | None = None, layers: Iterable[nn.Module] = ()) -> Tensor:
    """Return the norm of the selected weights, over all processes; of a delta, with the weights beside it.

    Args:
        entry: The entries that train.
        trained: The same with their layer; None: they are of a bias.
        layers: Those that may have a delta of that bias.
    """
    values = entry.gather()
    if trained is not None and _trains_delta(trained):
        layer = trained.layer
        weight = decoded_weight(layer) if holds_codes(layer) else local(cast("Tensor", layer.weight)).detach()
        dim = output_dim(layer) if layer.rows else neuron_dim(layer)
        kept = neurons_first(weight, dim).index_select(0, trained.neurons.to(weight.device))
        values = (kept if layer.rows else kept.T) + values
    for layer in layers if trained is None else ():
        if entry.param is getattr(layer, "delta_bias", None):
            places, indices = cast("Tensor", layer.idx), entry.columns.indices
            places = places if indices is None else places.index_select(0, indices)
            values = cast("Tensor", layer.bias).detach().index_select(0, places) + values
    square = values.to(entry.grad.dtype).square().sum()
    return summed_over_shards([square], [entry.param])[0].sqrt()


def is_delta(param: Tensor, layer: nn.Module) -> bool:
    """Say whether a parameter is the change of some columns or rows, kept beside the weight."""
    return param is getattr(layer, "delta", None)


def _trains_delta(trained: Trained) -> bool:
    return is_delta(trained.entry.param, trained.layer)


def _error(hooks: NeuronHooks, layer: str) -> NeuronHookError:
    try:
        hooks[layer]
    except NeuronHookError as error:
        return error
    raise AssertionError(layer)


def _places(trained: Trained, hooks: NeuronHooks, *, outputs: bool) -> Tensor:
    """Return where the neurons that train are among those that a hook saw."""
    seen, count = hooks.neurons(trained.name, outputs=outputs), len(trained.neurons)
    if seen is not None and trained.entry.columns.indices is None and not _trains_delta(trained):
        # All train: whether all were seen tells their number, for which no device is read.
        places = trained.neurons if len(seen) == count else None
    else:
        places = hooks.places(trained.name, trained.neurons, outputs=outputs)
    if places is None:
        what = "outputs" if outputs else "neurons"
        wrong = f"The hooks on layer {trained.name!r} see {len(cast('Tensor', seen))} {what}, and not all that train"
        advice = "Register them with the selection that trains."
        raise ValueError(problem(wrong, f"the {count} that train among them", advice))
    return places
