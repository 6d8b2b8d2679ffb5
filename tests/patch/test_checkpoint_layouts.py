"""A patch of checkpoints goes by what the model reads, whatever the files are called and however they are laid out."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import NAMES, tiny
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
        # The model's own name of the place, which every version of transformers 5 knows.
        place = f"model.layers.{layer}.mlp.experts"
        found[f"{place}.gate_up_proj"], found[f"{place}.down_proj"] = torch.stack(gate_up), torch.stack(w2)
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


def test_a_checkpoint_of_codes_beside_one_of_weights_is_refused_with_what_works(tmp_path: Path) -> None:
    def quantize(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_8bit": True}}))

    _, _, selection = layouts(tmp_path, "llama", quantize)
    with pytest.raises(ValueError, match="base' holds codes, and .*model' weights, .*copy .*base', and remove deltas"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


def test_an_incomplete_set_of_experts_is_named(tmp_path: Path) -> None:
    def lose(found: Tensors) -> Tensors:
        return {name: value for name, value in found.items() if not name.endswith("experts.1.w3.weight")}

    _, _, selection = layouts(tmp_path, "mixtral", rewrite(lose))
    with pytest.raises(ValueError, match="cannot be made of .*Get the checkpoint again"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


@pytest.mark.parametrize("name", NAMES)
def test_what_save_pretrained_writes_of_any_architecture_is_patched(tmp_path: Path, name: str) -> None:
    base, model, selection = pair(name, torch.float32, 0)
    # In several shards, and in one.
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    model.save_pretrained(tmp_path / "model")
    patch = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)
    assert patch.changes.keys() == NeuronPatch.between(base, model, selection).changes.keys()
    apply_to_checkpoint(patch, tmp_path / "base", tmp_path / "patched")
    assert verify_checkpoint(patch, tmp_path / "base", tmp_path / "patched").counts.keys() == {"unchanged", "columns"}
    revert_checkpoint(patch, tmp_path / "patched", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "base")


def test_the_advice_for_a_base_in_another_dtype_works(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, _, selection = pair("llama", torch.float32, 0)
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "saved once")
    with torch.no_grad():
        for layer, neurons in selection.items():
            loaded.get_submodule(layer).weight[:, neurons] += 1
    loaded.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="torch.bfloat16, expected .*float32.*save it once with save_pretrained"):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)
    patch = patch_between_checkpoints(tmp_path / "saved once", tmp_path / "model", selection)
    assert len(patch.changes) == 2


def test_a_tensor_that_cannot_be_told_apart_again_is_refused_and_goes_on_the_loaded_model(tmp_path: Path) -> None:
    base, model, selection = layouts(tmp_path, "mixtral", lambda folder: None)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.mul_(2)
    model.save_pretrained(tmp_path / "model")
    patch = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection, whole="gate_up_proj")
    assert verify_checkpoint(patch, tmp_path / "base", tmp_path / "model")
    with pytest.raises(ValueError, match="gate_up_proj' is stored in another form .*Load the model, call patch.apply"):
        apply_to_checkpoint(patch, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    patch.apply(base)
    assert raw(base) == raw(model)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    twice = rewrite(lambda found: found | {"wte.weight": found["transformer.wte.weight"]})
    _, _, selection = layouts(tmp_path, "gpt2", twice)
    with pytest.raises(ValueError, match="Tensor 'transformer.wte.weight' is stored twice, once as "):
        patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)


def test_a_change_that_leads_elsewhere_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    base, _, selection = layouts(tmp_path, "llama", lambda folder: None)
    patch = patch_between_checkpoints(tmp_path / "base", tmp_path / "model", selection)
    list(patch.changes.values())[-1].value.add_(1)
    before = raw(base)
    with pytest.raises(ValueError, match="The change of tensor .* leads elsewhere, expected what its sha256 says"):
        apply_to_checkpoint(patch, tmp_path / "base", tmp_path / "out")
    with pytest.raises(ValueError, match="The change of tensor .* leads elsewhere"):
        patch.apply(base)
    assert raw(base) == before and not (tmp_path / "out").exists()
