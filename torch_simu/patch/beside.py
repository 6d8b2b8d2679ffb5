"""Deltas beside a checkpoint: a file in its folder, bound to the weights or codes that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu._hashes import sha256_of_all
from torch_simu.deltas.files import DELTAS, DeltasOnFile, read_deltas, write_deltas
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.change import Change


def deltas_beside(folder: str | Path) -> dict[str, Change]:
    """Return the deltas in a folder as changes of a base without them; none where it has no file of them.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / DELTAS
    if not path.is_file():
        return {}
    held = read_deltas(path)
    return {
        f"{layer}.{key}": Change.of_delta(
            delta,
            held.selection[layer],
            of=held.selection.num_neurons[layer],
            rows=layer in held.rows,
            beside=held.hashes[layer],
        )
        for key, deltas in (("delta", held.deltas), ("delta_bias", held.biases))
        for layer, delta in deltas.items()
    }


def layer_of(name: str) -> str:
    """Return the layer whose delta, or that of whose bias, has a name."""
    return name.rpartition(".")[0]


def places_of(deltas: Mapping[str, Change]) -> tuple[NeuronSelection, NeuronSelection]:
    """Return the neurons of the columns, and the outputs of the rows, of deltas by their layers."""
    columns, rows = (
        NeuronSelection(
            {layer: change.neurons for layer, change in deltas.items() if change.of_rows == of_rows},
            {layer: change.num_neurons for layer, change in deltas.items() if change.of_rows == of_rows},
        )
        for of_rows in (False, True)
    )
    return columns, rows


def check_selected(deltas: Mapping[str, Change], selection: NeuronSelection, *, units: bool) -> None:
    """Raise where a delta is of other neurons than the selected ones, or of rows that make others.

    Raises:
        ValueError: If one is, or is of rows without `units`.
    """
    for name, change in deltas.items():
        layer = layer_of(name)
        if change.of_rows and not units:
            wrong = f"The delta of layer {layer!r} is of rows that make neurons"
            raise ValueError(problem(wrong, "columns of the selection alone", "Pass units=True (--units)."))
        if change.of_rows:
            expected = _rows_beside(layer, change.num_neurons, selection)
        else:
            expected = [selection[layer]] if layer in selection else []
        if not any(torch.equal(each, change.neurons) for each in expected):
            raise ValueError(problem(f"The delta of layer {layer!r} is of other neurons", "those of the selection"))


def _rows_beside(layer: str, num_rows: int, selection: NeuronSelection) -> list[Tensor]:
    """Return the rows of a projection that would make selected neurons, for each layer beside it, by name and size.

    As `torch_simu.layers.sources_beside` finds them, without a model.
    """
    found = []
    for name in selection:
        parent, size = name.rpartition(".")[0], selection.num_neurons[name]
        up = parent.rpartition(".")[0]
        beside = layer.rpartition(".")[0] == parent or (bool(parent) and layer.startswith(f"{up}." if up else ""))
        if beside and num_rows in (size, 2 * size):
            found.append(torch.cat([selection[name] + start for start in range(0, num_rows, size)]))
    return found


def stored_fingerprint(tensors: Mapping[str, Tensor], layer: str) -> str | None:
    """Return the sha256 of a layer's weight as `bitsandbytes.layers.fingerprint` does; None: there is no such layer."""
    weight = f"{layer}.weight"
    if weight not in tensors:
        return None
    scales = [f"{layer}.SCB"] if f"{layer}.SCB" in tensors else []
    states = sorted(name for name in tensors if name.startswith(f"{weight}."))
    return sha256_of_all(("", tensors[name]) for name in (weight, *scales, *states))


def check_together(name: str, changes: Mapping[str, Change]) -> None:
    """Raise where a delta of a bias is of other rows than that of its layer.

    Raises:
        ValueError: If it is.
    """
    layer, change = layer_of(name), changes[name]
    other = changes.get(f"{layer}.delta")
    if other is None or not other.is_at(change.neurons, rows=change.of_rows):
        wrong = f"The deltas of layer {layer!r} and of its bias are of different rows"
        raise ValueError(problem(wrong, "the same", "The patch is damaged."))


def is_same(one: Change, other: Change) -> bool:
    """Say whether two deltas are of the same values at the same places."""
    return one.after == other.after and one.is_at(other.neurons, rows=other.of_rows)


def check_deltas(
    deltas: Mapping[str, Change], tensors: Mapping[str, Tensor], folder: str | Path, *, applied: bool
) -> None:
    """Raise where a folder is not what deltas go beside, or are taken from.

    Raises:
        ValueError: If its codes are others, or it holds no deltas, or others.
    """
    for name, change in deltas.items():
        layer = layer_of(name)
        check_together(name, deltas)
        found = stored_fingerprint(tensors, layer)
        if found != change.before:
            wrong = f"The weight of layer {layer!r} in {str(folder)!r} "
            wrong += "is missing" if found is None else f"has sha256 {found[:12]}..."
            advice = "The patch was made for another base, or in codes of other options."
            raise ValueError(problem(wrong, f"{change.before[:12]}...", advice))
    there = deltas_beside(folder)
    same = there.keys() == deltas.keys() and all(is_same(there[name], deltas[name]) for name in deltas)
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
    columns, rows = places_of(layers)
    values, biases = (
        {layer_of(name): change.value for name, change in deltas.items() if name.endswith(f".{key}")}
        for key in ("delta", "delta_bias")
    )
    hashes = {layer: change.before for layer, change in layers.items()}
    write_deltas(folder / DELTAS, DeltasOnFile(values, columns | rows, hashes, frozenset(rows), biases))
