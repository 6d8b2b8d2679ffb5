"""A quantized model forgets through deltas of units: columns and the rows that make them, beside codes that stay."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tests.cli.test_cli import NOT_REACHED, call, files, options  # noqa: F401
from tests.quantized import quantized
from tests.unlearning.test_driver import FAST, memorized, run, weights  # noqa: F401
from tests.unlearning.trainer.test_driver_and_trainer import SIMU
from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, make_model, make_selection
from tests.unlearning.trainer.whitened_runs import make_whitened_trainer, num_hooks
from tests.unlearning.units.test_units import assert_only_units_changed
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.bitsandbytes.layers import fingerprint, holds_codes
from torch_simu.cli.loading import load_model
from torch_simu.deltas import attached_layers, decode_model
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.pilot.pilot import recommend
from torch_simu.unlearning.pilot.words import one_batch_size

KINDS = pytest.mark.parametrize("kind", ["8bit", "4bit"])


def fingerprints(model):
    return {name: fingerprint(layer) for name, layer in model.named_modules() if holds_codes(layer)}


def decoded(model):
    """A copy of float weights."""
    found = copy.deepcopy(model)
    decode_model(found)
    return found


@KINDS
@pytest.mark.parametrize("changes", [{}, {"method": "simu"}, {"method": "simu", "curvature": "neurons"}])
def test_columns_and_rows_of_the_chosen_neurons_change_and_no_code(memorized, kind, changes):  # noqa: F811
    model = quantized(memorized[0], kind)
    codes, before = fingerprints(model), weights(decoded(model))
    selection = NeuronSelection.random(model, 0.3, torch.Generator().manual_seed(0))
    config = FAST.updated(units=True, max_steps=3, **changes)
    done = run(model, memorized[1], config, selection=selection)
    assert fingerprints(model) == codes and num_hooks(model) == 0
    after = decoded(model)
    assert_only_units_changed(after, before, selection)
    deltas = [layer.delta for layer in attached_layers(model).values()]
    assert len(deltas) == 3 * len(selection)
    differing = sum(int(delta.count_nonzero()) for delta in deltas)
    assert done.changed_share == differing / sum(param.numel() for param in model.parameters())
    assert done.optimizer_bytes > 0


@KINDS
def test_a_broken_run_with_an_adversary_goes_on_bit_for_bit(memorized, kind, tmp_path):  # noqa: F811
    base = quantized(memorized[0], kind)
    config = FAST.updated(method="simu", units=True, adversary_lr=1e-3, max_steps=4, checkpoint_interval=1)
    whole, first, second = (copy.deepcopy(base) for _ in range(3))
    run(whole, memorized[1], config)
    run(first, memorized[1], config.updated(max_steps=2), checkpoint=tmp_path / "run")
    run(second, memorized[1], config, checkpoint=tmp_path / "run")
    for name, layer in attached_layers(whole).items():
        assert layer.delta.any() and torch.equal(layer.delta, attached_layers(second)[name].delta)
        assert not torch.equal(layer.delta, attached_layers(first)[name].delta)


def test_the_driver_and_the_trainer_make_the_same_steps(tmp_path, monkeypatch):
    driven, trained = (quantized(make_model(), "8bit") for _ in range(2))
    unlearn(driven, FORGET, RETAIN, config=SIMU.updated(curvature="both", units=True), selection=make_selection(driven))
    attach_deltas(trained, make_selection(trained), units=True)
    # In train mode bitsandbytes rounds no activations on a CPU, and the driver never sets it.
    monkeypatch.setattr(trained, "train", lambda mode=True: nn.Module.train(trained, False))
    choices = {"state_dtype": torch.float32, "units": True}
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_whitened_trainer(trained, tmp_path, "both", options=choices, **arguments).train()
    for name, layer in attached_layers(trained).items():
        assert layer.delta.any()
        # In 8 bits a sum over two halves of a batch is rounded otherwise.
        torch.testing.assert_close(attached_layers(driven)[name].delta, layer.delta, rtol=1e-3, atol=1e-5)


@KINDS
@pytest.mark.parametrize("earlier", [False, True])
def test_the_pilot_takes_deltas_off_again(memorized, kind, earlier):  # noqa: F811
    model, examples = quantized(memorized[0], kind), memorized[1]
    if earlier:
        layer = "model.layers.0.mlp.down_proj"
        for delta in attach_deltas(model, NeuronSelection({layer: [1, 5]}, {layer: 64}), units=True).values():
            delta.data.fill_(0.01)
    held = {name: (layer.delta, layer.delta.detach().clone()) for name, layer in attached_layers(model).items()}
    before = weights(decoded(model))
    config = one_batch_size(UnlearnConfig(units=True, max_steps=2, forget_target=0.5), 6)
    recommend(model, examples["forget"], examples["retain"], minutes=1e-4, config=config)
    assert held.keys() == attached_layers(model).keys()
    assert all(layer.delta is held[name][0] for name, layer in attached_layers(model).items())
    assert all(torch.equal(*pair) for pair in held.values())
    assert all(torch.equal(value, before[name]) for name, value in weights(decoded(model)).items())


def test_the_command_writes_the_untouched_base_and_counts_rows(files, tmp_path, capsys):  # noqa: F811
    out, kind = tmp_path / "out", "8bit"
    quick = ["--max-steps", 3, "--batch-size", 6, "--units", "--method", "random_neurons", "--fraction", 0.25]
    sets = options(files, "forget", "retain")
    assert call("unlearn", *sets, "--out", out, "--load-in", kind, *quick) == NOT_REACHED
    report = json.loads((out / "report.json").read_text())
    changed, selection = report["summary"]["changed"], NeuronSelection.load(out / "selection.safetensors")
    made = {layer.replace("down_proj", part): layer for layer in selection for part in ("gate_proj", "up_proj")}
    assert changed["rows"] == {name: {"trained": 16, "of": 64} for name in made}
    assert set(changed["changed"]) == {f"{name}.delta" for name in [*selection, *made]}
    assert all(changed["changed"][f"{name}.delta"]["rows"] == 16 for name in made)
    assert "16 of 64 rows" in (out / "report.html").read_text()
    base, found = (load_model(str(folder), load_in=how)[0] for folder, how in ((files / "model", kind), (out, None)))
    assert {name: layer.rows for name, layer in attached_layers(found).items()} == {
        **dict.fromkeys(selection, False),
        **dict.fromkeys(made, True),
    }
    assert fingerprints(found) == fingerprints(base)
    assert call("evaluate", *options(files, "forget", "retain", model=out), "--out", tmp_path / "measured.json") == 0
    measured = json.loads((tmp_path / "measured.json").read_text())["methods"]["model"]
    wanted = report["methods"]["random_neurons"]["forget"]["probability"]
    assert measured["forget"]["probability"] == pytest.approx(wanted, abs=1e-3)
    base.save_pretrained(tmp_path / "base")
    patched = ["patch", "create", tmp_path / "base", out, out / "selection.safetensors", tmp_path / "patch"]
    assert call(*patched) == 2 and "Pass units=True (--units)" in " ".join(capsys.readouterr().err.split())
    assert call(*patched, "--units") == 0
    assert call("patch", "verify", tmp_path / "patch", tmp_path / "base", out) == 0


def test_a_float_folder_has_the_rows_in_its_weights(files, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    quick = ["--max-steps", 2, "--batch-size", 6, "--units", "--method", "random_neurons", "--fraction", 0.25]
    how = ["--load-in", "4bit", "--save-as", "float"]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", out, *quick, *how) == NOT_REACHED
    base, after = load_model(str(files / "model"), load_in="4bit")[0], load_model(str(out))[0]
    assert not attached_layers(after)
    selection = NeuronSelection.load(out / "selection.safetensors")
    assert_only_units_changed(after, weights(decoded(base)), selection)
