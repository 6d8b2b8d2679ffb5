"""On a GPU a step and a refresh wait for nothing: shown on fake tensors, which have a device and no data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.fake_cuda.waits import Waits, fake_cuda
from torch_simu import SIMUOptimizer

OPTIONS = {
    "plain": {},
    "capturable": {"capturable": True},
    "loop": {"foreach": False, "weight_decay": 0.1},
    "fused": {"foreach": True, "weight_decay": 0.1},
    "squared gradient": {"curvature": "squared_gradient", "hessian_interval": 2},
    "stochastic rounding": {"stochastic_rounding": True},
    "master weights": {"master_weights": True},
    "maximize": {"maximize": True},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "tensor lr": {"lr": torch.tensor(0.01)},
}


def make(fake, dtype, options):
    """Columns, rows, a whole weight, one that trains nothing, an empty one, and fused experts."""
    shapes = ((4, 6), (5, 3), (3,), (2, 2), (0, 3), (2, 3, 4))
    weights = [fake(nn.Parameter(torch.zeros(shape, dtype=dtype))) for shape in shapes]
    groups = [
        {"params": weights[:1], "neurons": [[0, 2, 5]]},
        {"params": weights[1:2], "neurons": [[1, 4]], "neuron_dim": 0},
        {"params": weights[2:5], "neurons": [None, [], None]},
        {"params": weights[5:], "neurons": [[1, 2, 7]], "neuron_dim": (0, 2)},
    ]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    return weights, SIMUOptimizer(groups, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_step_and_a_refresh_neither_read_the_device_nor_copy_between_devices(options, dtype):
    with fake_cuda() as fake:
        weights, optimizer = make(fake, dtype, options)
        gauss_newton = "curvature" not in options

        def once():
            optimizer.step()
            if gauss_newton:
                optimizer.update_hessian(3, last=False)
                optimizer.update_hessian(torch.tensor(5))

        # Makes the state, and copies the indices to the device.
        once()
        with Waits() as waits:
            once()
        assert waits.counts == {}
        assert {group["num_steps"].device.type for group in optimizer.param_groups} == {"cuda"}
        for weight in weights:
            assert {value.device.type for value in optimizer.state[weight].values()} == {"cuda"}


def test_waiting_is_seen():
    with fake_cuda() as fake:
        tensor = fake(torch.zeros(3))
        with Waits() as waits:
            tensor.cpu()
            torch.ops.aten._to_copy(torch.zeros(3), device=torch.device("cuda"))
            tensor.isfinite().all().to("cpu")
            with pytest.raises(DataDependentOutputException):
                tensor.sum().item()
    assert sum(waits.counts.values()) == 4
