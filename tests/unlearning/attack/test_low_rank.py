"""LoRA matrices relearn beside layers of any kind, begin at no change, and leave nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.models import tiny
from tests.unlearning.test_driver import _memorized
from torch_simu import NeuronSelection, attach_deltas
from torch_simu.unlearning.attack import low_rank as matrices
from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.attack.low_rank import low_rank

NAME = "relearn_low_rank"
FEW = AttackConfig(rates=(1e-3,), steps=10, rank=2)

pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmo2"])
def test_matrices_begin_at_no_change_train_alone_and_leave_nothing(kind: str) -> None:
    model = tiny(kind).eval()
    flags = [param.requires_grad_(bool(place % 2)).requires_grad for place, param in enumerate(model.parameters())]
    layers, state = dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}
    ids, drawn = torch.arange(6)[None], torch.get_rng_state()
    before = model(ids).logits
    with low_rank(model, rank=2, seed=0) as trained:
        assert torch.equal(model(ids).logits, before)
        assert {id(param) for param in model.parameters() if param.requires_grad} == {id(param) for param in trained}
        assert not {param.shape for param in trained} & {value.shape for value in state.values()}
        for param in trained:
            nn.init.ones_(param)
        assert not torch.allclose(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before) and torch.equal(torch.get_rng_state(), drawn)
    assert dict(model.named_modules()) == layers
    assert [param.requires_grad for param in model.parameters()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_was_there_comes_back_also_behind_an_exception() -> None:
    model = tiny("llama")
    layers = dict(model.named_modules())
    with pytest.raises(KeyboardInterrupt), low_rank(model, rank=2, seed=0):
        raise KeyboardInterrupt
    assert dict(model.named_modules()) == layers


@pytest.mark.parametrize("kind", ["float", "8bit", "4bit"])
def test_they_bring_back_more_than_was_there_and_the_model_stays(kind: str) -> None:
    base, examples = _memorized()
    model = copy.deepcopy(base)
    if kind != "float":
        pytest.importorskip("bitsandbytes")
        from tests.quantized import quantized

        model = quantized(base, kind)
    generator = torch.Generator().manual_seed(0)
    for delta in attach_deltas(model, NeuronSelection.random(model, 0.2, generator)).values():
        nn.init.normal_(delta, std=0.3, generator=generator)
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    found = attack_model(model, examples["forget"], attacks=[NAME], config=FEW)[NAME]
    assert found.trace[0].rate == pytest.approx(matrices.RATE_RATIO * FEW.rates[0])
    assert found.probability > found.before.probability + 0.1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)
    again = attack_model(model, examples["forget"], attacks=[NAME], config=FEW)[NAME]
    assert again == found


def test_without_peft_it_is_skipped_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "has_peft", lambda: False)
    model, examples = _memorized()
    quick = AttackConfig(rates=(1e-3,), steps=1)
    assert attack_model(model, examples["forget"], config=quick)[NAME].skipped == "peft is not installed"
    with pytest.raises(ImportError, match=r"peft is not installed, expected it for .*\. Run: pip install peft"):
        attack_model(model, examples["forget"], attacks=[NAME], config=quick)
    with pytest.raises(ImportError, match="peft is not installed"), low_rank(model, rank=2, seed=0):
        pass
