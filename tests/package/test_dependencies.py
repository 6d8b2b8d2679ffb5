"""The package runs with what it depends on, and nothing else that happens to be installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.package.environment import name_of, run_with
from tests.rules.sources import ROOT

PROGRAM = """
from torch_simu import NeuronSelection
selection = NeuronSelection({"layer": [0, 2]}, {"layer": 4})
selection.save(sys.argv[2])
assert NeuronSelection.load(sys.argv[2]) == selection
"""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> list[str]:
    return PROJECT["dependencies"]


def test_a_selection_is_saved_and_loaded_with_the_declared_dependencies_alone(tmp_path: Path) -> None:
    done = run_with(declared(), PROGRAM, str(tmp_path / "selection.safetensors"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["torch", "einops", "safetensors", "numpy"])
def test_each_dependency_is_needed(name: str, tmp_path: Path) -> None:
    fewer = [each for each in declared() if name_of(each) != name]
    assert len(fewer) == len(declared()) - 1
    done = run_with(fewer, PROGRAM, str(tmp_path / "selection.safetensors"))
    assert done.returncode == 1 and re.search(f"No module named '{name}|Numpy is not available", done.stderr)


def test_every_dependency_is_pinned_for_the_checks() -> None:
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    # Not triton: builds of torch for CUDA bring along the one they were made with.
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    assert {name_of(each) for each in [*declared(), *extras]} - {"torch-simu", "triton"} <= pinned
