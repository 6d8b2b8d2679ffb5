"""Files of deltas: what a quantized model was taught to forget, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from torch_simu._checks import problem
from torch_simu._files import kind_of, load_tensors, save_tensors
from torch_simu.bitsandbytes.layers import fingerprint
from torch_simu.deltas.attach import attach_places, checked_layers
from torch_simu.deltas.layer import DeltaLayer, delta_shape
from torch_simu.layers import d_model, num_neurons
from torch_simu.neurons import NeuronSelection

DELTAS = "deltas.safetensors"
"""Where the deltas of a model are, in its folder."""

_KIND = "Deltas"
_KIND_WITH_ROWS = "DeltasWithRows"
"""A kind of its own, so that readers which know columns only refuse the file and do not take rows for columns."""


class DeltasOnFile(NamedTuple):
    """What a file of deltas holds.

    Attributes:
        deltas: Layer -> delta.
        biases: Layer -> that of its bias, where rows of a layer with one have a delta.
        selection: Layer -> neurons of its columns, or outputs of its rows, of how many.
        hashes: Layer -> sha256 of the weight or codes beside it.
        rows: The layers whose deltas are of rows.
    """

    deltas: dict[str, Tensor]
    selection: NeuronSelection
    hashes: dict[str, str]
    rows: frozenset[str] = frozenset()
    biases: Mapping[str, Tensor] = MappingProxyType({})

    def places(self) -> tuple[NeuronSelection, NeuronSelection]:
        """Return the neurons of the columns, and the outputs of the rows."""
        columns, rows = (
            NeuronSelection(
                {name: self.selection[name] for name in names},
                {name: self.selection.num_neurons[name] for name in names},
            )
            for names in (self.deltas.keys() - self.rows, self.rows)
        )
        return columns, rows


def save_deltas(model: nn.Module, path: str | Path) -> None:
    """Write the deltas of a model to one safetensors file, bound to the weights or codes that they are beside.

    A file with deltas of rows is of another kind, which versions that know columns only refuse.

    Raises:
        ValueError: If no layer has a delta.
    """
    layers = checked_layers(model)
    selection = NeuronSelection(
        {name: layer.idx for name, layer in layers.items()},
        {name: d_model(layer) if layer.rows else num_neurons(layer) for name, layer in layers.items()},
    )
    deltas = {name: layer.delta.detach() for name, layer in layers.items()}
    hashes = {name: fingerprint(layer) for name, layer in layers.items()}
    rows = frozenset(name for name, layer in layers.items() if layer.rows)
    biases = {name: layer.delta_bias.detach() for name, layer in layers.items() if layer.delta_bias is not None}
    write_deltas(path, DeltasOnFile(deltas, selection, hashes, rows, biases))


def write_deltas(path: str | Path, found: DeltasOnFile) -> None:
    """Write deltas that are on no model."""
    tensors = {f"{name}.delta": delta for name, delta in found.deltas.items()}
    tensors |= {f"{name}.idx": found.selection[name] for name in found.deltas}
    tensors |= {f"{name}.delta_bias": delta for name, delta in found.biases.items()}
    header: dict[str, object] = {"num_neurons": dict(found.selection.num_neurons), "sha256": found.hashes}
    if found.rows:
        save_tensors(path, _KIND_WITH_ROWS, tensors, {**header, "rows": sorted(found.rows)})
    else:
        save_tensors(path, _KIND, tensors, header)


def read_deltas(path: str | Path) -> DeltasOnFile:
    """Read what `save_deltas` wrote, without a model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or a delta is not finite.
    """
    kind = _KIND_WITH_ROWS if kind_of(path) == _KIND_WITH_ROWS else _KIND
    tensors, header = load_tensors(path, kind)
    try:
        rows = frozenset(cast("list[str]", header["rows"])) if kind == _KIND_WITH_ROWS else frozenset()
        sizes, hashes = cast("dict[str, int]", header["num_neurons"]), cast("dict[str, str]", header["sha256"])
        selection = NeuronSelection({name: tensors[f"{name}.idx"] for name in sizes}, sizes)
        deltas = {name: tensors[f"{name}.delta"] for name in sizes}
        biases = {name: tensors[key] for name in rows if (key := f"{name}.delta_bias") in tensors}
        count = 2 * len(sizes) + len(biases)
        if not sizes or sizes.keys() != hashes.keys() or len(tensors) != count or not rows <= sizes.keys():
            raise ValueError(f"{len(sizes)} layers, {len(hashes)} hashes, {len(tensors)} tensors, {len(rows)} of rows")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wrong = f"File {str(path)!r} holds no consistent deltas ({error})"
        raise ValueError(problem(wrong, "what save_deltas wrote", "The file is damaged.")) from None
    for name, delta in (*deltas.items(), *biases.items()):
        if not delta.is_floating_point() or not bool(delta.isfinite().all()):
            wrong = f"The delta of layer {name!r} in {str(path)!r} is {delta.dtype} and not finite everywhere"
            raise ValueError(problem(wrong, "finite floating-point numbers", "The file is damaged."))
    return DeltasOnFile(deltas, selection, hashes, rows, biases)


def load_deltas(model: nn.Module, path: str | Path) -> dict[str, nn.Parameter]:
    """Attach the deltas that `save_deltas` wrote to the same base model.

    Returns:
        Layer -> its delta, as `attach_deltas`.

    Raises:
        FileNotFoundError: If there is no such file.
        KeyError: If a layer is not in the model.
        ValueError: If the file is damaged, a delta has another shape or is not finite, or a layer is not the one that
            the delta was trained beside; nothing is attached then.
    """
    held = read_deltas(path)
    deltas, selection, modules = held.deltas, held.selection, dict(model.named_modules())
    for name, expected in held.hashes.items():
        if name not in modules:
            raise KeyError(problem(f"Layer {name!r} is not in the model", "the model that the deltas were trained on"))
        if isinstance(modules[name], DeltaLayer):
            break
        if (found := fingerprint(modules[name])) != expected:
            wrong = f"The weight of layer {name!r} has sha256 {found[:12]}..."
            advice = "Load the base as it was loaded then: codes depend on the dtype they were made from."
            raise ValueError(problem(wrong, f"{expected[:12]}..., as it was under the delta", advice))
        shape = delta_shape(modules[name], len(selection[name]), rows=name in held.rows)
        biased = name in held.rows and modules[name].bias is not None
        shapes = [shape, shape[:1]] if biased else [shape]
        found_shapes = [tuple(each[name].shape) for each in (deltas, held.biases) if name in each]
        if found_shapes != shapes:
            wrong = f"The delta of layer {name!r} in {str(path)!r} has shape {_said(found_shapes)}"
            raise ValueError(problem(wrong, _said(shapes), "The file is damaged, or of another model."))
    attached = attach_places(model, *held.places())
    with torch.no_grad():
        for name, delta in attached.items():
            delta.copy_(deltas[name])
        for name, bias in held.biases.items():
            cast("nn.Parameter", modules[name].delta_bias).copy_(bias)
    return attached


def _said(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))
