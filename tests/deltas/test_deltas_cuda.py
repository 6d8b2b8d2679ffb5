"""On a GPU a layer with a delta waits for nothing: shown on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.fake_cuda.waits import Waits, fake_cuda, fake_model
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.deltas import attached_layers
from torch_simu.deltas.attach import attach_places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_a_delta_neither_reads_the_device_nor_copies_between_devices(dtype):
    selection = NeuronSelection({"2": [1, 4]}, {"2": 6})
    made = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    with fake_cuda() as fake:
        model = fake_model(made, fake, dtype)
        # Rows as they are known, since a run on fake tensors proves nothing.
        attach_places(model, selection, NeuronSelection({"0": [1, 4]}, {"0": 6}))
        deltas = {
            f"{name}.{key}": delta
            for name, layer in attached_layers(model).items()
            for key, delta in layer.deltas().items()
        }
        assert list(deltas) == ["0.delta", "0.delta_bias", "2.delta"]
        optimizer = SIMUOptimizer(deltas.values(), lr=0.1)
        inputs = torch.empty(3, 5, 4, dtype=dtype, device="cuda")

        def once():
            # Autograd takes fake tensors on a GPU only.
            with torch.no_grad():
                model(inputs)
            for delta in deltas.values():
                delta.grad = torch.empty_like(delta)
            optimizer.step()
            optimizer.update_hessian(3)
            optimizer.zero_grad()

        once()
        with Waits() as waits:
            once()
        assert waits.counts == {}
        assert all(delta.device.type == "cuda" for delta in deltas.values())
