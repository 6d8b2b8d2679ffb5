"""Deltas beside a checkpoint: a file in its folder, bound to the weights or codes that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from torch_simu._checks import problem
from torch_simu._hashes import sha256_of, sha256_of_all
from torch_simu.deltas.files import DELTAS, DeltasOnFile, read_deltas, write_deltas
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.change import Change

_SUFFIX = ".delta"


def deltas_beside(folder: str | Path) -> dict[str, Change]:
    """Return the deltas in a folder as changes of a base without them; none where it has no file of them.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / DELTAS
    if not path.is_file():
        return {}
    deltas, selection, hashes = read_deltas(path)
    return {
        f"{layer}{_SUFFIX}": Change(
            "delta",
            hashes[layer],
            sha256_of(delta),
            str(delta.dtype),
            tuple(delta.shape),
            -1,
            selection.num_neurons[layer],
            selection[layer],
            delta,
        )
        for layer, delta in deltas.items()
    }


def layer_of(name: str) -> str:
    """Return the layer whose delta has a name."""
    return name.removesuffix(_SUFFIX)


def stored_fingerprint(tensors: Mapping[str, Tensor], layer: str) -> str | None:
    """Return the sha256 of a layer's weight as `bitsandbytes.layers.fingerprint` does; None: there is no such layer."""
    weight = f"{layer}.weight"
    if weight not in tensors:
        return None
    scales = [f"{layer}.SCB"] if f"{layer}.SCB" in tensors else []
    states = sorted(name for name in tensors if name.startswith(f"{weight}."))
    return sha256_of_all(("", tensors[name]) for name in (weight, *scales, *states))


def check_deltas(
    deltas: Mapping[str, Change], tensors: Mapping[str, Tensor], folder: str | Path, *, applied: bool
) -> None:
    """Raise where a folder is not what deltas go beside, or are taken from.

    Raises:
        ValueError: If its codes are others, or it holds no deltas, or others.
    """
    for name, change in deltas.items():
        layer = layer_of(name)
        found = stored_fingerprint(tensors, layer)
        if found != change.before:
            wrong = f"The weight of layer {layer!r} in {str(folder)!r} "
            wrong += "is missing" if found is None else f"has sha256 {found[:12]}..."
            advice = "The patch was made for another base, or in codes of other options."
            raise ValueError(problem(wrong, f"{change.before[:12]}...", advice))
    there = deltas_beside(folder)
    same = there.keys() == deltas.keys() and all(there[name].after == deltas[name].after for name in deltas)
    if applied and not same:
        held = "other deltas" if there else "no deltas"
        raise ValueError(
            problem(f"Folder {str(folder)!r} holds {held}", "those of the patch", "It is not applied there.")
        )
    if there and not applied:
        held = "the patch is applied already" if same else "it holds other deltas"
        advice = f"The base is the folder without {DELTAS}."
        raise ValueError(problem(f"Folder {str(folder)!r} has {DELTAS} ({held})", "the base", advice))


def put_deltas(deltas: Mapping[str, Change], folder: Path) -> None:
    """Write deltas into a folder."""
    layers = {layer_of(name): change for name, change in deltas.items()}
    selection = NeuronSelection(
        {layer: change.neurons for layer, change in layers.items()},
        {layer: change.num_neurons for layer, change in layers.items()},
    )
    values = {layer: change.value for layer, change in layers.items()}
    hashes = {layer: change.before for layer, change in layers.items()}
    write_deltas(folder / DELTAS, DeltasOnFile(values, selection, hashes))
