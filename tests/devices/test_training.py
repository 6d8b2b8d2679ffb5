"""On a GPU a Trainer makes the steps of the plain loop, and a sharded model those of a whole one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.distributed import training
from tests.unlearning.trainer.trainer_runs import assert_same, make_model, make_trainer, plain_loop

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("placed")]


def test_a_trainer_makes_the_steps_of_the_plain_loop(gpu, tmp_path):
    expected = make_model()
    wanted = plain_loop(expected)
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert {param.device.type for param in model.parameters()} == {gpu.type}
    assert_same(model, trainer.optimizer, expected, wanted)


@pytest.fixture
def mesh(gpu: torch.device) -> Iterator[dist.DeviceMesh]:
    """One process on the device, as a mesh."""
    place = {"device_id": torch.device("cuda", 0)} if gpu.type == "cuda" else {}
    backend = "nccl" if gpu.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **place)
    yield init_device_mesh(gpu.type, (1,))
    dist.destroy_process_group()


def test_a_sharded_model_makes_the_steps_of_a_whole_one(mesh):
    model = training.make_model()
    fully_shard(model, mesh=mesh)
    optimizer = training.make_optimizer(model)
    training.train(model, optimizer, 0, 5)
    training.assert_same(model, optimizer, *training.one_process())
