"""Output folders that appear whole or not at all, and that nothing of the user's is lost to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch_simu._checks import problem
from torch_simu._temporary import remove_leftovers, temporaries_of, temporary_beside
from torch_simu.unlearning.report.runs import finish_run, how_to_go_on, is_finished, run_beside

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows has no such locks: two processes on one folder are not seen there)
    fcntl = None  # type: ignore[assignment]

_REPORTS = ("report.json", "attribution.json")
_OLD = ".old"


def check_writable(folder: Path, *, force: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Raise before the work begins when its result could not be written, or would replace something of the user's.

    What a killed process left beside the result is cleared away first, or put back: it decides what is there.

    Args:
        folder: Where the result goes.
        force: Replace what is there, if this package wrote it.
        inputs: What the work reads; names that are no files or folders are passed over.

    Raises:
        FileExistsError: If `folder` exists and `force` is not given, holds an input, or is no result of this package.
        NotADirectoryError: If `folder` is a file, or lies in one.
        PermissionError: If the parent folder cannot be written to.
    """
    if folder.is_file():
        raise NotADirectoryError(problem(f"{str(folder)!r} is a file", "a folder"))
    _settle(folder.absolute())
    place = folder.resolve()
    for each in inputs:
        path = Path(each).resolve()
        if each and path.exists() and (path == place or place in path.parents):
            wrong = f"Folder {str(folder)!r} holds {str(each)!r}, which is read"
            raise FileExistsError(problem(wrong, "a folder of its own for the result", "Give another --out."))
    if folder.exists() and any(folder.iterdir()):
        if not force:
            wrong = f"Folder {str(folder)!r} exists and is not empty"
            raise FileExistsError(problem(wrong, "a new folder", "Use --force to replace it."))
        if not _is_ours(folder):
            wrong = f"Folder {str(folder)!r} holds something else than a result of torch-simu"
            raise FileExistsError(problem(wrong, "a result, which --force may replace", "Remove it by hand."))
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(problem(f"{str(parent)!r} is no folder", "a folder to write in"))
    if not os.access(parent, os.W_OK):
        raise PermissionError(problem(f"Folder {str(parent)!r} is read-only", "a folder to write in"))


def check_new_file(path: Path, *, force: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Raise before the work begins when a file could not be written, or would replace something of the user's.

    Args:
        path: Where the file goes.
        force: Replace what is there.
        inputs: What the work reads.

    Raises:
        FileExistsError: If `path` exists and `force` is not given, or is an input.
        IsADirectoryError: If `path` is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    if path.is_dir():
        raise IsADirectoryError(problem(f"{str(path)!r} is a folder", "the name of a file"))
    if path.exists() and not force:
        raise FileExistsError(problem(f"File {str(path)!r} exists", "a new file", "Use --force to replace it."))
    if any(Path(each).resolve() == path.resolve() for each in inputs if each):
        raise FileExistsError(problem(f"File {str(path)!r} is read", "a file of its own", "Give another --out."))
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(problem(f"The folder of {str(path)!r} does not exist", "an existing folder"))


@contextmanager
def locked(folder: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Keep other processes off a result while it is made, and clear away what a killed one left beside it.

    A result that a killed process had set aside, to put a new one in its place, is put back. What interrupts the block
    (a signal, no error) gets a note that says how to go on.

    Args:
        folder: Where the result goes.
        resumable: Whether the work goes on from the folder of its run.

    Yields:
        The folder of the run beside the result.

    Raises:
        BlockingIOError: If another process is at it.
    """
    folder = folder.absolute()
    made = [each for each in (folder.parent, *folder.parent.parents) if not each.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_of(folder)
    with path.open("ab") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                # Its holder ended, and took the name away, between the two calls.
                raise BlockingIOError
        except BlockingIOError:
            wrong = f"Another process is working on {str(folder)!r}"
            raise BlockingIOError(problem(wrong, "one at a time", "Wait for it, or give another --out.")) from None
        try:
            _clear(folder)
            before = _identity(folder)
            try:
                yield run_beside(folder)
            except BaseException as stop:
                if not isinstance(stop, Exception):
                    complete = _identity(folder) not in (before, None)
                    run = run_beside(folder) if resumable else None
                    stop.add_note(f"The result is complete: {folder}" if complete else how_to_go_on(run))
                raise
        finally:
            path.unlink(missing_ok=True)
            for each in made:
                # A call that wrote nothing leaves no folders behind either.
                if each.is_dir() and not any(each.iterdir()):
                    each.rmdir()


@contextmanager
def whole_folder(folder: Path, *, force: bool = False, run: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place when the block ends without an exception.

    Args:
        folder: Where the result goes; parents are made.
        force: Replace what is there. The old folder stays until the new one is complete.
        run: The folder of the run that makes the result; it goes when the result stands.

    Raises:
        FileExistsError: If `folder` exists, is not empty, and `force` is not given.
        PermissionError: If the parent folder cannot be written to.
    """
    check_writable(folder, force=force)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(folder, folder=True) as temporary:
        old = temporary.with_name(temporary.name + _OLD)
        # A temporary folder is private; a result should be as readable as any other folder of the user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        yield temporary
        if run is not None:
            finish_run(run, temporary)
        try:
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        if old.exists():
            # Half removed under its own name, it could be taken for a result to put back.
            old.rename(temporary)
    if run is not None:
        remove_folder(run, folder)


def remove_folder(folder: Path, result: Path) -> None:
    """Remove a folder beside a result so that it is gone at once: under its name it is never seen half removed."""
    with temporary_beside(result.absolute(), folder=True) as aside:
        folder.rename(aside / folder.name)


def _settle(folder: Path) -> None:
    """Clear away what is left beside a result, if anything is and nobody is at it."""
    if not folder.name:
        return
    left = temporaries_of(folder) + temporaries_of(folder, _OLD)
    if left or _lock_of(folder).exists() or is_finished(run_beside(folder), folder):
        # Where another process is at it, or nothing can be written, the checks or the work itself say so.
        with suppress(OSError), locked(folder):
            pass


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _clear(folder: Path) -> None:
    """Remove what killed processes left beside a result; what they had set aside comes back first."""
    remove_leftovers(folder)
    for old in temporaries_of(folder, _OLD):
        if folder.exists():
            remove_folder(old, folder)
        else:
            old.rename(folder)
    if is_finished(run_beside(folder), folder):
        remove_folder(run_beside(folder), folder)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from one that took its place; None where there is none."""
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def _is_ours(folder: Path) -> bool:
    for name in _REPORTS:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and ({"title", "methods"} <= content.keys() or "provenance" in content):
            return True
    return False
