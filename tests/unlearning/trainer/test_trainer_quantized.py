"""A Trainer trains the deltas of a quantized model, saves them with it, and resumes; the codes stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.cli.test_cli import files  # noqa: F401 (a fixture)
from tests.models import tiny
from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, SEED, STEPS, make_selection, make_trainer
from tests.unlearning.trainer.whitened_runs import OPTIONS, make_whitened_trainer
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.bitsandbytes.layers import fingerprint
from torch_simu.cli.loading import load_model
from torch_simu.deltas import attached_layers
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.trainer.trainer import allow_quantized_training


@pytest.fixture
def model(tmp_path, files):  # noqa: F811
    """A tiny Llama as `from_pretrained` quantizes it, with deltas."""
    from transformers import AutoTokenizer

    tiny("llama", vocab_size=140).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(tmp_path / "base")

    def load(attach=True):
        found, _ = load_model(str(tmp_path / "base"), load_in="8bit")
        if attach:
            attach_deltas(found, make_selection(found))
        return found

    return load


@pytest.mark.parametrize("curvature", ["gnb", "neurons", "both"])
def test_a_trainer_trains_deltas_and_resumes_with_the_bits_of_an_unbroken_run(model, tmp_path, curvature):
    arguments = {"save_strategy": "steps", "save_steps": 2}

    def make(model):
        if curvature == "gnb":
            return make_trainer(model, tmp_path / "run", **arguments)
        return make_whitened_trainer(model, tmp_path / "run", curvature, **arguments)

    whole = model()
    codes = {name: fingerprint(layer) for name, layer in attached_layers(whole).items()}
    make(whole).train()
    resumed = model()
    trainer = make(resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.state.global_step == STEPS
    for name, layer in attached_layers(whole).items():
        assert layer.delta.any()
        assert torch.equal(layer.delta, attached_layers(resumed)[name].delta)
        assert fingerprint(layer) == codes[name]


@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_the_driver_and_the_trainer_make_the_same_whitened_steps_of_deltas(model, tmp_path, curvature, monkeypatch):
    driven, trained = model(attach=False), model()
    config = UnlearnConfig(
        paced=False,
        **OPTIONS,
        curvature=curvature,
        weight_decay=0.1,
        forget_batch_size=4,
        retain_batch_size=4,
        max_steps=STEPS,
        forget_target=None,
        seed=SEED,
    )
    unlearn(driven, FORGET, RETAIN, config=config, selection=make_selection(driven))
    # In train mode bitsandbytes rounds no activations on a CPU, and the driver never sets it.
    monkeypatch.setattr(trained, "train", lambda mode=True: nn.Module.train(trained, False))
    make_whitened_trainer(trained, tmp_path, curvature, options={"state_dtype": torch.float32}).train()
    for name, layer in attached_layers(trained).items():
        assert layer.delta.any()
        torch.testing.assert_close(attached_layers(driven)[name].delta, layer.delta, rtol=1e-4, atol=1e-8)


def test_codes_without_deltas_cannot_be_trained(model):
    with pytest.raises(ValueError, match="No layer of the model has a delta.*codes cannot be trained"):
        allow_quantized_training(model(attach=False))


def test_a_delta_of_other_neurons_is_held_beside_those_that_train(model, tmp_path):
    found = model(attach=False)
    asked = make_selection(found)
    layer = next(iter(asked))
    held = int((~asked.mask(layer)).nonzero()[0])
    attach_deltas(found, NeuronSelection({layer: [held]}, {layer: asked.num_neurons[layer]}))[layer].data.fill_(0.5)
    make_trainer(found, tmp_path).train()
    after = attached_layers(found)[layer]
    assert after.idx.tolist() == sorted([held, *asked[layer].tolist()])
    assert after.delta[:, after.idx == held].eq(0.5).all()
    assert after.delta[:, after.idx != held].any()
