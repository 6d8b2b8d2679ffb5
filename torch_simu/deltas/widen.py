"""Widen deltas: a further selection beside what they hold already."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from torch_simu._checks import problem
from torch_simu.deltas.attach import (
    NOTHING,
    attach_places,
    attached_layers,
    check_num_outputs,
    check_selection,
    chosen_layers,
    rows_of,
)
from torch_simu.deltas.layer import DeltaLayer
from torch_simu.layers import check_num_neurons
from torch_simu.neurons import NeuronSelection


def widen_deltas(model: nn.Module, selection: NeuronSelection, *, units: bool = False) -> dict[str, nn.Parameter]:
    """Let the deltas of a model cover a further selection: what they hold stays, new columns and rows are zero.

    So is a model asked to forget a second time: the change of the first time stands in its columns, to the last bit,
    and those of the new selection start from there. The model computes what it did, up to the rounding of longer sums.
    Layers of the selection without a delta get one.

    Args:
        model: The model, with or without deltas.
        selection: Which neurons of which layers.
        units: Whether the rows that make these neurons get a delta, too; see `attach_deltas`.

    Returns:
        Layer -> its delta, of the layers of the selection that have selected neurons, and with `units` of what makes
        them. Its columns, or rows, are those of `layer.idx`, in their order; `SIMUOptimizer` trains some of them by
        `neurons`. Shape of each: `(d_model, num_columns)` or `(num_rows, d_model)`.

    Raises:
        KeyError: If a layer is not in the model.
        TypeError: As `attach_deltas`.
        ValueError: If a layer has another number of neurons, or a delta of rows where columns are meant or the other
            way round, or as `attach_deltas`; nothing is changed then.

    Examples:
        >>> from torch_simu.deltas import attach_deltas
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> first = attach_deltas(model, NeuronSelection({"0": [2]}, {"0": 4}))["0"]
        >>> _ = nn.init.ones_(first)
        >>> widen_deltas(model, NeuronSelection({"0": [0, 2]}, {"0": 4}))["0"]
        Parameter containing:
        tensor([[0., 1.],
                [0., 1.]], requires_grad=True)
    """
    check_selection(selection)
    return widen_places(model, selection, rows_of(model, selection) if units else NOTHING)


def widen_places(model: nn.Module, selection: NeuronSelection, rows: NeuronSelection) -> dict[str, nn.Parameter]:
    """Widen deltas as `widen_deltas` does, to columns and to rows that are known.

    Args:
        model: The model.
        selection: Layer -> neurons whose columns change.
        rows: Layer -> outputs whose rows change, of how many.
    """
    attached = attached_layers(model)
    for chosen, of_rows, check in ((selection, False, check_num_neurons), (rows, True, check_num_outputs)):
        for name in chosen_layers(chosen) & attached.keys():
            if attached[name].rows != of_rows:
                kinds = ("rows", "columns") if attached[name].rows else ("columns", "rows")
                wrong = f"The delta of layer {name!r} is of {kinds[0]}"
                raise ValueError(problem(wrong, f"one of {kinds[1]}", "Call merge_deltas or detach_deltas first."))
            check(name, attached[name], chosen.num_neurons[name])
    attach_places(model, _without(selection, attached), _without(rows, attached))
    for chosen in (selection, rows):
        for name in chosen_layers(chosen) & attached.keys():
            _widen(attached[name], chosen[name])
    wanted = chosen_layers(selection) | chosen_layers(rows)
    return {name: layer.delta for name, layer in attached_layers(model).items() if name in wanted}


def _without(selection: NeuronSelection, layers: Container[str]) -> NeuronSelection:
    kept = {name: selection[name] for name in chosen_layers(selection) if name not in layers}
    return NeuronSelection(kept, {name: selection.num_neurons[name] for name in kept})


@torch.no_grad()
def _widen(layer: DeltaLayer, indices: torch.Tensor) -> None:
    union = torch.cat([layer.idx, indices.to(layer.idx.device)]).unique()
    if len(union) == len(layer.idx):
        return
    places, dim = torch.searchsorted(union, layer.idx), 0 if layer.rows else 1
    for key, old in layer.deltas().items():
        shape = [len(union) if each == dim else size for each, size in enumerate(old.shape)]
        new = old.new_zeros(shape).index_copy_(dim, places, old)
        setattr(layer, key, nn.Parameter(new, requires_grad=old.requires_grad))
    layer.idx = union
