"""On a GPU a Trainer makes the steps of the plain loop, and a sharded model those of a whole one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from tests.attribution.reference_attribution import lively, loosely, padded_batch, sequences
from tests.distributed import training
from tests.models import tiny
from tests.strategies import generator
from tests.unlearning.trainer.trainer_runs import assert_same, make_model, make_trainer, plain_loop
from torch_simu import NeuronSelection, SIMUOptimizer

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


def test_a_sharded_model_is_attributed_like_a_whole_one(mesh):
    whole, batch = lively("llama"), padded_batch(sequences(2), "right")
    model = copy.deepcopy(whole)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found, expected = (loosely(each, [batch], steps=2, method="packed") for each in (model, whole))
    for layer, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[layer], scores, rtol=1e-4, atol=1e-6 * scores.norm().item())


def test_fused_experts_that_are_split_by_their_output_train_like_whole_ones(mesh):
    trained = []
    for sharded in (False, True):
        model = tiny("mixtral")
        if sharded:
            fully_shard(model, mesh=mesh, shard_placement_fn=lambda param: Shard(1 if param.dim() == 3 else 0))
        selection = NeuronSelection.random(model, 0.1, generator(0))
        optimizer = SIMUOptimizer(selection.param_groups(model, attention="frozen"), lr=0.1)
        ids = torch.tensor([[3, 4, 5, 6, 7]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        trained.append({name: training.whole(param.detach()) for name, param in model.named_parameters()})
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-6)
