"""A temporary file or folder is gone when its block ends, and what a killed process left goes with the next call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_simu._temporary import remove_leftovers, temporary_beside

pytest.importorskip("fcntl")

LEAVE = """
import os, sys
from pathlib import Path
from torch_simu._temporary import temporary_beside
with temporary_beside(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as temporary:
    (temporary / "weights" if temporary.is_dir() else temporary).write_bytes(b"half")
    if sys.argv[3] == "die":
        os._exit(9)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def leave(path: Path, kind: str, then: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", LEAVE, str(path), kind, then], **pipes)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_block_ends(tmp_path: Path, kind: str, error: type[BaseException] | None) -> None:
    def use() -> None:
        with temporary_beside(tmp_path / "out", folder=kind == "folder") as temporary:
            assert temporary.is_dir() == (kind == "folder") and temporary.parent == tmp_path
            assert temporary.stat().st_mode & 0o077 == 0
            if temporary.is_dir():
                (temporary / "file").write_text("x")
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_call_for_the_same_place(tmp_path: Path, kind: str) -> None:
    leave(tmp_path / "out", kind, "die").communicate()
    assert len(os.listdir(tmp_path)) == 1
    with temporary_beside(tmp_path / "other"):
        pass
    assert len(os.listdir(tmp_path)) == 1
    with temporary_beside(tmp_path / "out") as temporary:
        assert os.listdir(tmp_path) == [temporary.name]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_process_uses_stays(tmp_path: Path, kind: str) -> None:
    living = leave(tmp_path / "out", kind, "wait")
    assert living.stdout is not None and living.stdout.readline() == "ready\n"
    with temporary_beside(tmp_path / "out"):
        assert len(os.listdir(tmp_path)) == 2
    assert len(os.listdir(tmp_path)) == 1
    living.communicate("\n")
    assert living.returncode == 0 and os.listdir(tmp_path) == []


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = [".out", ".out.cache", ".out.abc.torch-simu.txt", "out.abcd1234.torch-simu", ".outer.abc.torch-simu"]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / ".out.link.torch-simu").symlink_to(tmp_path / ".out.cache")
    remove_leftovers(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, ".out.link.torch-simu"])
    remove_leftovers(tmp_path / "none" / "out")


def test_a_name_that_another_process_took_away_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_simu import _temporary

    lock, taken = _temporary._lock, []

    def steal(descriptor: int | None) -> bool:
        if not taken:
            taken.append(next(tmp_path.iterdir()))
            taken[0].unlink()
        return lock(descriptor)

    monkeypatch.setattr(_temporary, "_lock", steal)
    with temporary_beside(tmp_path / "out") as temporary:
        assert temporary.exists() and temporary != taken[0]
