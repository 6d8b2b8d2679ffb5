"""Files that appear whole or not at all: written beside their place, then renamed; tensors with a JSON header."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torch_simu._checks import problem
from torch_simu._hashes import sha256_of_all
from torch_simu._temporary import temporary_beside

_VERSION = 2
_UNCHECKED = 1
"""The version before there was a checksum."""

_CHECKSUM = '{"checksum": "'


def check_writable_file(path: str | Path) -> None:
    """Raise, before the work begins, where a file could not be written.

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
    if not os.access(path.parent, os.W_OK):
        raise _not_writable(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an exception.

    The content is on the disk before the name is, and the name when the block has ended.

    Raises:
        FileNotFoundError: If the folder does not exist.
        IsADirectoryError: If `path` is a folder.
        PermissionError: If the folder is not writable.
    """
    path = Path(path)
    check_writable_file(path)
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(temporary_beside(path))
        except PermissionError:
            raise _not_writable(path) from None
        yield temporary
        # The temporary file is private; a result should be as readable as any other file of the user.
        temporary.chmod(0o666 & ~current_umask())
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)


def check_replaceable(path: str | Path, *, ours: bool, force: bool) -> None:
    """Raise, before the work begins, where a result would take the place of something else.

    Args:
        path: Where the result goes.
        ours: Whether what is there is an earlier result of that kind.
        force: Whether such a result may be replaced.

    Raises:
        FileExistsError: If something is there that may not be replaced.
        OSError: If the file cannot be written.
    """
    if os.path.lexists(path) and not Path(path).is_dir():
        if not force:
            raise FileExistsError(problem(f"{str(path)!r} exists", "a new file", "Give another, or --force."))
        if not ours:
            wrong = f"{str(path)!r} exists and is no earlier result"
            raise FileExistsError(problem(wrong, "a new file", "Give another, or remove it yourself."))
    check_writable_file(path)


def current_umask() -> int:
    """Return the permissions that new files of this process do not get."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if not path.is_dir():
        with path.open("rb") as written:
            os.fsync(written.fileno())
        return
    # Not every file system can do that for folders, and not every system can open one.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> None:
    """Write tensors and a JSON header as one safetensors file of the given kind, with a checksum over both."""
    text = json.dumps({"kind": kind, "version": _VERSION, **header}, sort_keys=True)
    # One entry, because safetensors writes several in an order of chance. First in it, so that it covers all after it.
    checked = f'{_CHECKSUM}{_checksum(text[1:], tensors)}", {text[1:]}'
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"torch_simu": checked})


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read a file that `save_tensors` wrote, refusing any other kind or version, and any other content.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If `path` is a folder.
        ValueError: If the file is damaged, was changed, or is of another kind or version.

    Warns:
        UserWarning: If the file is of version 1, which had no checksum.
    """
    expected = f"a torch_simu file of kind {kind!r}, version {_VERSION}"
    if Path(path).is_dir():
        raise IsADirectoryError(problem(f"{str(path)!r} is a folder", expected))
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("torch_simu", "null")
            header = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open has no iterator)
    except FileNotFoundError:
        raise FileNotFoundError(problem(f"File {str(path)!r} does not exist", expected)) from None
    except (SafetensorError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(problem(f"File {str(path)!r} is unreadable ({error})", expected)) from None
    found = (header.get("kind"), header.get("version")) if isinstance(header, dict) else None
    if found not in ((kind, _VERSION), (kind, _UNCHECKED)):
        what = "no torch_simu header" if found is None else f"kind {found[0]!r}, version {found[1]}"
        raise ValueError(problem(f"File {str(path)!r} has {what}", expected))
    if found == (kind, _UNCHECKED) and "checksum" not in header:
        message = (
            f"File {str(path)!r} is of version 1 and has no checksum: damage to it would not be seen. Save it again."
        )
        warnings.warn(message, stacklevel=3)
        return tensors, cast("dict[str, object]", header)
    named, _, rest = text.removeprefix(_CHECKSUM).partition('", ')
    if not text.startswith(_CHECKSUM) or named != _checksum(rest, tensors):
        wrong = f"File {str(path)!r} does not have the sha256 that it names"
        raise ValueError(problem(wrong, "what was written", "It is damaged, or was changed: get it again."))
    del header["checksum"]
    return tensors, cast("dict[str, object]", header)


def kind_of(path: str | Path) -> str | None:
    """Return the kind of a file that `save_tensors` wrote; None of any other file."""
    header = header_of(path)
    return None if header is None or "kind" not in header else str(header["kind"])


def header_of(path: str | Path) -> dict[str, object] | None:
    """Return the unchecked header of a file that `save_tensors` wrote, without its tensors; None of any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("torch_simu", "null"))
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    return sha256_of_all(sorted(tensors.items()), hashlib.sha256(text.encode()).hexdigest())


def _not_writable(path: Path) -> PermissionError:
    return PermissionError(problem(f"The folder of {str(path)!r} is not writable", "a folder that you may write to"))
