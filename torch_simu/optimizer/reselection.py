"""Reselection: from the groups and the state of one selection to those of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.columns import Columns, NeuronDim
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer.counters import make_due
from torch_simu.optimizer.entries import local, stored
from torch_simu.optimizer.storage import SHAPED

Neurons = list[list[int] | None]


def reselect(
    groups: Sequence[dict[str, Any]], state: dict[Tensor, dict[str, Any]], selection: NeuronSelection, model: nn.Module
) -> list[dict[str, Any]]:
    """Let groups and state be those of another selection, and return the groups that are to be added.

    Raises:
        ValueError: If the model holds none of the parameters, or a layer trains whole already.
        TypeError: If `selection` or `model` is something else.
    """
    changed, joining = reselected_groups(groups, selection, model)
    for number, neurons in changed.items():
        group = groups[number]
        for param, old, new in zip(group["params"], group["neurons"], neurons, strict=True):
            if old is not None and new is not None and state.get(param):
                state[param] = reselected_state(state[param], param, old, new, group["neuron_dim"])
        group["neurons"] = neurons
        make_due(group)
    return join(groups, joining)


class Joining(NamedTuple):
    """A parameter that was not trained before, and the number of the group it joins; None: a new one."""

    number: int | None
    name: str
    param: Tensor
    neurons: list[int]
    dim: NeuronDim


def reselected_groups(
    groups: Sequence[Mapping[str, Any]], selection: NeuronSelection, model: nn.Module
) -> tuple[dict[int, Neurons], list[Joining]]:
    """Return the new `neurons` of each group that has selected neurons, and what joins the groups.

    A parameter joins the first group that selects along the same dimension, so that it has that group's options.

    Raises:
        ValueError: If the model holds none of the parameters, or a layer trains whole already.
        TypeError: If `selection` or `model` is something else.
    """
    for name, value, kind in (("selection", selection, NeuronSelection), ("model", model, nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(problem(f"{name} is of type {type(value).__name__}", f"a {kind.__name__}"))
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    if not any(param in names for group in groups for param in group["params"]):
        wrong = "The model holds none of the optimizer's parameters"
        raise ValueError(problem(wrong, "the model that is trained", "Pass it as it is, not a copy."))
    flags = {param: param.requires_grad for param in names}
    wanted: dict[Tensor, tuple[list[int], NeuronDim]] = {}
    for group in selection.param_groups(model, attention="frozen"):
        for param, neurons in _pairs(group):
            wanted[param] = (cast("list[int]", neurons), cast("NeuronDim", group["neuron_dim"]))
    whole = {param for group in groups for param, old in _pairs(group) if old is None}
    failed = not whole.isdisjoint(wanted)
    for param, flag in flags.items():
        if failed or param in whole:
            param.requires_grad_(flag)
    if failed:
        wrong = "A layer of the selection trains whole in this optimizer"
        raise ValueError(problem(wrong, "layers whose neurons are selected", "Make a new optimizer."))
    selecting = [number for number, group in enumerate(groups) if any(old is not None for old in group["neurons"])]
    changed = {
        number: [None if old is None else wanted.pop(param, ([], None))[0] for param, old in _pairs(groups[number])]
        for number in selecting
    }
    joining = [
        Joining(
            next((number for number in selecting if groups[number]["neuron_dim"] == dim), None),
            names[param],
            param,
            neurons,
            dim,
        )
        for param, (neurons, dim) in wanted.items()
    ]
    return changed, joining


def join(groups: Sequence[dict[str, Any]], joining: Sequence[Joining]) -> list[dict[str, Any]]:
    """Add parameters to the groups they join, and return the new groups that the others need."""
    new = []
    named = any("param_names" in group for group in groups)
    for number, name, param, neurons, dim in joining:
        if number is None:
            new.append({"params": [(name, param) if named else param], "neurons": [neurons], "neuron_dim": dim})
            continue
        groups[number]["params"].append(param)
        groups[number]["neurons"].append(neurons)
        if named:
            groups[number]["param_names"].append(name)
    return new


def reselected_state(
    state: Mapping[str, Any], param: Tensor, old: Sequence[int], new: Sequence[int], dim: NeuronDim
) -> dict[str, Any]:
    """Return a parameter's state for other neurons: kept where they are in both, zero where they are new.

    Master weights of new neurons are the parameter's own.
    """
    along = dim if isinstance(dim, int) else 0
    place = {neuron: position for position, neuron in enumerate(old)}
    kept = [position for position, neuron in enumerate(new) if neuron in place]
    device = local(param).device

    def indices(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    target, source = indices(kept), indices([place[new[position]] for position in kept])
    columns = Columns(dim, indices(new))
    weights = columns.gather(local(param))
    result: dict[str, Any] = {"step": state["step"]}
    for key in SHAPED:
        if key in state:
            before = local(state[key])
            after = weights.to(before.dtype, copy=True)
            if key != "master":
                after.zero_()
            after.index_copy_(along, target, before.index_select(along, source))
            result[key] = stored(after, param, columns)
    return result


def _pairs(group: Mapping[str, Any]) -> list[tuple[Tensor, list[int] | None]]:
    return list(zip(group["params"], group["neurons"], strict=True))
