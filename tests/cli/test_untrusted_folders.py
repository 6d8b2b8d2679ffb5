"""A model folder that others made runs no code, asks nothing, and is read as safetensors or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cli.test_cli import call, files, options  # noqa: F401 (a fixture)
from torch_simu.cli import loading
from torch_simu.cli.loading import load_model

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
(Path(MARK)).touch()
from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel
"""


@pytest.fixture
def copied(files, tmp_path):  # noqa: F811
    return Path(shutil.copytree(files / "model", tmp_path / "model"))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there to answer, and a pickle must not be opened."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked, or opened a pickle")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_code(folder: Path, mark: Path, model_type: str | None) -> None:
    (folder / "own.py").write_text(CODE.replace("MARK", repr(str(mark))))
    places = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.X", None]}
    edit(folder / "config.json", auto_map=places, **({"model_type": model_type} if model_type else {}))
    edit(folder / "tokenizer_config.json", auto_map=places)


@pytest.mark.usefixtures("silent")
def test_code_in_a_folder_of_a_known_model_is_left_alone(copied: Path, tmp_path: Path) -> None:
    with_code(copied, tmp_path / "ran", None)
    load_model(str(copied))
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("arguments", [{}, {"load_in": "8bit", "float_attention": True}])
def test_a_folder_that_needs_its_own_code_is_refused_without_a_question(
    copied: Path, tmp_path: Path, arguments
) -> None:
    with_code(copied, tmp_path / "ran", "of_its_own")
    with pytest.raises(ValueError, match="trust_remote_code|cannot be loaded|no tokenizer can be loaded"):
        load_model(str(copied), **arguments)
    assert not (tmp_path / "ran").exists()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def indexed(folder: Path) -> None:
    pickled(folder)
    places = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


def configured(folder: Path) -> None:
    pickled(folder)
    edit(folder / "config.json", transformers_weights="pytorch_model.bin")


def elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    places = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled, "has no safetensors file of a model"),
        (indexed, "names 'pytorch_model.bin', expected safetensors files. Other formats may run code"),
        (configured, "names 'pytorch_model.bin', expected safetensors files"),
        (elsewhere, "names '../other.safetensors', expected files in the folder"),
    ],
)
@pytest.mark.usefixtures("silent")
def test_anything_but_safetensors_in_the_folder_is_refused_before_it_is_opened(
    copied: Path, change, message: str
) -> None:
    change(copied)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(str(copied))


@pytest.mark.usefixtures("silent")
def test_the_index_of_a_name_on_the_hub_is_checked_before_its_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    monkeypatch.setattr(loading, "cached_file", lambda *_, **__: str(index))
    with pytest.raises(ValueError, match="names 'pytorch_model.bin', expected safetensors files"):
        load_model("someone/something")
