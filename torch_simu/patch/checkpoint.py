"""Patches of checkpoints on disk: tensors are mapped, not loaded, and a folder appears whole or not at all."""

from __future__ import annotations

import json
import math
import mmap
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu._hashes import sha256_of
from torch_simu.columns import NeuronDim, num_columns
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.audit import Audit, audit
from torch_simu.patch.change import changes_between
from torch_simu.patch.patch import NeuronPatch

_DTYPES = MappingProxyType(
    {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
        **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
        **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    }
)


def patch_between_checkpoints(
    base: str | Path,
    model: str | Path,
    selection: NeuronSelection,
    *,
    whole: str | None = None,
    provenance: Mapping[str, object] | None = None,
) -> NeuronPatch:
    """Return the patch that turns one folder of safetensors files into another.

    Args:
        base: The folder before.
        model: The folder after, with tensors of the same names.
        selection: The neurons that may differ.
        whole: A regular expression, anywhere in their names, for tensors that may differ as a whole (attention
            projections that were trained in full, say); None: none may.
        provenance: What to keep with the patch, as JSON values.

    Raises:
        FileNotFoundError: If a folder has no safetensors file.
        KeyError: If a selected layer is not in the base.
        ValueError: If something else differs, or nothing does.
    """
    with mapped(base) as before, mapped(model) as after:
        where = {}
        for layer in selection:
            name = next((key for key in (f"{layer}.weight", f"{layer}.down_proj") if key in before), None)
            if name is None:
                raise KeyError(problem(f"Layer {layer!r} is not in {str(base)!r}", "the checkpoint of the selection"))
            where[name] = (_neuron_dim(name, before[name], selection.num_neurons[layer]), selection[layer])
        allowed = (lambda name: False) if whole is None else re.compile(whole).search
        changes = changes_between(before, after, where, lambda name: bool(allowed(name)))
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
        ValueError: If a tensor is not that of the base, to the last bit, or the patch holds deltas.
    """
    _flip(patch, base, out, applied=False)


def revert_checkpoint(patch: NeuronPatch, model: str | Path, out: str | Path) -> None:
    """Write a copy of a checkpoint folder without the change; arguments and errors as `apply_to_checkpoint`."""
    _flip(patch, model, out, applied=True)


def verify_checkpoint(patch: NeuronPatch, base: str | Path, model: str | Path) -> Audit:
    """Compare every tensor of two folders by hash, and say whether the patch, and nothing else, lies between them."""
    with mapped(base) as before, mapped(model) as after:
        return audit(patch.changes, before, after)


@contextmanager
def mapped(folder: str | Path, *, writable: bool = False) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of all safetensors files in a folder, mapped from disk and valid inside the block.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is damaged, or two hold a tensor of the same name.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        wrong = f"Folder {str(folder)!r} has no safetensors file"
        raise FileNotFoundError(problem(wrong, "a checkpoint", "Save the model with save_pretrained."))
    tensors: dict[str, Tensor] = {}
    memories: list[mmap.mmap] = []
    with ExitStack() as stack:
        for path in files:
            file = stack.enter_context(path.open("r+b" if writable else "rb"))
            # A private copy of the pages where nothing may be written: torch has no read-only tensors.
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
            try:
                memory = mmap.mmap(file.fileno(), 0, access=access)
                found = _tensors_in(memory)
            except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
                wrong = f"File {str(path)!r} is unreadable ({error})"
                raise ValueError(problem(wrong, "a safetensors file")) from None
            if twice := found.keys() & tensors.keys():
                wrong = f"Tensor {min(twice)!r} is in several files of {str(folder)!r}"
                raise ValueError(problem(wrong, "one checkpoint in the folder"))
            tensors |= found
            memories.append(memory)
        yield tensors
        if writable:
            # On disk before the folder appears. The mappings themselves end with the last tensor.
            for memory in memories:
                memory.flush()


def _tensors_in(memory: mmap.mmap) -> dict[str, Tensor]:
    length = int.from_bytes(memory[:8], "little")
    if 8 + length > len(memory):
        raise ValueError("it is truncated")
    header = json.loads(memory[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        dtype = _DTYPES[entry["dtype"]]
        count = math.prod(entry["shape"])
        if stop > len(memory) or stop - start != count * dtype.itemsize:
            raise ValueError(f"tensor {name!r} is truncated")
        # Of bytes first, because the start of a tensor need not be a multiple of its element's size.
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=stop - start, offset=start) if count else None
        if raw is None:
            tensors[name] = torch.zeros(entry["shape"], dtype=dtype)
        elif raw.data_ptr() % dtype.itemsize:
            raise ValueError(f"tensor {name!r} is not aligned")
        else:
            tensors[name] = raw.view(dtype).reshape(entry["shape"])
    return tensors


def _flip(patch: NeuronPatch, source: str | Path, out: str | Path, *, applied: bool) -> None:
    out = Path(out)
    if out.exists():
        raise FileExistsError(problem(f"{str(out)!r} exists", "a new folder"))
    if deltas := [name for name, change in patch.changes.items() if change.kind == "delta"]:
        wrong = f"The patch holds {len(deltas)} deltas beside quantized layers, such as {deltas[0]!r}"
        raise ValueError(problem(wrong, "changes of weights", "Load the model and call patch.apply(model)."))
    with mapped(source) as tensors:
        for name, change in patch.changes.items():
            if name not in tensors:
                raise KeyError(problem(f"Tensor {name!r} is not in {str(source)!r}", "the patch's base"))
            change.check(name, tensors[name], applied=applied)
            if sha256_of(change.flipped(tensors[name])) != (change.before if applied else change.after):
                raise ValueError(problem(f"The change of tensor {name!r} leads elsewhere", "what its sha256 says"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as parent:
        copy = Path(parent) / "checkpoint"
        shutil.copytree(source, copy)
        with mapped(copy, writable=True) as tensors:
            for name, change in patch.changes.items():
                change.flip(tensors[name])
        copy.rename(out)


def _neuron_dim(name: str, tensor: Tensor, num_neurons: int) -> NeuronDim:
    """What of a stored weight its neurons are: a checkpoint does not say, but their number does."""
    options: list[NeuronDim] = [-1, 0] if tensor.dim() == 2 else [(0, 2), (0, 1)]
    for dim in options:
        if num_columns(tensor.shape, dim) == num_neurons:
            return dim
    wrong = f"Tensor {name!r} of shape {tuple(tensor.shape)} has no dimension of {num_neurons} neurons"
    raise ValueError(problem(wrong, "the selection's layer", "Was the selection made on another model?"))
