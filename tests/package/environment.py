"""A Python in which only some of the installed distributions can be imported, and one in which the package is new."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import torch

from tests.rules.sources import ROOT

REFUSING = """
import importlib.abc, json, sys

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

hidden = json.loads(sys.argv[1])
sys.meta_path.insert(0, Refusing())
"""


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


def run_with(
    requirements: list[str],
    program: str,
    *arguments: str,
    python: tuple[str, ...] = (sys.executable,),
    place: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run a program that can import the requirements only; its own arguments begin at `sys.argv[2]`."""
    call = [*python, "-c", REFUSING + program, json.dumps(hidden_from(requirements)), *arguments]
    return subprocess.run(call, capture_output=True, text=True, cwd=place)


def copied(place: Path) -> Path:
    """A copy of the project without what git ignores, so that a build leaves nothing in the project itself."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", *ignored))
    return place


def new_environment(place: Path, *install: str) -> Path:
    """The Python of a new environment: it has what pip is told to install, and beside that what this one has."""
    venv.EnvBuilder(symlinks=True).create(place)
    libraries = sysconfig.get_path("purelib", "venv", vars={"base": str(place)})
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", libraries, *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A path that is named so is searched last, and how the package is installed in this Python is not looked at.
    (Path(libraries) / "beside.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return Path(sysconfig.get_path("scripts", "venv", vars={"base": str(place)})) / "python"
