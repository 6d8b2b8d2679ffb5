"""trained_groups: which parameters train, the weights in place or deltas beside codes."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn

from torch_simu.bitsandbytes.layers import holds_codes
from torch_simu.deltas.attach import NOTHING, attached_layers, chosen_layers, rows_of
from torch_simu.deltas.widen import widen_places
from torch_simu.layers import select_layers, sources_beside
from torch_simu.neurons import NeuronSelection


def trained_groups(
    model: nn.Module, selection: NeuronSelection, attention: Literal["full", "frozen"], *, units: bool = False
) -> list[dict[str, object]]:
    """Return groups for `SIMUOptimizer`; nothing else requires a gradient afterwards.

    Float layers train in place. Where a selected layer is quantized, or any layer has a delta already, deltas train:
    they are attached to what has none, and widened where they are of other neurons. Only the columns of the selection
    train then, and with `units` the rows that make its neurons; what an earlier selection changed stays as it is, to
    the last bit.

    Args:
        model: The model the selection was made on.
        selection: The neurons that train.
        attention: Whether the attention projections train whole; they must not be quantized then.
        units: Whether the rows that make the selected neurons train, too, with their entries of the biases.

    Raises:
        ValueError: As `NeuronSelection.param_groups`, `attach_deltas` and `widen_deltas` do.
    """
    if not attached_layers(model) and not any(map(holds_codes, _layers(model, selection, units=units))):
        return selection.param_groups(model, attention=attention, units=units)
    rows = rows_of(model, selection) if units else NOTHING
    widened = widen_places(model, selection, rows)
    attached = attached_layers(model)
    groups: list[dict[str, object]] = []
    for chosen, layout in ((selection, {}), (rows, {"neuron_dim": 0, "rows": True})):
        params: list[nn.Parameter] = []
        places: list[list[int] | None] = []
        for name in (name for name in widened if name in chosen_layers(chosen)):
            idx, deltas = attached[name].idx, attached[name].deltas().values()
            found = torch.searchsorted(idx, chosen[name].to(idx.device)).tolist()
            params += deltas
            # What an earlier selection changed is held, unless it is selected again.
            places += [None if len(found) == len(idx) else found] * len(deltas)
        if params or not layout:
            groups.append({"params": params, "neurons": places, **layout})
    model.requires_grad_(False)
    if attention == "full":
        # Refused by the selection's own message if these are quantized, too.
        groups += NeuronSelection({}, {}).param_groups(model, attention="full")
    for group in groups:
        for param in cast("list[nn.Parameter]", group["params"]):
            param.requires_grad_(True)
    return groups


def _layers(model: nn.Module, selection: NeuronSelection, *, units: bool) -> list[nn.Module]:
    """Return the layers whose columns or rows would train."""
    layers = list(select_layers(model, selection).values())
    for sources in sources_beside(model, selection).values() if units else ():
        layers += [source.layer for source in sources]
    return layers
