"""Data flows one way: a module imports lower floors only, and stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rules.sources import OURS, PACKAGE, ROOT, SOURCES, imports, named

FLOORS = {
    "_checks": 1,
    "_hashes": 1,
    "_temporary": 1,
    "columns": 1,
    "_files": 2,
    "bitsandbytes": 2,
    "curvature": 2,
    "layers": 2,
    "update": 2,
    "whitening": 2,
    "hooks": 3,
    "neurons": 3,
    "attribution": 4,
    "deltas": 4,
    "optimizer": 4,
    "patch": 5,
    "unlearning": 6,
    "cli": 7,
    "__init__": 7,
    "__main__": 8,
}
"""A file or folder of the package -> the floor it is on."""

APPLICATION_FLOORS = {
    "adversary": 0,
    "attack": 3,
    "checkpoint": 1,
    "data": 1,
    "identity": 1,
    "objectives": 1,
    "progress": 0,
    "config": 2,
    "pace": 2,
    "differentiate": 2,
    "metrics": 2,
    "refresh": 2,
    "report": 2,
    "rehearsal": 3,
    "localization": 3,
    "steps": 3,
    "driver": 4,
    "trainer": 4,
    "pilot": 5,
    "demo": 5,
}
"""A file or folder of `unlearning` -> its floor in there."""

MOST_LINES, MOST_FILES = 300, 12

TENSORS_ONLY = {"torch", "einops"}
OPTIONAL = {
    *("accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "rich"),
    *("rouge_score", "scipy", "tokenizers", "transformers", "triton", "typer"),
}


def room(path: Path) -> str:
    """The file or folder directly in the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def application_rooms(path: Path) -> set[str]:
    """The rooms of `unlearning` that a file imports."""
    prefix = "torch_simu.unlearning."
    return {name.removeprefix(prefix).split(".")[0] for name in imports(path) if name.startswith(prefix)}


def own_rooms(path: Path) -> set[str]:
    """The other rooms of the package that a file imports."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("torch_simu.")}
    root_names = {name for name in found if name not in FLOORS}
    assert not root_names or room(path) in ("__init__", "__main__"), f"{path.name} imports {root_names} from the top"
    return found - root_names - {room(path)}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_file_has_a_floor_and_imports_lower_floors_only(path: Path) -> None:
    assert room(path) in FLOORS, f"{room(path)} has no floor yet: add it to FLOORS"
    higher = {name for name in own_rooms(path) if FLOORS[name] >= FLOORS[room(path)]}
    assert not higher


@pytest.mark.parametrize("path", sorted((PACKAGE / "unlearning").rglob("*.py")), ids=named)
def test_the_application_has_floors_of_its_own(path: Path) -> None:
    own = path.relative_to(PACKAGE / "unlearning").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in APPLICATION_FLOORS, f"unlearning/{own} has no floor yet: add it to APPLICATION_FLOORS"
    found = application_rooms(path) - {own}
    assert not {name for name in found if APPLICATION_FLOORS[name] >= APPLICATION_FLOORS[own]}


@pytest.mark.parametrize(
    ("test", "file", "imported"),
    [
        (test_every_file_has_a_floor_and_imports_lower_floors_only, "layers.py", "neurons"),
        (test_every_file_has_a_floor_and_imports_lower_floors_only, "optimizer/steps.py", "deltas.attach"),
        (test_every_file_has_a_floor_and_imports_lower_floors_only, "elsewhere.py", "layers"),
        (test_the_application_has_floors_of_its_own, "unlearning/data/rows.py", "unlearning.metrics.tofu"),
        (test_the_application_has_floors_of_its_own, "unlearning/steps.py", "unlearning.driver"),
        (test_the_application_has_floors_of_its_own, "unlearning/elsewhere.py", "layers"),
    ],
)
def test_an_import_of_a_higher_floor_is_seen(
    test: Callable[[Path], None], file: str, imported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    wrong = tmp_path / file
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_text(f"def f():\n    from torch_simu.{imported} import name\n")
    with pytest.raises(AssertionError):
        test(wrong)


@pytest.mark.parametrize("name", ["columns", "update", "curvature", "whitening"])
def test_the_maths_sees_tensors_only(name: str) -> None:
    allowed = {*TENSORS_ONLY, *sys.stdlib_module_names}
    found = set(imports(PACKAGE / f"{name}.py"))
    assert all(module.split(".")[0] in allowed or module.startswith("torch_simu._checks") for module in found)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_optional_packages_are_imported_where_they_are_used_only(path: Path) -> None:
    allowed = {"transformers"} if room(path) in ("unlearning", "cli") else set()
    if room(path) == "cli":
        allowed |= {"rich", "typer"}
    assert {name.split(".")[0] for name in imports(path, top_level=True)} & OPTIONAL <= allowed
    assert room(path) == "bitsandbytes" or "bitsandbytes" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", OURS, ids=named)
def test_files_are_small_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
    assert not {"utils", "helpers", "misc", "common"} & set(path.relative_to(ROOT).with_suffix("").parts)
    source = ast.parse(path.read_text())
    assert ast.get_docstring(source) or not source.body


@pytest.mark.parametrize("folder", sorted({path.parent for path in OURS}), ids=named)
def test_a_folder_holds_few_files(folder: Path) -> None:
    assert len([path for path in OURS if path.parent == folder]) <= MOST_FILES, "give some of them a folder"


def merge_markers(path: Path) -> list[int]:
    """The lines of a file that a merge has left."""
    ends, middle = (b"<" * 7 + b" ", b"|" * 7 + b" ", b">" * 7 + b" "), b"=" * 7
    lines = enumerate(path.read_bytes().splitlines(), 1)
    return [number for number, line in lines if line.startswith(ends) or line == middle]


def test_no_tracked_file_holds_merge_markers() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    tracked = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(tracked) > len(SOURCES)
    assert not {named(path): found for path in tracked if (found := merge_markers(path))}


def test_a_merge_marker_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "CHANGELOG.md"
    sides = ["<" * 7 + " ours", "kept", "=" * 7, "theirs", ">" * 7 + " theirs", "=" * 8, "a >>>>>>> b"]
    wrong.write_text("\r\n".join(sides))
    assert merge_markers(wrong) == [1, 3, 5]


def module_graph() -> dict[str, set[str]]:
    """Which modules of the package each of them imports, when it is imported or later."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    return {name: set(imports(path)) & names.keys() - {name} for name, path in names.items()}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = module_graph()
    # A folder's own __init__ only gathers names, so its files may live beside it without importing it.
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph
