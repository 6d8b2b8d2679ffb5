"""Kill a command before its n-th file operation, in a child of this process, and call it again."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

KILLED = 9
_OPERATIONS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
    "tempfile.mkstemp",
)


def child(work: Callable[[], object], folder: Path, kill_at: int = 0) -> tuple[int, int]:
    """Do some work in a child that ends, as a killed process does, before its n-th operation on files in a folder.

    Args:
        work: The work; an exit with status 0 or 3 (a target that was not reached) is success.
        folder: Where operations count.
        kill_at: Number of the operation; 0: none.

    Returns:
        The exit status of the child, and how many operations it came to.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        with os.fdopen(reading) as told:
            count = told.read()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return status, int(count or 0)
    status, count = 1, 0

    def counted(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in _OPERATIONS or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == kill_at:
            os.write(writing, str(count).encode())
            os._exit(KILLED)

    try:
        sys.addaudithook(counted)
        work()
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code in (0, 3) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os.write(writing, str(count).encode())
        os._exit(status)


def content(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
