"""The package runs with what it depends on, and nothing else that happens to be installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tests.rules.sources import ROOT

PROGRAM = """
import importlib.abc, json, sys

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

hidden, place = json.loads(sys.argv[1]), sys.argv[2]
sys.meta_path.insert(0, Refusing())
from torch_simu import NeuronSelection
selection = NeuronSelection({"layer": [0, 2]}, {"layer": 4})
selection.save(place)
assert NeuronSelection.load(place) == selection
"""


def declared() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def with_what_they_need(requirements: list[str]) -> set[str]:
    """The distributions of the requirements and, over and over, of what these require without an extra."""
    found: set[str] = set()
    waiting = [name_of(each) for each in requirements]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [name_of(each) for each in needed if "extra ==" not in each]
    return found


def hidden_from(requirements: list[str]) -> list[str]:
    """The importable names of all that is installed beside the requirements."""
    kept = {*with_what_they_need(requirements), "torch-simu"}
    owners = metadata.packages_distributions()
    return sorted(name for name, of in owners.items() if not {name_of(each) for each in of} & kept)


def run_with(requirements: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    arguments = [json.dumps(hidden_from(requirements)), str(place / "selection.safetensors")]
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_a_selection_is_saved_and_loaded_with_the_declared_dependencies_alone(tmp_path: Path) -> None:
    done = run_with(declared(), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["torch", "einops", "safetensors", "numpy"])
def test_each_dependency_is_needed(name: str, tmp_path: Path) -> None:
    fewer = [each for each in declared() if name_of(each) != name]
    assert len(fewer) == len(declared()) - 1
    done = run_with(fewer, tmp_path)
    assert done.returncode == 1 and re.search(f"No module named '{name}|Numpy is not available", done.stderr)


def test_every_dependency_is_pinned_for_the_checks() -> None:
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name_of(each) for each in declared()} <= pinned
