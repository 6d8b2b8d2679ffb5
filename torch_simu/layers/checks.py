"""The door: what a layer must be before it is worked on, and what the others are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_simu._checks import problem
from torch_simu.layers.kinds import is_fused_experts, is_neuron_layer, kind_of, neuron_dim, num_neurons

_KNOWN = ("torch.nn.modules.linear", "transformers.pytorch_utils", "bitsandbytes.", "torch_simu.")
_LOAD = (
    "Load the model in float, or with codes of bitsandbytes: "
    "from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True))."
)


def check_kind(name: str, module: nn.Module, *, experts: bool = True) -> None:
    """Raise where a module is no layer with neurons, by its real class, and say what to name instead.

    Args:
        name: Its name, for the message.
        module: Any module.
        experts: Whether fused experts are welcome.

    Raises:
        TypeError: If it holds no neurons; adapters of PEFT do not, and the layer inside them does.
    """
    if is_neuron_layer(module) or (experts and is_fused_experts(module)):
        return
    expected = "nn.Linear, Conv1D or fused experts" if experts else "nn.Linear, Conv1D, Linear8bitLt or Linear4bit"
    advice = ""
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        inside = f"{name}.base_layer" if name else "base_layer"
        advice = f"It wraps one: name {inside!r}, or merge the adapter into it first (merge_and_unload)."
    elif is_fused_experts(module):
        advice = "Train the experts in place: selection.param_groups(model)."
    elif isinstance(getattr(module, "in_features", getattr(module, "infeatures", None)), int):
        advice = _LOAD
    raise TypeError(problem(f"Layer {name!r} is a {kind_of(module)}", expected, advice))


def check_weight(name: str, layer: nn.Module) -> None:
    """Raise where what a layer computes with is not a plain weight of its own.

    So are layers of other quantizers (a weight that is a tensor subclass, of eight-bit floats, or hidden behind other
    arithmetic), weights that are computed from other parameters (weight norm, spectral norm, orthogonal, any
    parametrization, pruning), and weights without data, which something else brings from a disk or another device.

    Args:
        name: The layer's name, for the message.
        layer: A layer with neurons, or fused experts.

    Raises:
        TypeError: If the layer belongs to another quantizer or computes something else than its weight says.
        ValueError: If its weight is computed from other parameters, or is on the meta device.
    """
    key = "down_proj" if is_fused_experts(layer) else "weight"
    what = f"Layer {name!r}, a {kind_of(layer)},"
    for each in {key, "bias"}:
        if getattr(layer, each, None) is not None and each not in layer._parameters:
            wrong = f"{what} computes its {each} from other parameters"
            advice = "Make it permanent first: parametrize.remove_parametrizations, remove_weight_norm or prune.remove."
            raise ValueError(problem(wrong, f"a {each} of its own", advice))
    weight = cast("nn.Parameter", getattr(layer, key))
    if _is_foreign(weight):
        kind = type(weight)
        wrong = f"{what} holds its weight as a {kind.__module__}.{kind.__qualname__}"
        raise TypeError(problem(wrong, "a plain tensor or codes of bitsandbytes", _LOAD))
    if weight.is_floating_point() and weight.dtype.itemsize == 1:
        raise TypeError(problem(f"{what} holds {weight.dtype} codes", "float weights or codes of bitsandbytes", _LOAD))
    if weight.device.type == "meta":
        wrong = f"The weight of layer {name!r} is on the meta device"
        advice = "Load the model first, and keep this layer off the disk (no offloading in its device_map)."
        raise ValueError(problem(wrong, "data", advice))
    if is_neuron_layer(layer) and not _computes_its_weight(layer, weight):
        raise TypeError(problem(f"{what} computes something else than its weight says", "nn.Linear or Conv1D", _LOAD))


def check_loaded(model: nn.Module) -> None:
    """Raise where a model cannot compute: a layer has no data and nothing that brings it, or all layers are offloaded.

    Layers that accelerate offloads are on the meta device, and their hook brings the data for the time of a pass.

    Args:
        model: Any model.

    Raises:
        ValueError: If it cannot.
    """
    empty = [name for name, module in model.named_modules() if any(each.is_meta for each in _tensors_of(module))]
    for name in empty:
        if not _is_offloaded(model, name):
            wrong, advice = f"The weights of layer {name!r} are on the meta device", "Load the model first."
            raise ValueError(problem(wrong, "data", advice))
    if empty and all(param.is_meta for param in model.parameters()):
        wrong = f"All weights are offloaded, first those of layer {empty[0]!r}"
        advice = "Load the model without offloading, or let its device_map keep a layer."
        raise ValueError(problem(wrong, "a layer on the device that computes", advice))


def check_num_neurons(name: str, layer: nn.Module, counted: int) -> None:
    """Raise when a layer has another number of neurons than its selection counts.

    Raises:
        ValueError: If it has.
    """
    if (size := num_neurons(layer)) != counted:
        wrong = f"Layer {name!r} has {size} neurons, the selection counts {counted}"
        raise ValueError(problem(wrong, "the same model", "Was the selection made on another model?"))


def check_unshared(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Raise when another layer of the model has the same weight.

    Raises:
        ValueError: If one has.
    """
    for other, module in model.named_modules():
        if other != name and any(param is weight for param in module.parameters(recurse=False)):
            raise ValueError(problem(f"Layers {name!r} and {other!r} share one weight", "a weight per layer"))


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _is_offloaded(model: nn.Module, name: str) -> bool:
    """Say whether a hook of accelerate brings a layer's data: its own, or that of a block around it."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    hooks = [getattr(each, "_hf_hook", None) for each in around]
    whole = any(getattr(hook, "place_submodules", False) for hook in hooks)
    return whole or hasattr(model.get_submodule(name), "_hf_hook")


def _is_foreign(weight: Tensor) -> bool:
    kind = type(weight)
    ours = kind.__module__.startswith(("torch.", "bitsandbytes."))
    return not ours and (hasattr(kind, "__tensor_flatten__") or "__torch_dispatch__" in vars(kind))


@torch.no_grad()
def _computes_its_weight(layer: nn.Module, weight: Tensor) -> bool:
    """Try a class that brings a forward of its own; those that are known are taken at their word."""
    forward = type(layer).forward
    if forward.__module__.startswith(_KNOWN) or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        return True
    columns = weight if neuron_dim(layer) == -1 else weight.T
    rows = torch.linspace(-1.0, 1.0, 3 * columns.shape[1], dtype=weight.dtype, device=weight.device)
    rows = rows.reshape(3, -1).sin()
    expected = functional.linear(rows, columns, cast("Tensor | None", getattr(layer, "bias", None)))
    training, layer.training = layer.training, False
    try:
        found = forward(layer, rows)
    # Any exception: the forward is unknown.
    except Exception:
        return False
    finally:
        layer.training = training
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    off = (found.to(expected.dtype) - expected).abs().max()
    return bool(off <= 16 * torch.finfo(weight.dtype).eps * max(1.0, float(expected.abs().max())))
