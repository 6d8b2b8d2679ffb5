"""Patches of checkpoints on disk: tensors are mapped, not loaded, and a folder appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from torch_simu._checks import problem
from torch_simu._files import current_umask, flush_to_disk
from torch_simu._hashes import sha256_of
from torch_simu._temporary import remove_leftovers, temporary_beside
from torch_simu.columns import NeuronDim, num_columns
from torch_simu.deltas.files import DELTAS
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.audit import Audit, audit
from torch_simu.patch.beside import (
    check_deltas,
    check_selected,
    deltas_beside,
    is_same,
    layer_of,
    put_deltas,
    stored_fingerprint,
)
from torch_simu.patch.change import Change, Place, Where, changes_between
from torch_simu.patch.model import neurons_of
from torch_simu.patch.patch import NeuronPatch
from torch_simu.patch.reading import Checkpoint, is_quantized, opened
from torch_simu.patch.weights import weight_files


def patch_between_checkpoints(
    base: str | Path,
    model: str | Path,
    selection: NeuronSelection,
    *,
    whole: str | None = None,
    units: bool = False,
    provenance: Mapping[str, object] | None = None,
) -> NeuronPatch:
    """Return the patch that turns one folder of safetensors files into another.

    Args:
        base: The folder before.
        model: The folder after, with tensors of the same names.
        selection: The neurons that may differ.
        whole: A regular expression, anywhere in their names, for tensors that may differ as a whole (attention
            projections that were trained in full, say); None: none may.
        units: Whether the rows that make these neurons may differ, or have deltas, too: of the projections beside their
            layers.
        provenance: What to keep with the patch, as JSON values.

    Raises:
        FileNotFoundError: If a folder has no safetensors file.
        KeyError: If a selected layer is not in the base.
        ValueError: If something else differs, or nothing does.
    """
    try:
        allowed = None if whole is None else re.compile(whole)
    except re.error as error:
        raise ValueError(problem(f"whole is {whole!r} ({error})", "a regular expression")) from None
    if is_quantized(base) != is_quantized(model):
        codes, weights = (base, model) if is_quantized(base) else (model, base)
        wrong = f"{str(codes)!r} holds codes, and {str(weights)!r} weights"
        advice = f"The base of deltas is the codes beside them: copy {str(codes)!r}, and remove {DELTAS} from the copy."
        raise ValueError(problem(wrong, "two checkpoints of one kind", advice))
    if deltas_beside(base):
        advice = f"Give a copy without {DELTAS}: the base of deltas is the codes beside them."
        raise ValueError(problem(f"The base {str(base)!r} holds deltas itself", "no deltas", advice))
    deltas = deltas_beside(model)
    with opened(base) as before, opened(model) as after:
        check_selected(deltas, selection, units=units)
        changes = changes_between(
            before,
            after,
            _where(before, base, _beside_no(deltas, selection), units=units and not _has_rows(deltas)),
            lambda name: allowed is not None and bool(allowed.search(name)),
            unread=before.unread | after.unread,
        )
        check_deltas(deltas, before, model, applied=True)
    changes |= deltas
    if not changes:
        raise ValueError(problem("No bit differs between base and model", "a change", "Is it the same folder?"))
    return NeuronPatch(changes, dict(provenance or {}))


def apply_to_checkpoint(patch: NeuronPatch, base: str | Path, out: str | Path) -> None:
    """Write a copy of a checkpoint folder with the change in it.

    Args:
        patch: The patch.
        base: A folder with safetensors files; it is only read.
        out: A new folder. It appears when it is complete, and not at all if the call is interrupted or refused.

    Raises:
        FileExistsError: If `out` exists.
        FileNotFoundError: If `base` has no safetensors file.
        KeyError: If a tensor is not in the checkpoint.
        ValueError: If a tensor is not that of the base, to the last bit, or the base holds deltas.
    """
    _flip(patch, base, out, applied=False)


def revert_checkpoint(patch: NeuronPatch, model: str | Path, out: str | Path) -> None:
    """Write a copy of a model's folder without the change of a patch; arguments and errors as `apply_to_checkpoint`."""
    _flip(patch, model, out, applied=True)


def verify_checkpoint(patch: NeuronPatch, base: str | Path, model: str | Path) -> Audit:
    """Compare every tensor of base and model, by hash, and say whether the patch alone lies between the folders."""
    with opened(base) as before, opened(model) as after:
        held = deltas_beside(model)
        found = {name: change.value for name, change in held.items()}
        there = {name: change.value for name, change in deltas_beside(base).items()}
        same = [name for name, change in held.items() if name in patch.changes and is_same(change, patch.changes[name])]
        codes = {name: stored_fingerprint(after, layer_of(name)) for name in same}
        made = audit(
            patch.changes,
            ChainMap(there, cast("dict[str, Tensor]", before)),
            ChainMap(found, cast("dict[str, Tensor]", after)),
            unread=before.unread | after.unread,
            codes=codes,
        )
        return made.named(base=Path(base).resolve().name, model=Path(model).resolve().name)


