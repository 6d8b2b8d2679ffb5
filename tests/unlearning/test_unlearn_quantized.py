"""A quantized model forgets through deltas; its codes stay, and the deltas go beside them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.cli.test_cli import NOT_REACHED, call, files, options  # noqa: F401 (a fixture)
from tests.quantized import quantized
from tests.unlearning.test_driver import FAST, _memorized, run
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.bitsandbytes.layers import fingerprint
from torch_simu.cli.loading import load_model
from torch_simu.deltas import attached_layers


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_the_command_forgets_through_deltas_and_writes_the_untouched_base(files, tmp_path, kind):  # noqa: F811
    out = tmp_path / "out"
    quick = ["--method", "simu_graddiff", "--lr", 3e-2, "--max-steps", 8, "--batch-size", 6, "--fraction", 0.3]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", out, "--load-in", kind, *quick) == NOT_REACHED
    rows = json.loads((out / "report.json").read_text())["methods"]
    assert rows["simu_graddiff"]["forget"]["probability"] < rows["before"]["forget"]["probability"] - 0.2
    selection = NeuronSelection.load(out / "selection.safetensors")
    base, _ = load_model(str(files / "model"), load_in=kind)
    found, _ = load_model(str(out))
    assert list(attached_layers(found)) == [layer for layer in selection if len(selection[layer])]
    for name, layer in attached_layers(found).items():
        assert torch.equal(layer.idx, selection[name])
        assert fingerprint(layer) == fingerprint(base.get_submodule(name))
    assert call("evaluate", *options(files, "forget", "retain", model=out), "--out", tmp_path / "measured.json") == 0
    measured = json.loads((tmp_path / "measured.json").read_text())["methods"]["model"]
    wanted = rows["simu_graddiff"]["forget"]["probability"]
    assert measured["forget"]["probability"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_second_request_forgets_more_and_keeps_what_the_first_one_changed(files, tmp_path, kind, capsys):  # noqa: F811
    first, second = tmp_path / "first", tmp_path / "second"
    quick = ["--method", "simu_graddiff", "--lr", 3e-2, "--max-steps", 4, "--batch-size", 6, "--forget-target", 0.0]
    sets = options(files, "forget", "retain")
    call("unlearn", *sets, "--out", first, "--load-in", kind, "--fraction", 0.1, *quick)
    said = " ".join(capsys.readouterr().out.split())
    assert "untouched quantized base, which still knows the forget set" in said and "--save-as float" in said
    assert "still knows the forget set" in (first / "report.md").read_text()
    swapped = options(files, "forget", "retain", model=first, forget=files / "world.jsonl")
    call("unlearn", *swapped, "--out", second, "--fraction", 0.2, *quick)
    before, after = (attached_layers(load_model(str(folder))[0]) for folder in (first, second))
    asked = NeuronSelection.load(second / "selection.safetensors")
    for name, layer in after.items():
        union = set(before[name].idx.tolist()) | set(asked[name].tolist())
        assert layer.idx.tolist() == sorted(union)
        held = [neuron for neuron in before[name].idx.tolist() if neuron not in set(asked[name].tolist())]
        old = before[name].delta[:, torch.isin(before[name].idx, torch.tensor(held))]
        assert torch.equal(layer.delta[:, torch.isin(layer.idx, torch.tensor(held))], old)
        assert fingerprint(layer) == fingerprint(before[name])


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_float_folder_forgets_in_any_loader(files, tmp_path, kind, capsys):  # noqa: F811
    out = tmp_path / "out"
    quick = [
        "--method",
        "simu_graddiff",
        "--lr",
        3e-2,
        "--max-steps",
        8,
        "--batch-size",
        6,
        "--fraction",
        0.3,
        "--save-as",
        "float",
    ]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", out, "--load-in", kind, *quick) == NOT_REACHED
    assert "still knows" not in " ".join(capsys.readouterr().out.split())
    assert not (out / "deltas.safetensors").exists()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert all(type(layer) is nn.Linear for layer in plain.modules() if isinstance(layer, nn.Linear))
    rows = json.loads((out / "report.json").read_text())["methods"]
    wanted = rows["simu_graddiff"]["forget"]["probability"]
    assert wanted < rows["before"]["forget"]["probability"] - 0.2
    assert call("evaluate", *options(files, "forget", "retain", model=out), "--out", tmp_path / "measured.json") == 0
    measured = json.loads((tmp_path / "measured.json").read_text())["methods"]["model"]
    assert measured["forget"]["probability"] == pytest.approx(wanted, abs=1e-6)


def test_attention_trains_whole_where_it_keeps_its_weights(files, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    quick = [
        "--method",
        "simu_graddiff",
        "--lr",
        1e-2,
        "--max-steps",
        2,
        "--batch-size",
        6,
        "--attention",
        "full",
        "--load-in",
        "8bit",
    ]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", out, *quick) == NOT_REACHED
    base, changed = (load_model(str(folder), load_in=None)[0] for folder in (files / "model", out))
    name = "model.layers.0.self_attn.q_proj"
    assert changed.get_submodule(name).weight.is_floating_point()
    assert not torch.equal(base.get_submodule(name).weight, changed.get_submodule(name).weight)
    assert changed.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.int8


@pytest.mark.parametrize("request_number", [1, 2])
def test_a_broken_quantized_run_continues_bit_for_bit(tmp_path, request_number):
    float_model, examples = _memorized()
    base = quantized(float_model, "8bit")
    if request_number == 2:
        earlier = NeuronSelection.random(base, 0.05, torch.Generator().manual_seed(0))
        for delta in attach_deltas(base, earlier).values():
            delta.data.fill_(1e-3)
    whole, broken = copy.deepcopy(base), copy.deepcopy(base)
    expected = run(whole, examples)

    def stop(stage, done, total, note=""):
        if stage == "unlearn" and done == 3:
            raise KeyboardInterrupt

    config = FAST.updated(checkpoint_interval=2)
    with pytest.raises(KeyboardInterrupt):
        run(broken, examples, config, checkpoint=tmp_path / "run", progress=stop)
    resumed = copy.deepcopy(base)
    run(resumed, examples, config, checkpoint=tmp_path / "run")
    for name, layer in attached_layers(whole).items():
        assert layer.delta.any()
        assert torch.equal(layer.delta, attached_layers(resumed)[name].delta)
        assert fingerprint(layer) == fingerprint(base.get_submodule(name))
    assert expected.optimizer_bytes > 0


def test_methods_that_train_codes_are_refused(files, tmp_path, capsys):  # noqa: F811
    common = [*options(files, "forget", "retain"), "--out", tmp_path / "out"]
    assert call("unlearn", *common, "--load-in", "8bit", "--method", "fo_graddiff") == 2
    assert "Method 'fo_graddiff' trains whole weights, and load_in is '8bit'" in capsys.readouterr().err
    assert call("unlearn", *common, "--load-in", "3bit") == 2
    assert "load_in is '3bit', expected one of '8bit', '4bit'" in capsys.readouterr().err
    assert call("unlearn", *common, "--save-as", "flot") == 2
    assert "save_as is 'flot', expected one of 'loaded', 'float'. Did you mean 'float'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
