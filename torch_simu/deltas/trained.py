"""trained_groups: which parameters train, the weights in place or deltas beside codes."""

from __future__ import annotations

from typing import Literal, cast

from torch import nn

from torch_simu._checks import problem
from torch_simu.bitsandbytes.layers import holds_codes
from torch_simu.deltas.attach import attach_deltas, attached_layers
from torch_simu.layers import select_layers
from torch_simu.neurons import NeuronSelection


def trained_groups(
    model: nn.Module, selection: NeuronSelection, attention: Literal["full", "frozen"]
) -> list[dict[str, object]]:
    """Return groups for `SIMUOptimizer`; nothing else requires a gradient afterwards.

    Float layers train in place. Where a selected layer is quantized, or has a delta already, deltas train: they are
    attached to what has none.

    Args:
        model: The model the selection was made on.
        selection: The neurons that train.
        attention: Whether the attention projections train whole; they must not be quantized then.

    Raises:
        ValueError: If a delta is of other neurons than the selection's, or as `NeuronSelection.param_groups` and
            `attach_deltas` do.
    """
    attached = attached_layers(model)
    if not attached and not any(holds_codes(layer) for layer in select_layers(model, selection).values()):
        return selection.param_groups(model, attention=attention)
    for name, layer in attached.items():
        if name not in selection or layer.idx.tolist() != selection[name].tolist():
            wrong = f"The delta of layer {name!r} is of other neurons than the selection's"
            raise ValueError(problem(wrong, "the same", "Merge or detach it first."))
    missing = {name: selection[name] for name in selection if name not in attached}
    attach_deltas(model, NeuronSelection(missing, {name: selection.num_neurons[name] for name in missing}))
    model.requires_grad_(False)
    groups: list[dict[str, object]] = [{"params": [layer.delta for layer in attached_layers(model).values()]}]
    if attention == "full":
        # Refused by the selection's own message if these are quantized, too.
        groups += NeuronSelection({}, {}).param_groups(model, attention="full")
    for group in groups:
        for param in cast("list[nn.Parameter]", group["params"]):
            param.requires_grad_(True)
    return groups
