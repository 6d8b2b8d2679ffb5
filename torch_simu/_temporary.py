"""Temporary files and folders beside their place; what a killed process left there is removed by the next call."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover (a system without file locks)
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".torch-simu"


@contextmanager
def temporary_beside(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new private file or folder in the folder of `path`; it is gone when the block ends, or renamed by then.

    Raises:
        OSError: If the folder of `path` cannot be written to.
    """
    remove_leftovers(path)
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX))
            descriptor = _opened(temporary)
        else:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
            temporary = Path(name)
            if fcntl is None:
                # Without locks nothing is held open: some systems do not rename what is.
                _close(descriptor)
                descriptor = None
        _lock(descriptor)
        if temporary.exists():
            break
        # Another process took it for a leftover before the lock was there.
        _close(descriptor)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what `temporary_beside` made for `path` in a process that is gone: one that lives holds a lock on it."""
    for found in temporaries_of(path):
        descriptor = _opened(found)
        if _lock(descriptor):
            _remove(found)
        _close(descriptor)


def temporaries_of(path: Path, ending: str = "") -> list[Path]:
    """Return what lies beside `path` under a name that `temporary_beside` gave, with an ending behind it.

    What was made for another path is never among it, whatever that is called.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\w+{re.escape(_SUFFIX + ending)}")
    # A folder that cannot be listed is refused by what comes next.
    with contextlib.suppress(OSError):
        return [each for each in path.parent.iterdir() if pattern.fullmatch(each.name) and not each.is_symlink()]
    return []


def _opened(path: Path) -> int | None:
    # Not every system can open a folder, and another process may have removed it.
    with contextlib.suppress(OSError):
        return os.open(path, os.O_RDONLY)
    return None


def _lock(descriptor: int | None) -> bool:
    """Take the lock, and say whether it was free; without locks nothing is ever taken for a leftover."""
    if fcntl is None or descriptor is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
