"""Neurons of convolutions and of fused experts train as those of linear layers do; whole weights have 8-bit state."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.optimizer.test_optimizer_torch import assert_equal, train
from tests.strategies import normal, seeds
from torch_simu import SIMUOptimizer

pytestmark = pytest.mark.usefixtures("device")


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.data())
def test_channels_of_a_convolution_are_neurons(seed, channels, filters, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, channels - 1))))
    conv = nn.Conv2d(channels, filters, 2, bias=False)
    optimizer = SIMUOptimizer([{"params": [conv.weight], "neurons": [chosen], "neuron_dim": 1}], lr=0.1)
    before = conv.weight.detach().clone()
    conv.weight.grad = normal(seed, *conv.weight.shape)
    optimizer.step()
    changed = (conv.weight != before).any(0).any(-1).any(-1)
    assert changed.nonzero()[:, 0].tolist() == chosen
    assert optimizer.state[conv.weight]["exp_avg"].shape == (filters, len(chosen), 2, 2)


@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.data())
def test_fused_experts_have_neurons_of_their_own(seed, experts, width, size, transposed, data):
    """A selection per (expert, neuron) is the same as one 2-D parameter per expert."""
    pairs = sorted(data.draw(st.sets(st.tuples(st.integers(0, experts - 1), st.integers(0, size - 1)))))
    shape, dim = ((experts, size, width), (0, 1)) if transposed else ((experts, width, size), (0, 2))
    fused = nn.Parameter(normal(seed, *shape))
    single = [nn.Parameter(part.clone()) for part in fused.detach()]
    optimizer = SIMUOptimizer(
        [{"params": [fused], "neurons": [[e * size + k for e, k in pairs]], "neuron_dim": dim}],
        lr=0.1,
        weight_decay=0.1,
    )
    others = SIMUOptimizer(
        [
            {
                "params": single,
                "neurons": [[k for e, k in pairs if e == expert] for expert in range(experts)],
                "neuron_dim": 0 if transposed else -1,
            }
        ],
        lr=0.1,
        weight_decay=0.1,
    )
    for number in range(3):
        fused.grad = normal(seed + 1 + number, *shape)
        for expert, part in enumerate(single):
            part.grad = fused.grad[expert].clone()
        for each in (optimizer, others):
            each.step()
            if each.hessian_due:
                each.update_hessian(2)
    assert torch.equal(fused, torch.stack([part.detach() for part in single]))
    assert optimizer.state[fused]["exp_avg"].shape == (len(pairs), width)


class TestEightBitState:
    def test_it_takes_a_quarter_of_the_bytes_and_nearly_the_same_steps(self):
        pytest.importorskip("bitsandbytes")
        weights, twins = ([nn.Parameter(normal(0, 64, 64))] for _ in range(2))
        small, full = (
            SIMUOptimizer(each, lr=0.01, rho=1.0, state_dtype=dtype, hessian_interval=1)
            for each, dtype in ((weights, torch.uint8), (twins, torch.float32))
        )
        train(weights, small, 0, 6)
        train(twins, full, 0, 6)
        start = normal(0, 64, 64)
        moved, expected = weights[0].detach() - start, twins[0].detach() - start
        assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.98
        size = Counter()
        for name, optimizer in (("small", small), ("full", full)):
            for value in optimizer.state_dict()["state"][0].values():
                size[name] += value.numel() * value.element_size()
        assert size["small"] < 0.27 * size["full"]

    def test_a_saved_state_goes_on_bit_for_bit(self):
        pytest.importorskip("bitsandbytes")
        weights = [nn.Parameter(normal(0, 8, 64))]
        optimizer = SIMUOptimizer(weights, state_dtype=torch.uint8, lr=0.01)
        train(weights, optimizer, 0, 3)
        twins = [nn.Parameter(weights[0].detach().clone())]
        resumed = SIMUOptimizer(twins, state_dtype=torch.uint8, lr=0.01)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert resumed.state[twins[0]]["exp_avg"].dtype == torch.uint8
        train(weights, optimizer, 3, 5)
        train(twins, resumed, 3, 5)
        assert_equal(weights, twins)

    def test_its_code_map_is_made_once(self, monkeypatch):
        functional = pytest.importorskip("bitsandbytes.functional")
        weights = [nn.Parameter(normal(0, 8, 64))]
        optimizer = SIMUOptimizer(weights, state_dtype=torch.uint8, lr=0.01)
        train(weights, optimizer, 0, 1)
        monkeypatch.setattr(functional, "create_dynamic_map", None)
        train(weights, optimizer, 1, 4)

    def test_selected_neurons_are_refused(self):
        weight = nn.Parameter(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="state_dtype is torch.uint8 for selected neurons, expected whole"):
            SIMUOptimizer([{"params": [weight], "neurons": [[1]]}], state_dtype=torch.uint8)
