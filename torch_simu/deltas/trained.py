"""trained_groups: which parameters train, the weights in place or deltas beside codes."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn

from torch_simu._checks import problem
from torch_simu.bitsandbytes.layers import holds_codes
from torch_simu.deltas.attach import attached_layers
from torch_simu.deltas.widen import widen_deltas
from torch_simu.layers import select_layers
from torch_simu.neurons import NeuronSelection


def trained_groups(
    model: nn.Module, selection: NeuronSelection, attention: Literal["full", "frozen"], *, units: bool = False
) -> list[dict[str, object]]:
    """Return groups for `SIMUOptimizer`; nothing else requires a gradient afterwards.

    Float layers train in place. Where a selected layer is quantized, or any layer has a delta already, deltas train:
    they are attached to what has none, and widened where they are of other neurons. Only the columns of the selection
    train then; what an earlier selection changed stays as it is, to the last bit.

    Args:
        model: The model the selection was made on.
        selection: The neurons that train.
        attention: Whether the attention projections train whole; they must not be quantized then.
        units: Whether the rows that make the selected neurons train, too; they have no deltas, so layers must be float.

    Raises:
        ValueError: As `NeuronSelection.param_groups` and `attach_deltas` do; or with `units` where deltas train.
    """
    attached = attached_layers(model)
    if not attached and not any(holds_codes(layer) for layer in select_layers(model, selection).values()):
        return selection.param_groups(model, attention=attention, units=units)
    if units:
        wrong = "units is True, and deltas train: a selected layer is quantized, or a layer has a delta already"
        raise ValueError(problem(wrong, "float layers without deltas", "Rows have no deltas: pass units=False."))
    widened = widen_deltas(model, selection)
    columns: list[list[int] | None] = []
    for name in widened:
        idx = attached_layers(model)[name].idx
        chosen = torch.searchsorted(idx, selection[name].to(idx.device)).tolist()
        # What an earlier selection changed is held, unless it is selected again.
        columns.append(None if len(chosen) == len(idx) else chosen)
    model.requires_grad_(False)
    groups: list[dict[str, object]] = [{"params": list(widened.values()), "neurons": columns}]
    if attention == "full":
        # Refused by the selection's own message if these are quantized, too.
        groups += NeuronSelection({}, {}).param_groups(model, attention="full")
    for group in groups:
        for param in cast("list[nn.Parameter]", group["params"]):
            param.requires_grad_(True)
    return groups
