"""What a patch sees of a model: its tensors, those that hold selected neurons, and those that may change as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu.bitsandbytes.layers import fingerprint, holds_codes
from torch_simu.deltas.layer import DeltaLayer
from torch_simu.layers import (
    attention_projections,
    check_num_neurons,
    neuron_dim,
    neuron_weight,
    select_layers,
    sources_beside,
)
from torch_simu.layers.dtensors import is_dtensor
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.change import Place, Where


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and persistent buffers but deltas; of quantized layers a hash of codes and scales.

    Raises:
        ValueError: If a tensor is sharded, or has no data (meta device, as that of an offloaded layer).
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        skipped = module._non_persistent_buffers_set
        own |= {key: value for key, value in module.named_buffers(recurse=False) if key not in skipped}
        if isinstance(module, DeltaLayer):
            beside = (*module.deltas(), "idx", "weight_format")
            own = {key: value for key, value in own.items() if key not in beside}
        prefix = f"{name}." if name else ""
        if empty := [key for key, value in own.items() if value.device.type == "meta"]:
            advice = "Load the model without offloading, or patch the checkpoint."
            raise ValueError(
                problem(f"Tensor {prefix + empty[0]!r} is on the meta device", "a tensor with data", advice)
            )
        if holds_codes(module) or "SCB" in own:
            own.pop("SCB", None)
            digest = bytes.fromhex(fingerprint(module))
            own["weight"] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        for key, value in own.items():
            if is_dtensor(value):
                wrong = f"Tensor {prefix + key!r} is sharded"
                raise ValueError(
                    problem(wrong, "a whole one", "Patch the checkpoint, or the model before fully_shard.")
                )
            if not any(value is other for other in found.values()):
                found[prefix + key] = value.detach() if not isinstance(value, nn.Parameter) else value
    return found


def neurons_of(model: nn.Module, selection: NeuronSelection, *, units: bool = False) -> Where:
    """Return where the float weights of the selected layers may change.

    The weights themselves are not read: a model on the meta device will do.

    Args:
        model: The model.
        selection: The neurons.
        units: Whether the rows that make them may change, too: of the projections beside their layers, by their sizes.

    Raises:
        KeyError: If a layer is not in the model.
        ValueError: If a layer has another number of neurons than the selection says, or its weight is computed from
            other parameters; with `units`, if no such projection stands beside it.
    """
    where: dict[str, Place] = {}
    for name, layer in (select_layers(model, selection) if len(selection) else {}).items():
        check_num_neurons(name, layer, selection.num_neurons[name])
        weight = neuron_weight(layer)
        key = next((key for key, param in layer.named_parameters(recurse=False) if param is weight), None)
        if key is None:
            wrong = f"The weight of layer {name!r} is computed from other parameters"
            raise ValueError(problem(wrong, "a parameter", "Remove the parametrization, in the base and the model."))
        if weight.is_floating_point():
            where[f"{name}.{key}"] = Place(neuron_dim(layer), selection[name])
    for name, sources in sources_beside(model, selection if units else ()).items():
        for source in sources:
            rows = source.rows(selection[name].tolist())
            where |= {
                # Of each its own, because files refuse tensors that share memory.
                f"{source.name}.{key}": Place(source.dim, torch.tensor(rows, dtype=torch.int64), "rows")
                for key, param in source.layer.named_parameters(recurse=False)
                if param.is_floating_point()
            }
    return where


def may_differ_whole(model: nn.Module) -> Callable[[str], bool]:
    """Return whether a tensor may differ as a whole: those of attention projections, where they are known."""
    try:
        layers = attention_projections(model)
    except ValueError:
        return lambda name: False
    names = {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters(recurse=False)}
    return names.__contains__
