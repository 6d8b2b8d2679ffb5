"""Units of two processes: rows that are whole in each step as in one process, and rows spread over both are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.training import CLASSES, NEURONS, SELECTION, WIDTH, assert_same, batch, half
from torch_simu import SIMUOptimizer
from torch_simu.optimizer import GradientBalance, covariance_hooks

ROWS = SELECTION["2"].tolist()


def make_model(seed: int = 0) -> nn.Sequential:
    """An MLP whose first layer has no bias, which shards could not hold whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, NEURONS, bias=False), nn.Tanh(), nn.Linear(NEURONS, CLASSES))


def sharded(place: Callable[[nn.Parameter], Shard | None] | None) -> nn.Module:
    """The model in two shards."""
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=place)
    return model


def by_inputs(param: nn.Parameter) -> Shard | None:
    """Rows of what makes neurons stay whole."""
    return Shard(1) if tuple(param.shape) == (NEURONS, WIDTH) else None


def make_optimizer(model: nn.Module, curvature: str) -> SIMUOptimizer:
    """Of the units, with groups that are made of the model as it is."""
    groups = SELECTION.param_groups(model, units=True)
    assert [group["neurons"] for group in groups] == [[ROWS], [ROWS]]
    return SIMUOptimizer(groups, lr=0.02, betas=(0.5, 0.8), hessian_interval=2, curvature=curvature, weight_decay=0.1)


def train(wrapped: nn.Module, model: nn.Module, optimizer: SIMUOptimizer, part: slice = slice(None)) -> None:
    """Balanced steps on a part of each batch, with the refreshes."""
    balance = GradientBalance(optimizer)
    for step in range(4):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        with covariance_hooks(model, optimizer) as hooks, balance.forget():
            functional.cross_entropy(wrapped(inputs[part]), labels[part]).backward()
        inputs, labels = batch(1000 + step)
        functional.cross_entropy(wrapped(inputs[part]), labels[part]).backward()
        if optimizer.hessian_due:
            optimizer.update_curvature(hooks)
        balance.combine_(retain_weight=2.0)
        optimizer.step()


def one_process(curvature: str) -> tuple[nn.Module, SIMUOptimizer]:
    """The same run in one process."""
    model = make_model()
    optimizer = make_optimizer(model, curvature)
    # Its hooks would wait for the other process, which is in the same place and makes the same sums.
    with mock.patch.object(dist, "is_initialized", return_value=False):
        train(model, model, optimizer)
    return model, optimizer


def units_under_ddp_equal_one_process(rank: int, folder: Path) -> None:
    for curvature in ("neurons", "both"):
        model = make_model()
        optimizer = make_optimizer(model, curvature)
        train(DistributedDataParallel(model), model, optimizer, half(rank))
        assert_same(model, optimizer, *one_process(curvature), rtol=1e-4, atol=1e-5)


def units_in_shards_equal_one_process(rank: int, folder: Path) -> None:
    before = make_model()
    off = [neuron for neuron in range(NEURONS) if neuron not in ROWS]
    for curvature in ("neurons", "both"):
        model = sharded(by_inputs)
        optimizer = make_optimizer(model, curvature)
        train(model, model, optimizer, half(rank))
        assert_same(model, optimizer, *one_process(curvature), rtol=1e-4, atol=1e-5)
        weight = model.get_parameter("0.weight")
        assert optimizer.state[weight]["exp_avg"].to_local().shape == (len(ROWS), WIDTH // 2)
        assert optimizer.state[weight]["input_factor"].shape == (WIDTH, WIDTH)
        assert torch.equal(weight.full_tensor()[off], before[0].weight[off])


def rows_across_processes_are_refused(rank: int, folder: Path) -> None:
    model = sharded(None)
    optimizer = make_optimizer(model, "neurons")
    try:
        train(model, model, optimizer, half(rank))
    except ValueError as error:
        assert "is sharded along its neurons (dimension 0)" in str(error) and "Shard(1)" in str(error)
        return
    raise AssertionError("rows that are spread over processes were trained")


SCENARIOS = [
    units_under_ddp_equal_one_process,
    units_in_shards_equal_one_process,
    rows_across_processes_are_refused,
]