def _flip(patch: NeuronPatch, source: str | Path, out: str | Path, *, applied: bool) -> None:
    source, out = Path(source), Path(out)
    deltas = {name: change for name, change in patch.changes.items() if change.is_delta}
    changes = {name: change for name, change in patch.changes.items() if not change.is_delta}
    remove_leftovers(out)
    _check_new_folder(out, source)
    hashes = {name: change.before if applied else change.after for name, change in changes.items()}
    with opened(source) as tensors:
        if deltas or (Path(source) / DELTAS).is_file():
            check_deltas(deltas, tensors, source, applied=applied)
        for name, change in changes.items():
            if name not in tensors:
                raise KeyError(problem(f"Tensor {name!r} is not in {str(source)!r}", "the patch's base"))
            tensors.check_writable(name)
            change.check(name, tensors[name], applied=applied)
            if sha256_of(change.flipped(tensors[name])) != hashes[name]:
                raise ValueError(problem(f"The change of tensor {name!r} leads elsewhere", "what its sha256 says"))
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(out, folder=True) as copy:
            _copy(source, copy)
            if deltas and applied:
                (copy / DELTAS).unlink()
            elif deltas:
                put_deltas(deltas, copy)
            for name, change in changes.items():
                tensors.write(copy, name, change.flipped(tensors[name]))
            with opened(copy) as written:
                for name, expected in hashes.items():
                    if sha256_of(written[name]) != expected:
                        wrong = f"Tensor {name!r} in the copy of {str(source)!r} is not what was written"
                        raise ValueError(problem(wrong, "its sha256", "Did something change the files meanwhile?"))
            for path in sorted(copy.rglob("*"), reverse=True):
                flush_to_disk(path)
            flush_to_disk(copy)
            copy.rename(out)
    flush_to_disk(out.parent)


def _check_new_folder(out: Path, source: Path) -> None:
    """Raise before the work begins where the result could not appear."""
    if os.path.lexists(out):
        raise FileExistsError(problem(f"{str(out)!r} exists", "a new folder"))
    weight_files(source)
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(problem(f"{str(out)!r} is inside of {str(source)!r}", "a folder beside it"))
    parent = out.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(problem(f"{str(parent)!r} is no folder", "a folder to write in"))
    if not os.access(parent, os.W_OK):
        raise PermissionError(problem(f"Folder {str(parent)!r} is read-only", "a folder to write in"))


def _copy(source: Path, out: Path) -> None:
    # Without the permissions: of a read-only checkpoint the copy could not be changed, or removed.
    shutil.copytree(source, out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    mode = 0o777 & ~current_umask()
    for folder in (out, *(path for path in out.rglob("*") if path.is_dir())):
        folder.chmod(mode)


def _has_rows(deltas: Mapping[str, Change]) -> bool:
    # What makes neurons has deltas then, and stays as it is beneath them.
    return any(change.of_rows for change in deltas.values())


def _beside_no(deltas: Mapping[str, Change], selection: NeuronSelection) -> NeuronSelection:
    """Return the layers of a selection whose weights may change themselves: those without a delta."""
    if not deltas:
        return selection
    kept = [layer for layer in selection if f"{layer}.delta" not in deltas and len(selection[layer])]
    return NeuronSelection(
        {layer: selection[layer] for layer in kept}, {layer: selection.num_neurons[layer] for layer in kept}
    )


def _where(base: Checkpoint, folder: str | Path, selection: NeuronSelection, *, units: bool) -> Where:
    if base.model is not None:
        return neurons_of(base.model, selection, units=units)
    if units:
        wrong = f"units is True, and the model of {str(folder)!r} is not known"
        raise ValueError(problem(wrong, "a configuration that transformers knows, of float weights"))
    where = {}
    for layer in selection:
        name = next((key for key in (f"{layer}.weight", f"{layer}.down_proj") if key in base), None)
        if name is None:
            raise KeyError(problem(f"Layer {layer!r} is not in {str(folder)!r}", "the checkpoint of the selection"))
        where[name] = Place(_neuron_dim(name, base[name], selection.num_neurons[layer]), selection[layer])
    return where


def _neuron_dim(name: str, tensor: Tensor, num_neurons: int) -> NeuronDim:
    """What of a stored weight its neurons are: a checkpoint does not say, but their number does."""
    options: list[NeuronDim] = [-1, 0] if tensor.dim() == 2 else [(0, 2), (0, 1)]
    for dim in options:
        if num_columns(tensor.shape, dim) == num_neurons:
            return dim
    wrong = f"Tensor {name!r} of shape {tuple(tensor.shape)} has no dimension of {num_neurons} neurons"
    raise ValueError(problem(wrong, "the selection's layer", "Was the selection made on another model?"))
