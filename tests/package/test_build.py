"""What is built: a source distribution that is a checkout, and a wheel that runs where nothing else is installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.package.environment import copied, new_environment, run_with
from tests.package.test_dependencies import PROJECT
from tests.rules.sources import ROOT, SOURCES

ROUND_TRIPS = """
import copy, pathlib
import torch
import torch_simu
from torch import nn
from torch_simu import Attribution, NeuronPatch, NeuronSelection

assert pathlib.Path(torch_simu.__file__).is_relative_to(sys.prefix), torch_simu.__file__
folder = pathlib.Path(sys.argv[2])
scores = {"2": torch.arange(8, dtype=torch.float64)}
Attribution(scores, {"2": 0.5}, 3, {"steps": 10}).save(folder / "attribution.safetensors")
found = Attribution.load(folder / "attribution.safetensors")
assert torch.equal(found.scores["2"], scores["2"])

found.top(0.25).save(folder / "selection.safetensors")
selection = NeuronSelection.load(folder / "selection.safetensors")
assert selection["2"].tolist() == [6, 7]

base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
model = copy.deepcopy(base)
model[2].weight.data[:, [6, 7]] += 1
NeuronPatch.between(base, model, selection).save(folder / "patch.safetensors")
other = copy.deepcopy(base)
patch = NeuronPatch.load(folder / "patch.safetensors")
patch.apply(other)
assert torch.equal(other[2].weight, model[2].weight)
patch.revert(other)
assert torch.equal(other[2].weight, base[2].weight)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("built")
    call = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(copied(place / "source"))]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def sole(place: Path, pattern: str) -> Path:
    (found,) = place.glob(pattern)
    return found


def wheel_files(built: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(sole(built, "*.whl")) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def wheel_metadata(built: Path) -> Message:
    (content,) = (content for name, content in wheel_files(built).items() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(content)


def test_an_index_would_take_what_is_built(built: Path) -> None:
    archives = [str(sole(built, "*.tar.gz")), str(sole(built, "*.whl"))]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *archives], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_source_distribution_holds_every_file_of_a_checkout(built: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    with tarfile.open(sole(built, "*.tar.gz")) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert {"tests/strategies.py", "docs/index.md"} <= tracked <= held
    assert not [name for name in held if name.endswith(".pyc")]


def test_the_wheel_holds_the_package_its_types_and_its_license(built: Path) -> None:
    files = wheel_files(built)
    package = {str(path.relative_to(ROOT)) for path in SOURCES} | {"torch_simu/py.typed"}
    assert {name for name in files if ".dist-info/" not in name} == package
    assert [content for name, content in files.items() if name.endswith("/LICENSE")] == [
        (ROOT / "LICENSE").read_bytes()
    ]


def test_the_wheel_says_who_made_it_under_which_license_and_what_it_needs(built: Path) -> None:
    said = wheel_metadata(built)
    assert (said["License-Expression"], said["Author"]) == ("MIT", "The torch_simu authors")
    needed = [each for each in said.get_all("Requires-Dist") if "extra ==" not in each]
    assert needed == PROJECT["dependencies"]


def test_the_wheel_alone_imports_without_a_warning_and_saves_and_loads(built: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "environment", str(sole(built, "*.whl")))
    needed = [each for each in wheel_metadata(built).get_all("Requires-Dist") if "extra ==" not in each]
    options = (str(python), "-W", "error", "-I")
    done = run_with(needed, ROUND_TRIPS, str(tmp_path), python=options, place=tmp_path)
    assert done.returncode == 0, done.stderr
