"""A Trainer trains the deltas of a quantized model, saves them with it, and resumes; the codes stay."""

from __future__ import annotations

import pytest
import torch

from tests.cli.test_cli import files  # noqa: F401 (a fixture)
from tests.models import tiny
from tests.unlearning.trainer.trainer_runs import STEPS, make_selection, make_trainer
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.bitsandbytes.layers import fingerprint
from torch_simu.cli.loading import load_model
from torch_simu.deltas import attached_layers
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


def test_a_trainer_trains_deltas_and_resumes_with_the_bits_of_an_unbroken_run(model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = model()
    codes = {name: fingerprint(layer) for name, layer in attached_layers(whole).items()}
    make_trainer(whole, tmp_path / "run", **options).train()
    resumed = model()
    trainer = make_trainer(resumed, tmp_path / "run", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.state.global_step == STEPS
    for name, layer in attached_layers(whole).items():
        assert layer.delta.any()
        assert torch.equal(layer.delta, attached_layers(resumed)[name].delta)
        assert fingerprint(layer) == codes[name]


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
