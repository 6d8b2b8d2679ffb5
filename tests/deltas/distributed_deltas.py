"""What two processes train beside codes; run by tests/distributed/distributed_run.py."""

from __future__ import annotations

import logging
from pathlib import Path

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
from torch_simu.deltas import attached_layers

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


SCENARIOS = [
    deltas_beside_codes_under_ddp_equal_one_process,
    codes_are_sharded_under_fsdp2_and_their_deltas_equal_one_process,
]
