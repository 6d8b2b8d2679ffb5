"""Widen deltas: a further selection beside what they hold already."""

from __future__ import annotations

import torch
from torch import nn

from torch_simu._checks import problem
from torch_simu.deltas.attach import attach_deltas, attached_layers
from torch_simu.deltas.layer import DeltaLayer
from torch_simu.layers import check_num_neurons
from torch_simu.neurons import NeuronSelection


def widen_deltas(model: nn.Module, selection: NeuronSelection) -> dict[str, nn.Parameter]:
    """Let the deltas of a model cover a further selection: what they hold stays, new columns are zero.

    So is a model asked to forget a second time: the change of the first time stands in its columns, to the last bit,
    and those of the new selection start from there. The model computes what it did, up to the rounding of longer sums.
    Layers of the selection without a delta get one.

    Args:
        model: The model, with or without deltas.
        selection: Which neurons of which layers.

    Returns:
        Layer -> its delta, of the layers of the selection that have selected neurons. Its columns are those of
        `layer.idx`, in their order; `SIMUOptimizer` trains some of them by `neurons`. Shape of each:
        `(d_model, num_columns)`.

    Raises:
        KeyError: If a layer is not in the model.
        TypeError: As `attach_deltas`.
        ValueError: If a layer has another number of neurons, or as `attach_deltas`; nothing is changed then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> first = attach_deltas(model, NeuronSelection({"0": [2]}, {"0": 4}))["0"]
        >>> _ = nn.init.ones_(first)
        >>> widen_deltas(model, NeuronSelection({"0": [0, 2]}, {"0": 4}))["0"]
        Parameter containing:
        tensor([[0., 1.],
                [0., 1.]], requires_grad=True)
    """
    if not isinstance(selection, NeuronSelection):
        raise TypeError(problem(f"selection is a {type(selection).__name__}", "a NeuronSelection"))
    attached = attached_layers(model)
    chosen = [name for name in selection if len(selection[name])]
    for name in chosen:
        if name in attached:
            check_num_neurons(name, attached[name], selection.num_neurons[name])
    missing = {name: selection[name] for name in chosen if name not in attached}
    attach_deltas(model, NeuronSelection(missing, {name: selection.num_neurons[name] for name in missing}))
    for name in chosen:
        if name in attached:
            _widen(attached[name], selection[name])
    return {name: layer.delta for name, layer in attached_layers(model).items() if name in chosen}


@torch.no_grad()
def _widen(layer: DeltaLayer, neurons: torch.Tensor) -> None:
    columns = torch.cat([layer.idx, neurons.to(layer.idx.device)]).unique()
    if len(columns) == len(layer.idx):
        return
    delta = layer.delta.new_zeros(len(layer.delta), len(columns))
    delta[:, torch.searchsorted(columns, layer.idx)] = layer.delta
    layer.delta, layer.idx = nn.Parameter(delta, requires_grad=layer.delta.requires_grad), columns
