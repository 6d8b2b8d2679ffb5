"""Files that appear whole or not at all: written beside their place, then renamed; tensors with a JSON header."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torch_simu._checks import problem

_VERSION = 1


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an exception.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If `path` is a folder.
        PermissionError: If the folder is not writable.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(problem(f"The folder of {str(path)!r} does not exist", "an existing folder"))
    if path.is_dir():
        raise IsADirectoryError(problem(f"{str(path)!r} is a folder", "the name of a file"))
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except PermissionError:
        wrong = f"The folder of {str(path)!r} is not writable"
        raise PermissionError(problem(wrong, "a folder that you may write to")) from None
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; a result should be as readable as any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> None:
    """Write tensors and a JSON header as one safetensors file of the given kind."""
    text = json.dumps({"kind": kind, "version": _VERSION, **header}, sort_keys=True)
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"torch_simu": text})


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read a file that `save_tensors` wrote, refusing any other kind or version.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If `path` is a folder.
        ValueError: If the file is damaged or of another kind or version.
    """
    expected = f"a torch_simu file of kind {kind!r}, version {_VERSION}"
    if Path(path).is_dir():
        raise IsADirectoryError(problem(f"{str(path)!r} is a folder", expected))
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("torch_simu", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open has no iterator)
    except FileNotFoundError:
        raise FileNotFoundError(problem(f"File {str(path)!r} does not exist", expected)) from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(problem(f"File {str(path)!r} is unreadable ({error})", expected)) from None
    found = (header.get("kind"), header.get("version")) if isinstance(header, dict) else None
    if found != (kind, _VERSION):
        what = "no torch_simu header" if found is None else f"kind {found[0]!r}, version {found[1]}"
        raise ValueError(problem(f"File {str(path)!r} has {what}", expected))
    return tensors, cast("dict[str, object]", header)
