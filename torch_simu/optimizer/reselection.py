"""Reselection: from the groups and the state of one selection to those of another."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.columns import Columns, NeuronDim, dims_of
from torch_simu.neurons import NeuronSelection
from torch_simu.optimizer.counters import make_due
from torch_simu.optimizer.entries import local, stored
from torch_simu.optimizer.groups import selects_rows
from torch_simu.optimizer.storage import SHAPED

Neurons = list[list[int] | None]


def reselect(
    groups: Sequence[dict[str, Any]], state: dict[Tensor, dict[str, Any]], selection: NeuronSelection, model: nn.Module
) -> list[dict[str, Any]]:
    """Let groups and state be those of another selection, and return the groups that are to be added.

    Raises:
        ValueError: If the model holds none of the parameters, or a layer trains otherwise already.
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
    leaving = {each.param for each in joining}
    for group in groups:
        kept = [place for place, param in enumerate(group["params"]) if param not in leaving]
        for key in ("params", "neurons", "param_names"):
            if key in group and len(kept) < len(group[key]):
                group[key] = [group[key][place] for place in kept]
    for param in leaving:
        state.pop(param, None)
    return join(groups, joining, like=groups[min(changed)] if changed else {})


class Joining(NamedTuple):
    """A parameter that was not trained before, and the number of the group it joins; None: a new one."""

    number: int | None
    name: str
    param: Tensor
    neurons: list[int]
    dim: NeuronDim
    rows: bool


def reselected_groups(
    groups: Sequence[Mapping[str, Any]], selection: NeuronSelection, model: nn.Module
) -> tuple[dict[int, Neurons], list[Joining]]:
    """Return the new `neurons` of each group that has selected neurons, and what joins the groups.

    A parameter joins the first group that selects along the same dimension, so that it has that group's options. One
    that trained nothing in a group of another dimension, as named parameters of other layers do, leaves that group.
    Where rows that make neurons train, those of the new neurons do.

    Raises:
        ValueError: If the model holds none of the parameters, or a layer trains otherwise already.
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
    wanted: dict[Tensor, tuple[list[int], NeuronDim, bool]] = {}
    units = any(selects_rows(group) for group in groups)
    for group in selection.param_groups(model, attention="frozen", units=units):
        for param, neurons in _pairs(group):
            dim = cast("NeuronDim", group["neuron_dim"])
            wanted[param] = (cast("list[int]", neurons), dim, selects_rows(group))
    held = [(number, param, old) for number, group in enumerate(groups) for param, old in _pairs(group)]
    whole = {param for _, param, old in held if old is None}
    other = {
        param: old
        for number, param, old in held
        if param in wanted and not _along(param, groups[number], *wanted[param][1:])
    }
    wrong, advice = "", "Make a new optimizer."
    if not whole.isdisjoint(wanted):
        wrong, expected = "A layer of the selection trains whole in this optimizer", "layers whose neurons are selected"
    elif turned := [param for param, old in other.items() if old]:
        wrong = (
            f"The neurons of parameter {names[turned[0]]!r} are another dimension in this optimizer than in the model"
        )
        expected, advice = "the same", "Make a new optimizer of selection.param_groups(model)."
    for param, flag in flags.items():
        if wrong or param in whole:
            param.requires_grad_(flag)
    if wrong:
        raise ValueError(problem(wrong, expected, advice))
    selecting = [number for number, group in enumerate(groups) if any(old is not None for old in group["neurons"])]
    changed = {
        number: [
            None if old is None else [] if param in other else wanted.pop(param, ([],))[0]
            for param, old in _pairs(groups[number])
        ]
        for number in selecting
    }
    joining = [
        Joining(
            next((number for number in selecting if _along(param, groups[number], dim, rows)), None),
            names[param],
            param,
            neurons,
            dim,
            rows,
        )
        for param, (neurons, dim, rows) in wanted.items()
    ]
    return changed, joining


def join(
    groups: Sequence[dict[str, Any]], joining: Sequence[Joining], *, like: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Add parameters to the groups they join, and return new groups, with the options of one, for the others."""
    new: dict[tuple[NeuronDim, bool], dict[str, Any]] = {}
    own = ("params", "neurons", "param_names", "neuron_dim", "rows")
    # A tensor would be changed in place for both.
    options = {key: copy.deepcopy(value) for key, value in like.items() if key not in own}
    named = any("param_names" in group for group in groups)
    for number, name, param, neurons, dim, rows in joining:
        if number is None:
            place = {"neuron_dim": dim, **({"rows": True} if rows else {})}
            group = new.setdefault((dim, rows), {**copy.deepcopy(options), "params": [], "neurons": [], **place})
            group["params"].append((name, param) if named else param)
        else:
            group = groups[number]
            group["params"].append(param)
            if named:
                group["param_names"].append(name)
        group["neurons"].append(neurons)
    return list(new.values())


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


def _along(param: Tensor, group: Mapping[str, Any], dim: NeuronDim, rows: bool) -> bool:
    """Say whether a group counts the neurons of a parameter along these dimensions, and means the same by them."""
    along = [each % param.dim() for each in dims_of(dim)] == [
        each % param.dim() for each in dims_of(group["neuron_dim"])
    ]
    return along and selects_rows(group) == rows
