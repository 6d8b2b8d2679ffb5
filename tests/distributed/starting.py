"""What a model said before the first step is the same in one process, under DDP and in shards."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from tests.distributed.training import tiny_llama
from torch_simu.unlearning.objectives import NPO, StartModel

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
BATCH = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}


def moved(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model some steps later."""
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    return model


def losses(start: StartModel, model: torch.nn.Module) -> list[float]:
    """What an objective that compares with the start says, twice, to see that the model came back."""
    return [next(iter(NPO(start).terms(model, BATCH, BATCH))).loss.item() for _ in range(2)]


def the_start_model_survives_wrapping_and_sharding(rank: int, folder: Path) -> None:
    model = tiny_llama()
    start = StartModel(model)
    wanted = losses(start, moved(model))
    assert wanted[0] == wanted[1] and abs(wanted[0] - 0.6931) > 1e-3
    wrapped = tiny_llama()
    start = StartModel(wrapped)
    torch.testing.assert_close(losses(start, DistributedDataParallel(moved(wrapped))), wanted)
    for whole in (True, False):
        shards = tiny_llama()
        start = StartModel(shards)
        for layer in shards.model.layers:
            fully_shard(layer)
        fully_shard(shards)
        start = start if whole else StartModel(shards)
        torch.testing.assert_close(losses(start, moved(shards)), wanted)


SCENARIOS = [the_start_model_survives_wrapping_and_sharding]
