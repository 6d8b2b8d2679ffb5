"""Groups: the parameters that hold selected neurons, as an optimizer takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from torch_simu._checks import check_choice, problem
from torch_simu.columns import NeuronDim
from torch_simu.layers.checks import check_kind, check_num_neurons, check_unshared, check_weight
from torch_simu.layers.kinds import neuron_dim, neuron_weight
from torch_simu.layers.projections import attention_projections, select_layers
from torch_simu.layers.sources import proved_rows


def neuron_groups(
    model: nn.Module,
    neurons: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    attention: str,
    *,
    units: bool = False,
) -> list[dict[str, object]]:
    """Return the groups that `NeuronSelection.param_groups` does, and set nothing; errors as there.

    Args:
        model: The model the neurons were selected in.
        neurons: Layer -> selected neurons.
        sizes: Layer -> how many neurons it was seen with.
        attention: "frozen" or "full".
        units: Whether the rows that make the neurons train, too.
    """
    check_choice("attention", attention, ("full", "frozen"))
    modules = select_layers(model, neurons) if neurons else {}
    projections = _attention(model) if attention == "full" else {}
    groups: dict[NeuronDim, dict[str, object]] = {}
    for name, module in modules.items():
        check_kind(name, module)
        check_num_neurons(name, module, sizes[name])
        _check_trainable(name, neuron_weight(module), "Use attach_deltas first.")
        check_weight(name, module)
        if name in projections:
            raise _trained_twice(f"Layer {name!r} has selected neurons")
        weight = neuron_weight(module)
        check_unshared(model, name, weight)
        dim = neuron_dim(module)
        group = groups.setdefault(dim, {"params": [], "neurons": [], "neuron_dim": dim})
        cast("list[nn.Parameter]", group["params"]).append(weight)
        cast("list[list[int]]", group["neurons"]).append(list(neurons[name]))
    result = list(groups.values())
    if units:
        result += _row_groups(model, neurons, projections)
    if attention == "full":
        params = []
        for name, projection in projections.items():
            check_weight(name, projection)
            for param in projection.parameters(recurse=False):
                _check_trainable(name, param, "Pass attention='frozen', or load the attention unquantized.")
                params.append(param)
        result.append({"params": params, "neurons": [None] * len(params), "neuron_dim": -1})
    return result


def _row_groups(
    model: nn.Module, neurons: Mapping[str, Sequence[int]], projections: Mapping[str, nn.Module]
) -> list[dict[str, object]]:
    """Return the groups of the rows that make the neurons, with their entries of the biases."""
    groups: dict[int, dict[str, object]] = {}
    for source, rows in proved_rows(model, neurons):
        if source.name in projections:
            raise _trained_twice(f"Layer {source.name!r} makes selected neurons")
        check_weight(source.name, source.layer)
        if isinstance(getattr(source.layer, "delta", None), nn.Parameter):
            advice = "Train it: torch_simu.deltas.trained_groups, or take it off."
            raise ValueError(problem(f"Layer {source.name!r} has a delta", "none", advice))
        group = groups.setdefault(source.dim, {"params": [], "neurons": [], "neuron_dim": source.dim, "rows": True})
        for param in source.layer.parameters(recurse=False):
            _check_trainable(source.name, param, "Train deltas: torch_simu.deltas.trained_groups, or units=False.")
            check_unshared(model, source.name, param)
            cast("list[nn.Parameter]", group["params"]).append(param)
            cast("list[list[int]]", group["neurons"]).append(rows)
    return list(groups.values())


def _trained_twice(wrong: str) -> ValueError:
    return ValueError(
        problem(f"{wrong} and is an attention projection trained whole", "one of the two", "Pass attention='frozen'.")
    )


def _check_trainable(name: str, param: nn.Parameter, advice: str) -> None:
    if not param.is_floating_point():
        wrong = f"The weight of layer {name!r} holds {param.dtype} codes"
        raise ValueError(problem(wrong, "a floating-point weight", advice))


def _attention(model: nn.Module) -> dict[str, nn.Module]:
    try:
        return attention_projections(model)
    except (ValueError, TypeError) as error:
        # Its advice is a pattern, which is no argument here.
        wrong = str(error).partition(", expected ")[0]
        raise type(error)(problem(wrong, "known ones for attention='full'", "Pass attention='frozen'.")) from error
