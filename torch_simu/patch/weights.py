"""The weight files of a checkpoint: those that its index names, or the plain one, and nothing else in the folder."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from torch_simu._checks import problem

PLAIN = "model.safetensors"
"""The file of a checkpoint that is one file."""

INDEX = "model.safetensors.index.json"
"""The index of a checkpoint in several files."""

_DTYPES = MappingProxyType(
    {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
        **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
        **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64},
        **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor as it lies in a file.

    Attributes:
        file: The file, from the checkpoint's folder.
        start: Where in the file its bytes begin.
        raw: Its bytes, mapped from the file.
        dtype: Of the tensor.
        shape: Of the tensor.
    """

    file: str
    start: int
    raw: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """Return the tensor: the mapped bytes, or a copy where they do not start at a multiple of an element's size."""
        aligned = self.raw.data_ptr() % self.dtype.itemsize == 0
        return (self.raw if aligned else self.raw.clone()).view(self.dtype).reshape(self.shape)


def weight_files(folder: str | Path) -> tuple[list[str], Mapping[str, str]]:
    """Return the files that hold a checkpoint's weights, as transformers takes them, by their names in the folder.

    Returns:
        The files, and which of them each tensor is in; the latter is empty where there is no index.

    Raises:
        FileNotFoundError: If the folder, its weights, or a file that its index names does not exist.
        ValueError: If the index is damaged, or names something else than safetensors files in the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        wrong = f"{str(folder)!r} is a file" if folder.exists() else f"Folder {str(folder)!r} does not exist"
        raise FileNotFoundError(problem(wrong, "the folder of a checkpoint"))
    named = read_config(folder).get("transformers_weights")
    first = named if isinstance(named, str) else PLAIN if (folder / PLAIN).is_file() else INDEX
    if first.endswith(".index.json"):
        if not (folder / first).is_file():
            wrong = f"Folder {str(folder)!r} has no safetensors file of a model"
            raise FileNotFoundError(problem(wrong, f"{PLAIN} or {INDEX}", "Save the model with save_pretrained."))
        places = indexed_files(folder / first)
        files = sorted(set(places.values()))
    else:
        files, places = [first], {}
        _check_name(folder / "config.json", first)
    for file in files:
        if not (folder / file).is_file():
            wrong = f"{str(folder / first)!r} names {file!r}, which does not exist"
            raise FileNotFoundError(problem(wrong, "all files of the checkpoint"))
    return files, places


def indexed_files(path: str | Path) -> Mapping[str, str]:
    """Return which file each tensor of a checkpoint is in, as its index says.

    Raises:
        ValueError: If the index is damaged, or names something else than safetensors files in its folder.
    """
    try:
        places = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        files = set(places.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"Index {str(path)!r} is unreadable ({error})"
        raise ValueError(problem(wrong, "a weight_map from tensors to files")) from None
    if not files:
        raise ValueError(problem(f"Index {str(path)!r} names no file", "the files of a checkpoint"))
    for file in files:
        _check_name(path, file)
    return cast("dict[str, str]", places)


def read_config(folder: str | Path) -> Mapping[str, object]:
    """Return a checkpoint's configuration as it is written; empty where there is none.

    Raises:
        ValueError: If it is damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(problem(f"File {str(path)!r} is unreadable ({error})", "a configuration as JSON")) from None
    if not isinstance(found, dict):
        raise ValueError(problem(f"File {str(path)!r} holds a {type(found).__name__}", "a configuration as JSON"))
    return found


@contextmanager
def mapped(folder: str | Path) -> Iterator[dict[str, Stored]]:
    """Yield the tensors of a checkpoint by their names in its files, mapped from disk and valid inside the block.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, two hold a tensor of the same name, or one lacks what the index says.
    """
    files, places = weight_files(folder)
    tensors: dict[str, Stored] = {}
    for name in files:
        path = Path(folder) / name
        try:
            with path.open("rb") as file:
                # A private copy of the pages, because torch has no read-only tensors.
                found = _tensors_in(name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(problem(f"File {str(path)!r} is unreadable ({error})", "a safetensors file")) from None
        if twice := found.keys() & tensors.keys():
            wrong = f"Tensor {min(twice)!r} is in several files of {str(folder)!r}"
            raise ValueError(problem(wrong, "one checkpoint in the folder"))
        tensors |= found
    if missing := sorted(places.keys() - tensors.keys()):
        wrong = f"Tensor {missing[0]!r} is not in {places[missing[0]]!r} of {str(folder)!r}"
        raise ValueError(problem(wrong, "what the index says", "Get the checkpoint again."))
    # The mappings themselves end with the last tensor.
    yield tensors


def _check_name(index: str | Path, name: object) -> None:
    source = f"{str(index)!r} names {name!r}"
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        advice = "Other formats may run code when they are read: convert the weights."
        raise ValueError(problem(source, "safetensors files", advice))
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\\" in name or "\0" in name:
        raise ValueError(problem(source, "files in the folder"))


def _tensors_in(file: str, memory: mmap.mmap) -> dict[str, Stored]:
    length = int.from_bytes(memory[:8], "little")
    if len(memory) < 8 or 8 + length > len(memory):
        raise ValueError("it is truncated")
    header = json.loads(memory[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + length + _count(offset) for offset in entry["data_offsets"])
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} is of dtype {entry['dtype']!r}, which torch does not have")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(map(_count, entry["shape"]))
        if stop > len(memory) or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} is truncated")
        raw = torch.zeros(0, dtype=torch.uint8)
        if stop > start:
            raw = torch.frombuffer(memory, dtype=torch.uint8, count=stop - start, offset=start)
        tensors[name] = Stored(file, start, raw, dtype, shape)
    return tensors


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
