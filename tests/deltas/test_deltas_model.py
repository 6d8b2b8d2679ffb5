"""Deltas in whole models: quantized ones train and are saved, nothing more is held, and they compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.deltas.test_deltas import SIZE, WIDTH, as_model, bits
from tests.models import tiny
from tests.quantized import quantized
from tests.strategies import normal
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, detach_deltas
from torch_simu.deltas import load_deltas, save_deltas
from torch_simu.deltas.attach import NOTHING, attach_places

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_quantized_language_model_trains_and_saves_its_base_untouched(kind: str, tmp_path) -> None:
    # Sizes that the 4-bit kernels take.
    model = quantized(tiny("llama", hidden_size=64, intermediate_size=128), kind)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    before = {name: bits(value) for name, value in model.state_dict().items() if value.numel()}
    selection = NeuronSelection.random(model, 0.1, torch.Generator().manual_seed(0))
    deltas = attach_deltas(model, selection)
    model.train()
    optimizer = SIMUOptimizer(list(deltas.values()), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {name: bits(value) for name, value in model.state_dict().items() if value.numel()}
    assert {name: after[name] for name in before} == before
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    save_deltas(model, tmp_path / "deltas.safetensors")
    detach_deltas(model)
    load_deltas(model, tmp_path / "deltas.safetensors")
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_no_activation_is_held_for_the_backward_pass() -> None:
    x = normal(0, 128, SIZE).requires_grad_()
    held: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        held.append(tensor.numel() * tensor.element_size() if tensor.is_floating_point() else 0)
        return tensor

    for kind in ("8bit", "4bit", "linear"):
        model = as_model(kind, 0, torch.float32).train()
        attach_deltas(model, NeuronSelection({"0": [1, 2, 3]}, {"0": SIZE}))
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(x)
        # The selected activations and the delta; scales, or the float weight itself.
        weights = WIDTH * SIZE * 4 if kind == "linear" else WIDTH * 4
        assert sum(held) <= 4 * (128 * 3 + WIDTH * 3) + weights


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# Dynamo makes an instance of the class to trace its static methods.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("kind", "rows"), [("linear", False), ("8bit", False), ("8bit", True)])
def test_a_model_with_deltas_compiles(kind: str, rows: bool, train: bool) -> None:
    model = as_model(kind, 0, torch.float32).train(train)
    of_columns, of_rows = (NeuronSelection({"0": [1, 5]}, {"0": size}) for size in (SIZE, WIDTH))
    delta = attach_places(model, *((NOTHING, of_rows) if rows else (of_columns, NOTHING)))["0"]
    with torch.no_grad():
        delta.copy_(normal(1, *delta.shape))
    x = normal(2, 4, SIZE)
    expected = model(x)
    expected.square().sum().backward()
    wanted, delta.grad = delta.grad, None
    # Traced and run as traced, without a compiler of the system.
    found = torch.compile(model, backend="aot_eager")(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(delta.grad, wanted)
