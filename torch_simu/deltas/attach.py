"""Attach deltas to the selected layers of a model, merge them into float weights, or take them off again."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from torch_simu._checks import problem
from torch_simu.bitsandbytes.layers import is_4bit, is_8bit
from torch_simu.bitsandbytes.packing import codes_as_loaded, keep_codes_as_loaded, let_codes_go
from torch_simu.deltas.layer import DeltaLayer, attach, detach, has_own_forward
from torch_simu.layers import (
    check_kind,
    check_num_neurons,
    check_unshared,
    check_weight,
    d_model,
    proved_rows,
    select_layers,
)
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.neurons import NeuronSelection

NOTHING = NeuronSelection({}, {})
"""No layer at all."""


def attach_deltas(model: nn.Module, selection: NeuronSelection, *, units: bool = False) -> dict[str, nn.Parameter]:
    r"""Put a trainable change of its selected columns beside each selected layer, in place and under the same name.

    A layer computes $\text{base}(x) + \Delta \, x_S$ from now on, with a float32 $\Delta$ of zero, so no output changes
    yet. Its own parameters are frozen; those of other layers are left as they are. Layers without a selected neuron are
    left alone. Works on `nn.Linear`, `Conv1D`, and bitsandbytes' `Linear8bitLt` and `Linear4bit`.

    Args:
        model: The model the selection was made on.
        selection: Which neurons of which layers.
        units: Whether the rows that make these neurons get a delta, too: those of the gate and up projections, with
            their entries of the biases (`layer.delta_bias`). A short run proves which they are.

    Returns:
        Layer -> its delta, to be trained. Shape of each: `(d_model, num_selected)`, or `(num_rows, d_model)` of a
        projection whose rows change. `SIMUOptimizer` takes them from `trained_groups`, and those without `units` also
        as they are.

    Raises:
        KeyError: If a layer is not in the model.
        TypeError: If a layer is of another kind or of another quantizer, or the arguments are of another type.
        ValueError: If a layer has a delta already, another number of neurons, no data (meta device), a weight that is
            computed from other parameters or a forward put on it by other code than accelerate's, is sharded, is
            compiled, or shares its weight with another layer; if 4-bit codes of the model were packed for inference;
            with `units`, if what makes the neurons is not proved. Nothing is attached then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 4)
        >>> before = model(x)
        >>> deltas = attach_deltas(model, NeuronSelection({"2": [1, 6]}, {"2": 8}))
        >>> deltas["2"].shape
        torch.Size([2, 2])
        >>> torch.equal(before, model(x))
        True
    """
    check_selection(selection)
    return attach_places(model, selection, rows_of(model, selection) if units else NOTHING)


def attach_places(model: nn.Module, selection: NeuronSelection, rows: NeuronSelection) -> dict[str, nn.Parameter]:
    """Attach deltas as `attach_deltas` does, of columns and of rows that are known.

    Args:
        model: The model.
        selection: Layer -> neurons whose columns change.
        rows: Layer -> outputs whose rows change, of how many.
    """
    _check_not_compiled("The model", model)
    columns, made = chosen_layers(selection), chosen_layers(rows)
    if twice := columns & made:
        wrong = f"Layer {min(twice)!r} has selected neurons and makes selected neurons of another layer"
        raise ValueError(problem(wrong, "one of the two", "Pass units=False."))
    chosen = columns | made
    layers = select_layers(model, chosen) if chosen else {}
    for name, layer in layers.items():
        _check(model, name, layer)
        if name in made:
            check_num_outputs(name, layer, rows.num_neurons[name])
            if layer.bias is not None:
                check_unshared(model, name, cast("nn.Parameter", layer.bias))
        else:
            check_num_neurons(name, layer, selection.num_neurons[name])
    if layers and not attached_layers(model):
        keep_codes_as_loaded(model)
    return {
        name: attach(layer, rows[name], rows=True) if name in made else attach(layer, selection[name])
        for name, layer in layers.items()
    }


def rows_of(model: nn.Module, selection: NeuronSelection) -> NeuronSelection:
    """Return the rows that make selected neurons, layer by layer, as outputs of the projections that make them.

    Raises:
        KeyError: If a layer is not in the model.
        TypeError: If a layer holds no neurons.
        ValueError: If a layer has another number of neurons, 4-bit codes were packed for inference, or what makes the
            neurons is not proved.
    """
    chosen = chosen_layers(selection)
    for name, layer in (select_layers(model, chosen) if chosen else {}).items():
        check_kind(name, layer, experts=False)
        check_num_neurons(name, layer, selection.num_neurons[name])
    # A run without gradients would pack 4-bit codes of the model.
    with codes_as_loaded(model):
        found = proved_rows(model, {name: selection[name].tolist() for name in selection if name in chosen})
    return NeuronSelection(
        {source.name: rows for source, rows in found}, {source.name: d_model(source.layer) for source, _ in found}
    )


def chosen_layers(selection: NeuronSelection) -> set[str]:
    """Return the layers that have selected neurons."""
    return {name for name in selection if len(selection[name])}


def check_selection(selection: object) -> None:
    """Raise where a selection is something else.

    Raises:
        TypeError: If it is.
    """
    if not isinstance(selection, NeuronSelection):
        raise TypeError(problem(f"selection is a {type(selection).__name__}", "a NeuronSelection"))


def attached_layers(model: nn.Module) -> dict[str, DeltaLayer]:
    """Return the layers of a model that have a delta: name -> layer, with `.delta`, `.delta_bias`, `.idx`, `.rows`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeltaLayer)}


