"""`make test` checks all, with the coverage that is asked of all; of some of the tests it asks none."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib

import pytest

from tests.rules.sources import ROOT


def would_run(*words: str) -> str:
    """The commands of `make test`."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    call = ["make", "--dry-run", "--no-print-directory", "PYTHON=python3", "test", *words]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize("words", [(), ("PYTEST_ARGS=-n 2",), ("PYTEST_ARGS=-x -q --durations=3",)])
def test_a_whole_run_asks_for_coverage_and_everything_else(words: tuple[str, ...]) -> None:
    found = would_run(*words)
    assert all(tool in found for tool in ("ruff format --check", "ruff check", "mypy", "--cov", "mkdocs build"))


@pytest.mark.parametrize(
    "asked",
    ["tests/ground", "-q tests/ground/test_checks.py::test_a", "-k hooks", "-m gpu", "--lf", "torch_simu/update.py"],
)
def test_a_run_of_some_tests_does_not(asked: str) -> None:
    found = would_run(f"PYTEST_ARGS={asked}")
    assert f"pytest {asked}" in found
    assert "--cov" not in found and "mkdocs" not in found


def test_the_floors_that_are_tested_are_those_that_are_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (everything,) = re.findall(r"torch-simu\[(.+)\]", extras["all"][0])
    promised = [*project["dependencies"], *(each for extra in everything.split(",") for each in extras[extra])]
    pinned = [line for line in (ROOT / "floors.txt").read_text().splitlines() if not line.startswith("#")]
    assert sorted(pinned) == sorted(each.replace(">=", "==").partition(",")[0] for each in promised)
