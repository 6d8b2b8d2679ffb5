"""A layer like GPT-2's that has no bias, not even as None, goes through every door."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.attribution.reference_attribution import loosely, reference
from tests.models import tiny
from torch_simu import NeuronPatch, NeuronSelection, SIMUOptimizer, attach_deltas, merge_deltas

pytestmark = pytest.mark.usefixtures("device")

LAYERS = ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, -100, 8]])}


class Conv1D(nn.Module):
    """GPT-2's layer as others write it: a product with the weight, and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.nx, self.nf = weight.shape
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.fixture
def model() -> nn.Module:
    model = copy.deepcopy(tiny("gpt2")).eval()
    for name in LAYERS:
        block = model.get_submodule(name.rpartition(".")[0])
        block.c_proj = Conv1D(10 * block.c_proj.weight.detach())
    return model


@pytest.fixture
def selection(model: nn.Module) -> NeuronSelection:
    return NeuronSelection.random(model, 0.2, torch.Generator().manual_seed(0))


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(**BATCH).loss
    return loss


def test_it_is_attributed(model: nn.Module) -> None:
    found = loosely(model, [BATCH], steps=2)
    for name in LAYERS:
        rows = [(BATCH["input_ids"][0], BATCH["labels"][0])]
        expected = reference(model, rows, name, "logprob", "midpoint", 2)
        torch.testing.assert_close(found.scores[name], expected.scores, rtol=1e-4, atol=1e-6)


def test_it_trains_in_place_and_a_patch_carries_the_change(model: nn.Module, selection: NeuronSelection) -> None:
    base, target = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = SIMUOptimizer(selection.param_groups(model, attention="frozen"), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    for name in LAYERS:
        changed = (model.get_parameter(f"{name}.weight") != base.get_parameter(f"{name}.weight")).any(1)
        assert torch.equal(changed, selection.mask(name))
    patch = NeuronPatch.between(base, model, selection)
    patch.apply(target)
    for name, param in model.named_parameters():
        assert torch.equal(target.get_parameter(name), param)
    patch.revert(target)
    for name, param in base.named_parameters():
        assert torch.equal(target.get_parameter(name), param)


def test_it_takes_a_delta(model: nn.Module, selection: NeuronSelection) -> None:
    before = loss_of(model)
    deltas = attach_deltas(model, selection)
    assert torch.equal(loss_of(model), before)
    optimizer = SIMUOptimizer(deltas.values(), lr=0.01)
    loss_of(model).backward()
    optimizer.step()
    trained = loss_of(model)
    assert trained < before
    merge_deltas(model)
    torch.testing.assert_close(loss_of(model), trained)
    assert all(type(model.get_submodule(name)) is Conv1D for name in LAYERS)