def merge_deltas(model: nn.Module) -> None:
    """Add the deltas of a model to the selected columns, or rows, of its float weights, and take them off.

    The sum is made in float32 and rounded once.

    Raises:
        ValueError: If no layer has a delta, or one has codes instead of float weights; nothing is merged then.
    """
    layers = checked_layers(model)
    for name, layer in layers.items():
        if is_4bit(layer) or not layer.weight.is_floating_point():
            wrong = f"The weight of layer {name!r} holds {layer.weight.dtype} codes"
            advice = (
                "Keep the delta beside it: save_deltas writes it, and torch_simu.deltas.write_back is a lossy export."
            )
            raise ValueError(problem(wrong, "a floating-point weight", advice))
    for layer in layers.values():
        weight, columns = layer.weight, layer.columns
        with torch.no_grad():
            wide = torch.promote_types(weight.dtype, torch.float32)
            columns.write_(weight, (columns.gather(weight).to(wide) + layer.change.to(wide)).to(weight.dtype))
        layer.fold_bias_()
        detach(layer)
    let_codes_go(model)


def detach_deltas(model: nn.Module) -> None:
    """Take the deltas off a model: every layer is again what it was, to the last bit.

    Raises:
        ValueError: If no layer has a delta.
    """
    for layer in checked_layers(model).values():
        detach(layer)
    let_codes_go(model)


def checked_layers(model: nn.Module) -> dict[str, DeltaLayer]:
    """Return the layers that have a delta, and raise where there is none.

    Raises:
        ValueError: If no layer has a delta.
    """
    layers = attached_layers(model)
    if not layers:
        raise ValueError(problem("No layer of the model has a delta", "at least one", "Call attach_deltas first."))
    return layers


def check_num_outputs(name: str, layer: nn.Module, counted: int) -> None:
    """Raise where a layer has another number of outputs than its rows were counted in.

    Raises:
        ValueError: If it has.
    """
    if (count := d_model(layer)) != counted:
        wrong = f"Layer {name!r} has {count} outputs, the rows of its delta are of {counted}"
        raise ValueError(problem(wrong, "the same model", "Was the delta made on another model?"))


def _check(model: nn.Module, name: str, layer: nn.Module) -> None:
    if isinstance(layer, DeltaLayer):
        advice = "Call merge_deltas or detach_deltas first."
        raise ValueError(problem(f"Layer {name!r} has a delta already", "none", advice))
    check_kind(name, layer, experts=False)
    _check_not_compiled(f"Layer {name!r}", layer)
    check_weight(name, layer)
    if has_own_forward(layer):
        wrong = f"Layer {name!r} has a forward of its own, which another library put on it"
        raise ValueError(
            problem(wrong, "that of its class, or hooks of accelerate", "Attach first, and patch it then.")
        )
    weight = cast("nn.Parameter", layer.weight)
    if is_dtensor(weight):
        advice = "Call attach_deltas before fully_shard."
        raise ValueError(problem(f"The weight of layer {name!r} is sharded", "a whole one", advice))
    check_unshared(model, name, weight)
    if is_8bit(layer) and (weight.dtype != torch.int8 or layer.state.has_fp16_weights):  # type: ignore[union-attr]
        advice = "Make it with has_fp16_weights=False and move it to its device, which makes the codes."
        raise ValueError(problem(f"The 8-bit layer {name!r} holds {weight.dtype}", "torch.int8 codes", advice))
    if is_4bit(layer) and getattr(weight, "quant_state", None) is None:
        raise ValueError(problem(f"The 4-bit layer {name!r} has no codes", "codes", "Move it to its device first."))


def _check_not_compiled(what: str, module: nn.Module) -> None:
    # OptimizedModule is the wrapper of torch.compile(model); model.compile() leaves the other mark.
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        advice = "Attach to the model first and compile it then."
        raise ValueError(problem(f"{what} is compiled", "one that is not", advice))
