"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_simu._checks import problem


def check_writable(folder: Path, *, force: bool) -> None:
    """Raise before the work begins when its result could not be written.

    Raises:
        FileExistsError: If `folder` exists and `force` is not given.
        NotADirectoryError: If `folder` is a file, or lies in one.
        PermissionError: If the parent folder cannot be written to.
    """
    if folder.is_file():
        raise NotADirectoryError(problem(f"{str(folder)!r} is a file", "a folder"))
    if folder.exists() and any(folder.iterdir()) and not force:
        wrong = f"Folder {str(folder)!r} exists and is not empty"
        raise FileExistsError(problem(wrong, "a new folder", "Use --force to replace it."))
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(problem(f"{str(parent)!r} is no folder", "a folder to write in"))
    if not os.access(parent, os.W_OK):
        raise PermissionError(problem(f"Folder {str(parent)!r} is read-only", "a folder to write in"))


@contextmanager
def whole_folder(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place when the block ends without an exception.

    Args:
        folder: Where the result goes; parents are made.
        force: Replace what is there. The old folder stays until the new one is complete.

    Raises:
        FileExistsError: If `folder` exists, is not empty, and `force` is not given.
        PermissionError: If the parent folder cannot be written to.
    """
    check_writable(folder, force=force)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    old = temporary.with_name(temporary.name + ".old")
    try:
        # mkdtemp makes the folder private; a result should be as readable as any other folder of the user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
