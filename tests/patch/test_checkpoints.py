"""A checkpoint on disk is patched without loading the model, and a folder appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.patch.test_checkpoint_layouts import files, layouts
from tests.patch.test_patch import pair, raw
from torch_simu import NeuronSelection
from torch_simu.patch import apply_to_checkpoint, patch_between_checkpoints, revert_checkpoint, verify_checkpoint
from torch_simu.patch import change as change_module


@pytest.fixture
def folders(tmp_path: Path):
    """Checkpoints of a base and a changed model, in several shards, and the selection."""
    base, model, selection = pair("llama", torch.bfloat16, 0, attention=True)
    for name, each in (("base", base), ("model", model)):
        each.save_pretrained(tmp_path / name, max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return tmp_path, selection


def content(folder: Path) -> dict[str, bytes]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {name: value.view(torch.uint8).numpy().tobytes() for name, value in load_file(path).items()}
    return tensors


def test_a_checkpoint_on_disk_is_patched_without_loading_the_model(folders) -> None:
    root, selection = folders
    with pytest.raises(ValueError, match=r"self_attn.* differs and has no selected neuron"):
        patch_between_checkpoints(root / "base", root / "model", selection)
    patch = patch_between_checkpoints(root / "base", root / "model", selection, whole="self_attn", provenance={"a": 1})
    before = content(root / "base")
    apply_to_checkpoint(patch, root / "base", root / "patched")
    assert content(root / "patched") == content(root / "model")
    assert sorted(path.name for path in (root / "patched").iterdir()) == sorted(
        path.name for path in (root / "base").iterdir()
    )
    assert verify_checkpoint(patch, root / "base", root / "patched")
    assert not verify_checkpoint(patch, root / "base", root / "base")
    revert_checkpoint(patch, root / "patched", root / "again")
    assert content(root / "again") == before == content(root / "base")
    # The same patch goes on the loaded model.
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    patch.apply(model)
    changed = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.bfloat16)
    assert raw(model) == raw(changed)


def test_a_refused_or_interrupted_apply_leaves_no_folder(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    root, selection = folders
    patch = patch_between_checkpoints(root / "base", root / "model", selection, whole="self_attn")
    before = content(root / "base")
    with pytest.raises(ValueError, match="is applied already to tensor"):
        apply_to_checkpoint(patch, root / "model", root / "out")
    with pytest.raises(FileExistsError, match="exists, expected a new folder"):
        apply_to_checkpoint(patch, root / "base", root / "model")
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        apply_to_checkpoint(patch, root, root / "out")

    def stop(self: change_module.Change, tensor: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(change_module.Change, "flip", stop)
        with pytest.raises(KeyboardInterrupt):
            apply_to_checkpoint(patch, root / "base", root / "out")
    assert not (root / "out").exists() and not list(root.glob(".out*"))
    shard = min((root / "base").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="is unreadable .*truncated"):
        apply_to_checkpoint(patch, root / "base", root / "out")
    shard.write_bytes(whole)
    assert content(root / "base") == before and not (root / "out").exists()


def test_layers_that_a_checkpoint_lacks_or_has_in_another_size_are_refused(tmp_path: Path) -> None:
    for name in ("base", "model"):
        (tmp_path / name).mkdir()
        save_file({"mlp.weight": torch.ones(4, 6)}, tmp_path / name / "model.safetensors")
    with pytest.raises(KeyError, match=r"Layer 'up' is not in"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", NeuronSelection({"up": [0]}, {"up": 6}))
    with pytest.raises(ValueError, match=r"Tensor 'mlp.weight' of shape \(4, 6\) has no dimension of 5 neurons"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", NeuronSelection({"mlp": [0]}, {"mlp": 5}))
    with pytest.raises(ValueError, match="No bit differs between base and model"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", NeuronSelection({"mlp": [0]}, {"mlp": 6}))


def index(folder: Path, places: object) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"weight_map": {"a": "pytorch_model.bin"}}, "names 'pytorch_model.bin', expected safetensors files.*run code"),
        ({"weight_map": {"a": "../base/weights.safetensors"}}, "expected files in the folder"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "expected files in the folder"),
        ({"weight_map": {"a": 3}}, "names 3, expected safetensors files"),
        ({"weight_map": {"a": "weights.safetensors"}}, "Tensor 'a' is not in 'weights.safetensors'"),
        ({"weight_map": {"a": "none.safetensors"}}, "names 'none.safetensors', which does not exist"),
        ({"weight_map": {}}, "names no file"),
        ({"weight_map": {"a": ["x"]}}, "is unreadable"),
        ({"weight_map": []}, "is unreadable"),
        ({}, "is unreadable"),
        ([], "is unreadable"),
    ],
)
def test_an_index_that_names_anything_but_safetensors_in_the_folder_is_refused(
    tmp_path: Path, places: object, message: str
) -> None:
    _, _, selection = layouts(tmp_path, "llama", lambda folder: index(folder, places))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


def header(entry: object) -> bytes:
    text = json.dumps({"a": entry} if not isinstance(entry, list) else entry).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\xff" * 9,
        b"\x08" + bytes(7) + b"{}  ",
        header([]),
        header([1]),
        header(3),
        header({}),
        header({"dtype": "F32", "shape": [4], "data_offsets": [0]}),
        header({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}),
        header({"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}),
        header({"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}),
        header({"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}),
        header({"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}),
        header({"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}),
        header({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}),
    ],
)
def test_a_damaged_weight_file_is_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    _, _, selection = layouts(tmp_path, "llama", damage)
    with pytest.raises(ValueError, match=r"File '.*base/model.safetensors' is unreadable \("):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


@pytest.fixture
def made(tmp_path: Path):
    _, _, selection = layouts(tmp_path, "llama", lambda folder: None)
    return tmp_path, patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


@pytest.mark.parametrize("out", ["base/out", "base/a/b/out", "base/../base/out", "link/out"])
def test_a_folder_inside_of_the_base_is_refused_before_anything_is_written(made, out: str) -> None:
    root, patch = made
    (root / "link").symlink_to(root / "base")
    before = files(root)
    with pytest.raises(ValueError, match="is inside of .*, expected a folder beside it"):
        apply_to_checkpoint(patch, root / "base", root / out)
    assert files(root) == before and not list(root.glob(".*"))


@pytest.mark.parametrize("out", ["base", "base/.", ".", "base/config.json", "nowhere"])
def test_what_exists_is_refused_before_anything_is_written(made, out: str) -> None:
    root, patch = made
    (root / "nowhere").symlink_to(root / "none")
    before = files(root)
    with pytest.raises(FileExistsError, match="exists, expected a new folder"):
        apply_to_checkpoint(patch, root / "base", root / out)
    assert files(root) == before


def test_a_folder_in_a_file_and_a_bad_pattern_are_refused(made) -> None:
    root, patch = made
    with pytest.raises(NotADirectoryError, match="is no folder, expected a folder to write in"):
        apply_to_checkpoint(patch, root / "base", root / "model" / "config.json" / "out")
    with pytest.raises(ValueError, match=r"whole is '\[' .*expected a regular expression"):
        patch_between_checkpoints(root / "base", root / "model", NeuronSelection({}, {}), whole="[")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_copy_of_a_read_only_base_is_as_writable_as_any_other_folder(made) -> None:
    root, patch = made
    (root / "base" / "more").mkdir()
    (root / "base" / "more" / "notes.txt").write_text("x")
    for path in (*(root / "base").rglob("*"), root / "base"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        apply_to_checkpoint(patch, root / "base", root / "patched")
    finally:
        for path in (root / "base", root / "base" / "more"):
            path.chmod(0o755)
    assert verify_checkpoint(patch, root / "base", root / "patched")
    assert all(path.stat().st_mode & stat.S_IWUSR for path in (root / "patched", *(root / "patched").rglob("*")))
    assert not list(root.glob(".patched*"))


@pytest.mark.parametrize("name", ["write", "check_writable"])
def test_a_full_disk_leaves_nothing_behind(made, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root, patch = made

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"torch_simu.patch.reading.Checkpoint.{name}", full)
    before = files(root)
    with pytest.raises(OSError, match="No space left on device"):
        apply_to_checkpoint(patch, root / "base", root / "out")
    assert files(root) == before and sorted(path.name for path in root.iterdir()) == ["base", "model"]


def test_what_is_no_folder_is_named(made) -> None:
    root, patch = made
    with pytest.raises(FileNotFoundError, match="Folder 'someone/something' does not exist, expected the folder of a"):
        apply_to_checkpoint(patch, "someone/something", root / "out")
    with pytest.raises(FileNotFoundError, match="config.json' is a file, expected the folder of a checkpoint"):
        verify_checkpoint(patch, root / "base", root / "model" / "config.json")
    (root / "base" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' is unreadable .*, expected a configuration as JSON"):
        verify_checkpoint(patch, root / "base", root / "model")
    (root / "base" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json' holds a list, expected a configuration as JSON"):
        verify_checkpoint(patch, root / "base", root / "model")


def test_a_configuration_that_transformers_does_not_know_leaves_the_names_as_stored(made) -> None:
    root, patch = made
    for name in ("base", "model"):
        config = root / name / "config.json"
        config.write_text(config.read_text().replace('"llama"', '"of_its_own"'))
    assert verify_checkpoint(patch, root / "base", root / "model")
    apply_to_checkpoint(patch, root / "base", root / "patched")
    assert content(root / "patched") == content(root / "model")
