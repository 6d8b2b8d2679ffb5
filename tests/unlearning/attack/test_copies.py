"""All attacks share one copy, of which everything trains but codes; the model itself stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.models import tiny
from tests.unlearning.attack.bigram import FORGET, A, Bigrams, row
from tests.unlearning.attack.test_attack import relearned
from tests.unlearning.test_driver import _memorized
from torch_simu import NeuronSelection, attach_deltas, merge_deltas
from torch_simu.unlearning.attack import teaching
from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.attack.rounding import rounded_to_4_bits, rounded_to_8_bits
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.metrics.scoring import score_answers


def test_nothing_of_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = _memorized()
    model = copy.deepcopy(model).train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: param.requires_grad for name, param in model.named_parameters()}

    def check() -> None:
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert {name: param.requires_grad for name, param in model.named_parameters()} == flags
        assert all(module.training for module in model.modules())
        assert torch.equal(model.model.norm.weight.grad, torch.ones_like(model.model.norm.weight))
        assert model.lm_head.weight.grad is None

    random = torch.get_rng_state()
    attack_model(model, examples["forget"], examples["retain"], config=AttackConfig(rates=(1e-2,), steps=2))
    check()
    assert torch.equal(torch.get_rng_state(), random)
    calls = []

    def fails(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return teaching_loss(*arguments)

    teaching_loss = teaching.mean_answer_nll
    monkeypatch.setattr(teaching, "mean_answer_nll", fails)
    with pytest.raises(RuntimeError, match="stopped"):
        attack_model(model, examples["forget"], config=AttackConfig(rates=(1e-2,), steps=5))
    check()


def test_one_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    made = copy.deepcopy
    monkeypatch.setattr(
        "torch_simu.unlearning.attack.copies.copy.deepcopy", lambda each: copies.append(1) or made(each)
    )
    attack_model(Bigrams(), FORGET, [row(9)], config=AttackConfig(rates=(1.0, 0.1), steps=2))
    assert len(copies) == 1


@pytest.mark.parametrize(("kind", "units"), [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True)])
def test_rounding_is_that_of_every_matrix_with_deltas_merged(kind: str, units: bool) -> None:
    model = tiny(kind)
    rows = [Example((1, 5 + i, 7), (-100, 5 + i, 7)) for i in range(4)]
    generator = torch.Generator().manual_seed(0)
    deltas = attach_deltas(model, NeuronSelection.random(model, 0.2, generator), units=units)
    for delta in deltas.values():
        nn.init.normal_(delta, std=0.2, generator=generator)
    found = attack_model(model, rows, attacks=["round_8bit", "round_4bit"])
    for name, rounded in (("round_8bit", rounded_to_8_bits), ("round_4bit", rounded_to_4_bits)):
        twin = copy.deepcopy(model)
        merge_deltas(twin)
        with torch.no_grad():
            for layer in twin.modules():
                turned = type(layer).__name__ == "Conv1D"
                for param in layer.parameters(recurse=False):
                    if param.dim() > 1 and not getattr(param, "done", False):
                        param.copy_(rounded(param.T).T if turned else rounded(param))
                        param.done = True
        scores = score_answers(twin, rows[1:3])
        assert found[name].probability == pytest.approx(sum(scores["probability"]) / 2, rel=1e-5)
        assert found[name].probability != pytest.approx(found[name].before.probability, rel=1e-5)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_of_a_quantized_model_deltas_and_float_weights_relearn_and_codes_stay(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from tests.quantized import quantized
    from torch_simu.bitsandbytes.layers import fingerprint
    from torch_simu.bitsandbytes.packing import keep_codes_as_loaded
    from torch_simu.deltas import attached_layers

    base, examples = _memorized()
    model = quantized(base, kind)
    keep_codes_as_loaded(model)
    generator = torch.Generator().manual_seed(0)
    for delta in attach_deltas(model, NeuronSelection.random(model, 0.2, generator)).values():
        nn.init.normal_(delta, std=0.3, generator=generator)
    before = {name: (fingerprint(layer), layer.delta.clone()) for name, layer in attached_layers(model).items()}
    found = attack_model(model, examples["forget"], config=AttackConfig(rates=(1e-2,), steps=10))
    assert found["round_8bit"].skipped == found["round_4bit"].skipped == "its weights are codes already"
    assert found["relearn"].probability > found["relearn"].before.probability + 0.1
    for name, layer in attached_layers(model).items():
        assert fingerprint(layer) == before[name][0] and torch.equal(layer.delta, before[name][1])
    copied = teaching.ModelCopy(model)
    deltas = [layer.delta for layer in attached_layers(copied.model).values()]
    assert {id(param) for param in copied.trained} >= {id(delta) for delta in deltas}
    assert all(param.is_floating_point() for param in copied.trained)


def test_half_precision_is_attacked_in_float32_because_small_steps_are_lost_to_rounding() -> None:
    model = Bigrams(torch.bfloat16)
    with torch.no_grad():
        model.table[A] = 4.0
    lost, made = (relearned(model, AttackConfig(rates=(1e-3,), steps=5, float32=float32)) for float32 in (False, True))
    assert lost.probability == lost.before.probability
    assert made.probability > made.before.probability
    assert model.table.dtype == torch.bfloat16
