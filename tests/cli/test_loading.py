"""A model is loaded whole or not at all: nothing is drawn at random, nothing is left out in silence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BioGptConfig, BioGptForCausalLM

from tests.cli.test_cli import call, files, options  # noqa: F401 (a fixture)
from tests.models import tiny
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.cli.loading import load_model

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def copied(files, tmp_path):  # noqa: F811
    return shutil.copytree(files / "model", tmp_path / "model")


def rewrite(folder, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def prefixed(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def beside(*names):
    return lambda tensors: {**tensors, **{name: torch.ones(2) for name in names}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(DOWN), rf"lack {DOWN}, expected all of the model's"),
        (without(".layers.1."), r"lack model\.layers\.1\..* and \d+ more"),
        (prefixed("_orig_mod."), r"lack .* saved from a wrapped model; save the model inside \(its `_orig_mod`\)"),
        (prefixed("module."), r"lack .* saved from a wrapped model; save the model inside \(its `module`\)"),
        (beside(DOWN.replace("weight", "delta")), r"beside the model .*down_proj\.delta.*save_deltas"),
        (beside("model.layers.0.self_attn.q_proj.lora_A.default.weight"), r"lora_A.* Merge the adapter"),
        (beside("model.layers.7.mlp.down_proj.weight"), r"beside the model model\.layers\.7.*of one model"),
        (
            lambda tensors: {**tensors, "model.norm.weight": torch.ones(2)},
            r"do not fit .* model\.norm\.weight",
        ),
    ],
)
def test_weights_that_are_not_all_of_the_model_are_refused_by_name(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message):
        load_model(str(copied), device="cpu")


@pytest.mark.parametrize("layers", [1, 3])
def test_a_wrong_number_of_layers_is_refused(copied, layers):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "layer_types": None}))
    with pytest.raises(ValueError, match=r"(lack|beside the model) model\.layers\.\d"):
        load_model(str(copied), device="cpu")


def test_masks_and_tables_of_older_versions_are_no_weights(copied):
    plain, _ = load_model(str(copied), device="cpu")
    rewrite(copied, beside("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.masked_bias"))
    loaded, _ = load_model(str(copied), device="cpu")
    assert plain.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in plain.state_dict().items())


def test_a_refused_checkpoint_ends_every_command_and_leaves_nothing(copied, files, tmp_path, capsys):  # noqa: F811
    rewrite(copied, without(DOWN))
    sets = options(files, "forget", "retain", model=copied)
    assert call("evaluate", *sets) == 2
    assert call("unlearn", *sets, "--out", tmp_path / "out", "--max-steps", 1) == 2
    assert capsys.readouterr().err.count(f"lack {DOWN}") == 2
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_the_folder_is_refused(copied):
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter, expected the weights of a whole model. Merge the adapter"):
        load_model(str(copied), device="cpu")


def test_a_model_saved_with_its_deltas_inside_is_refused(copied):
    model, _ = load_model(str(copied), device="cpu")
    attach_deltas(model, NeuronSelection.random(model, 0.1, torch.Generator().manual_seed(0)))
    model.save_pretrained(copied)
    with pytest.raises(ValueError, match=r"They hold deltas: save those with torch_simu\.deltas\.save_deltas"):
        load_model(str(copied), device="cpu")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234567\n"),
        lambda path: path.unlink(),
        lambda path: (path.parent / "config.json").write_text("{"),
    ],
    ids=["truncated", "empty", "pointer", "missing", "configuration"],
)
def test_damaged_files_end_in_one_line(copied, files, damage, capsys):  # noqa: F811
    damage(copied / "model.safetensors")
    assert call("evaluate", *options(files, "forget", "retain", model=copied)) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_keeps_its_weight_whatever_its_name(copied, tied):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BioGptConfig(vocab_size=512, tie_word_embeddings=tied, **sizes)
    BioGptForCausalLM(config).save_pretrained(copied)
    model, _ = load_model(str(copied), load_in="8bit", device="cpu")
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.biogpt.layers[0].fc2.weight.dtype == torch.int8


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_keeps_its_weight_beside_float_attention(copied, tied):
    tiny("gpt_neox", tie_word_embeddings=tied, vocab_size=512).save_pretrained(copied)
    model, _ = load_model(str(copied), load_in="8bit", device="cpu", float_attention=True)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    block = model.gpt_neox.layers[0]
    assert block.attention.query_key_value.weight.is_floating_point()
    assert block.mlp.dense_4h_to_h.weight.dtype == torch.int8
