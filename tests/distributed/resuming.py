"""Scenarios of distributed_run.py: what is saved by two processes goes on in two."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.distributed.training import (
    assert_same,
    half,
    make_optimizer,
    one_process,
    sharded,
    train,
)


def _resumed(rank: int, options: StateDictOptions) -> None:
    model = sharded()
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, 3, half(rank))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    twin = sharded()
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    resumed = make_optimizer(twin)
    if options.full_state_dict and options.cpu_offload and rank > 0:
        saved = {}
    loading = StateDictOptions(
        full_state_dict=options.full_state_dict,
        flatten_optimizer_state_dict=options.flatten_optimizer_state_dict,
        broadcast_from_rank0=options.full_state_dict and options.cpu_offload,
    )
    set_optimizer_state_dict(twin, resumed, saved, options=loading)
    for run in ((model, optimizer), (twin, resumed)):
        train(*run, 3, 6, half(rank))
    assert_same(twin, resumed, model, optimizer, rtol=0, atol=0)


def plain_state_resumes(rank: int, folder: Path) -> None:
    _resumed(rank, StateDictOptions())


def flattened_state_resumes(rank: int, folder: Path) -> None:
    _resumed(rank, StateDictOptions(flatten_optimizer_state_dict=True))


def full_state_resumes(rank: int, folder: Path) -> None:
    _resumed(rank, StateDictOptions(full_state_dict=True))


def offloaded_full_state_resumes(rank: int, folder: Path) -> None:
    _resumed(rank, StateDictOptions(full_state_dict=True, cpu_offload=True))


def native_state_dict_resumes(rank: int, folder: Path) -> None:
    model = sharded()
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, 3, half(rank))
    twin = sharded()
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    resumed = make_optimizer(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((model, optimizer), (twin, resumed)):
        train(*run, 3, 6, half(rank))
    assert_same(twin, resumed, model, optimizer, rtol=0, atol=0)


def a_whole_state_is_taken_in_shards(rank: int, folder: Path) -> None:
    single, theirs = one_process(3)
    model = sharded()
    with torch.no_grad():
        for param, value in zip(model.parameters(), single.parameters(), strict=True):
            param.copy_(torch.distributed.tensor.distribute_tensor(value, param.device_mesh, param.placements))
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(single, theirs, 3, 5)
    train(model, optimizer, 3, 5, half(rank))
    assert_same(model, optimizer, single, theirs)


def a_checkpoint_of_two_is_written(rank: int, folder: Path) -> None:
    """The other half is in the test: one process loads it."""
    model = sharded()
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, 3, half(rank))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=folder / "two")
