"""A patch of checkpoints goes by what the model reads, whatever the files are called and however they are laid out."""

from __future__ import annotations

import copy
import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models import tiny
from tests.patch.test_patch import pair, raw
from torch_simu import NeuronPatch
from torch_simu.patch import apply_to_checkpoint, patch_between_checkpoints, revert_checkpoint, verify_checkpoint

Tensors = dict[str, torch.Tensor]


def rewrite(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Rewrite the plain weight file of a folder."""

    def rewritten(folder: Path) -> None:
        tensors = change(load_file(folder / "model.safetensors"))
        tensors = {name: value.clone() for name, value in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rewritten


def unaligned(folder: Path) -> None:
    """Shift all tensors by one byte, as files of other writers are."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


def beside(name: str) -> Callable[[Path], None]:
    """Put a file beside the weights that is none of them."""
    return lambda folder: save_file({"model.embed_tokens.weight": torch.ones(2)}, folder / name)


def fused(tensors: Tensors) -> Tensors:
    """Put experts that are saved one by one into one tensor, as the model has them."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        count = len([name for name in tensors if name.startswith(prefix) and name.endswith("w2.weight")])
        w1, w2, w3 = ([tensors[f"{prefix}.{each}.w{key}.weight"] for each in range(count)] for key in (1, 2, 3))
        gate_up = [torch.cat(both) for both in zip(w1, w3, strict=True)]
        found[f"{prefix}.gate_up_proj"], found[f"{prefix}.down_proj"] = torch.stack(gate_up), torch.stack(w2)
    return found


def with_masks(tensors: Tensors) -> Tensors:
    blocks = {name.partition(".attn.")[0] for name in tensors if ".attn." in name}
    masks = {f"{block}.attn.bias": torch.ones(1, 1, 8, 8) for block in blocks}
    return tensors | masks | {f"{block}.attn.masked_bias": torch.tensor(-1e4) for block in blocks}


LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "as save_pretrained": ("llama", lambda folder: None),
    "names without the model's prefix": (
        "gpt2",
        rewrite(lambda found: {name.removeprefix("transformer."): value for name, value in found.items()}),
    ),
    "stored masks": ("gpt2", rewrite(with_masks)),
    "names without the prefix, and masks": (
        "gpt2",
        rewrite(lambda found: with_masks({name.removeprefix("transformer."): value for name, value in found.items()})),
    ),
    "stored frequencies": (
        "llama",
        rewrite(lambda found: found | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ),
    "a tied head stored twice": (
        "gpt2",
        rewrite(lambda found: found | {"lm_head.weight": found["transformer.wte.weight"]}),
    ),
    "a tied head stored under the other name": (
        "gpt2",
        rewrite(
            lambda found: {
                name.replace("transformer.wte.weight", "lm_head.weight"): value for name, value in found.items()
            }
        ),
    ),
    "experts saved one by one": ("mixtral", lambda folder: None),
    "experts saved fused": ("mixtral", rewrite(fused)),
    "a consolidated copy beside": ("llama", beside("consolidated.safetensors")),
    "a stray shard beside": ("llama", beside("model-00009-of-00009.safetensors")),
    "a file of ours beside": ("llama", beside("selection.safetensors")),
    "tensors that start anywhere": ("llama", unaligned),
}


def layouts(tmp_path: Path, kind: str, mangle: Callable[[Path], None], dtype: torch.dtype = torch.bfloat16):
    base, model, selection = pair(kind, dtype, 0)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    mangle(tmp_path / "base")
    return base, model, selection


def loaded(folder: Path) -> dict[str, bytes]:
    """The oracle: what transformers makes of the folder."""
    from transformers import AutoModelForCausalLM

    return raw(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_base_is_patched_verified_and_given_back(tmp_path: Path, layout: str) -> None:
    kind, mangle = LAYOUTS[layout]
    base, model, selection = layouts(tmp_path, kind, mangle)
    patch = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)
    assert patch.changes.keys() == NeuronPatch.between(base, model, selection).changes.keys()
    before = files(tmp_path / "base")
    assert verify_checkpoint(patch, tmp_path / "base", tmp_path / "model")
    assert not verify_checkpoint(patch, tmp_path / "base", tmp_path / "base")
    apply_to_checkpoint(patch, tmp_path / "base", tmp_path / "patched")
    assert loaded(tmp_path / "patched") == raw(model)
    assert verify_checkpoint(patch, tmp_path / "base", tmp_path / "patched")
    revert_checkpoint(patch, tmp_path / "patched", tmp_path / "again")
    assert files(tmp_path / "again") == before == files(tmp_path / "base")
    # The same patch goes on the loaded model.
    patch.apply(base)
    assert raw(base) == raw(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_change_outside_the_selection_is_found_in_any_layout(tmp_path: Path, layout: str) -> None:
    kind, mangle = LAYOUTS[layout]
    _, model, selection = layouts(tmp_path, kind, mangle)
    patch = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 0] += 1
    model.save_pretrained(tmp_path / "model")
    assert not verify_checkpoint(patch, tmp_path / "base", tmp_path / "model")
    with pytest.raises(ValueError, match=r"Tensor '.*' differs and has no selected neuron"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tied_head_that_is_stored_twice_is_changed_twice(tmp_path: Path) -> None:
    _, model, selection = layouts(tmp_path, *LAYOUTS["a tied head stored twice"])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    patch = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection, whole="wte")
    apply_to_checkpoint(patch, tmp_path / "base", tmp_path / "patched")
    found = load_file(tmp_path / "patched" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    assert loaded(tmp_path / "patched") == raw(model)


def test_tied_tensors_that_differ_on_disk_are_two(tmp_path: Path) -> None:
    layouts(tmp_path, "gpt2", rewrite(lambda found: found | {"lm_head.weight": found["transformer.wte.weight"] + 1}))
    _, _, selection = pair("gpt2", torch.bfloat16, 0)
    with pytest.raises(ValueError, match=r"Tensor 'lm_head.weight' is in the base only.*save_pretrained"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


def test_square_weights_are_told_by_the_model_and_not_by_their_shape(tmp_path: Path) -> None:
    base = tiny("gpt2", n_inner=32)
    model = copy.deepcopy(base)
    layer = "transformer.h.0.mlp.c_proj"
    with torch.no_grad():
        # A Conv1D has its neurons in its rows.
        model.get_submodule(layer).weight[5] += 1
    from torch_simu import NeuronSelection

    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    patch = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", NeuronSelection({layer: [5]}, {layer: 32}))
    assert patch.changes[f"{layer}.weight"].dim == 0


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


def test_a_checkpoint_of_codes_beside_one_of_weights_is_refused_with_what_works(tmp_path: Path) -> None:
    def quantize(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_8bit": True}}))

    _, _, selection = layouts(tmp_path, "llama", quantize)
    with pytest.raises(ValueError, match="holds codes, and the other weights.*call NeuronPatch.between"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


def test_an_incomplete_set_of_experts_is_named(tmp_path: Path) -> None:
    def lose(found: Tensors) -> Tensors:
        return {name: value for name, value in found.items() if not name.endswith("experts.1.w3.weight")}

    _, _, selection = layouts(tmp_path, "mixtral", rewrite(lose))
    with pytest.raises(ValueError, match="cannot be made of .*Get the checkpoint again"):
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
    from torch_simu import NeuronSelection

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


def test_a_model_without_data_is_refused_by_name() -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    with pytest.raises(ValueError, match="Tensor 'model.embed_tokens.weight' is on the meta device.*without offload"):
        NeuronPatch.between(base, model.to("meta"), selection)
    with pytest.raises(ValueError, match="is on the meta device"):
        NeuronPatch.between(base.to("meta"), base, selection)


def test_a_weight_that_is_computed_is_refused_by_name() -> None:
    base, model, selection = pair("llama", torch.float32, 0)
    for each in (base, model):
        for layer in selection:
            nn.utils.parametrizations.weight_norm(each.get_submodule(layer))
    with pytest.raises(ValueError, match="is computed from other parameters"):
        NeuronPatch.between(base, model, selection)
