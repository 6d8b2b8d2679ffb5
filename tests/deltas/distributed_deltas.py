"""What two processes train beside codes; run by tests/distributed/distributed_run.py."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.quantized import eight_bit
from tests.strategies import normal
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas
from torch_simu.deltas import attached_layers, trained_groups
from torch_simu.optimizer import covariance_hooks

SIZE, WIDTH = 64, 32
SELECTION = NeuronSelection({"1": [3, 9, 40]}, {"1": SIZE})


def make_model() -> nn.Module:
    """A float layer, and one with codes and a delta."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    first = nn.Linear(8, SIZE).requires_grad_(False)
    with torch.no_grad():
        first.weight.copy_(normal(0, SIZE, 8))
        first.bias.zero_()
    model = nn.Sequential(first, eight_bit(1, SIZE, WIDTH)).train()
    attach_deltas(model, SELECTION)
    return model


def train(model: nn.Module, deltas: list[nn.Parameter], part: slice = slice(None)) -> SIMUOptimizer:
    """Three steps on a part of each batch."""
    optimizer = SIMUOptimizer(deltas, lr=0.02, rho=1.0, weight_decay=0.1)
    for step in range(3):
        model(normal(10 + step, 4, 8)[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def deltas_beside_codes_under_ddp_equal_one_process(rank: int, folder: Path) -> None:
    """The codes are no parameter that is reduced, and stay."""
    single, model = make_model(), make_model()
    codes = model[1].weight.clone()
    train(single, [single[1].delta])
    train(DistributedDataParallel(model), [model[1].delta], slice(2 * rank, 2 * rank + 2))
    torch.testing.assert_close(model[1].delta, single[1].delta, rtol=1e-5, atol=1e-7)
    assert torch.equal(model[1].weight, codes)


def codes_are_sharded_under_fsdp2_and_their_deltas_equal_one_process(rank: int, folder: Path) -> None:
    """Each process holds half of the rows of the codes."""
    single, model = make_model(), make_model()
    codes = model[1].weight.clone()
    train(single, [single[1].delta])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    layer = attached_layers(model)["1"]
    train(model, [layer.delta], slice(2 * rank, 2 * rank + 2))
    weight, delta = layer.weight, layer.delta
    found = weight.full_tensor(), delta.full_tensor()
    assert isinstance(weight, DTensor) and weight.dtype == torch.int8
    assert weight.to_local().shape == (WIDTH // 2, SIZE)
    assert torch.equal(found[0], codes)
    torch.testing.assert_close(found[1], single[1].delta, rtol=1e-5, atol=1e-7)


def make_units(curvature: str) -> tuple[nn.Module, SIMUOptimizer]:
    """A model with codes, an optimizer of the deltas of its units, and what trains of them."""
    first = nn.Linear(8, SIZE, bias=False)
    with torch.no_grad():
        first.weight.copy_(normal(0, SIZE, 8))
    model = nn.Sequential(first, nn.Tanh(), eight_bit(1, SIZE, WIDTH)).train()
    chosen = NeuronSelection({"2": [3, 9, 40]}, {"2": SIZE})
    groups = trained_groups(model, chosen, "frozen", units=True)
    return model, SIMUOptimizer(groups, lr=0.02, hessian_interval=2, curvature=curvature)


def train_units(
    wrapped: nn.Module, model: nn.Module, optimizer: SIMUOptimizer, part: slice = slice(None), *, hooked: bool = True
) -> None:
    """Four steps on a part of each batch."""
    for step in range(4):
        with covariance_hooks(model, optimizer) if hooked else nullcontext() as hooks:
            wrapped(normal(10 + step, 4, 8)[part]).square().mean().backward()
        if hooks is not None and optimizer.hessian_due:
            optimizer.update_curvature(hooks)
        optimizer.step()
        optimizer.zero_grad()


def units_beside_codes_under_ddp_equal_one_process(rank: int, folder: Path) -> None:
    for curvature in ("neurons", "both"):
        single, model = make_units(curvature), make_units(curvature)
        # Its hooks would wait for the other process, which is in the same place and makes the same sums.
        with mock.patch.object(dist, "is_initialized", return_value=False):
            train_units(single[0], *single)
        train_units(DistributedDataParallel(model[0]), *model, slice(2 * rank, 2 * rank + 2))
        for name, layer in attached_layers(model[0]).items():
            expected = attached_layers(single[0])[name].delta
            assert expected.any()
            torch.testing.assert_close(layer.delta, expected, rtol=1e-4, atol=1e-6)


def units_beside_codes_are_sharded_under_fsdp2_by_their_plain_gradient_only(rank: int, folder: Path) -> None:
    part = slice(2 * rank, 2 * rank + 2)
    for curvature in ("gnb", "both"):
        (single, _), (model, _) = make_units("gnb"), make_units("gnb")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizers = []
        for each in (single, model):
            layers = attached_layers(each)
            rows = {"params": [layers["0"].delta], "neurons": [None], "neuron_dim": 0, "rows": True}
            optimizers.append(SIMUOptimizer([{"params": [layers["2"].delta]}, rows], lr=0.02, curvature=curvature))
        if curvature == "gnb":
            train_units(single, single, optimizers[0], hooked=False)
            train_units(model, model, optimizers[1], part, hooked=False)
            for name, layer in attached_layers(model).items():
                expected = attached_layers(single)[name].delta
                torch.testing.assert_close(layer.delta.full_tensor(), expected, rtol=1e-5, atol=1e-6)
            continue
        try:
            train_units(model, model, optimizers[1], part)
        except ValueError as error:
            assert "The delta of rows of layer '0' is sharded" in str(error)
        else:
            raise AssertionError("rows that are spread over processes were whitened")


SCENARIOS = [
    units_beside_codes_under_ddp_equal_one_process,
    units_beside_codes_are_sharded_under_fsdp2_by_their_plain_gradient_only,
    deltas_beside_codes_under_ddp_equal_one_process,
    codes_are_sharded_under_fsdp2_and_their_deltas_equal_one_process,
]
