"""Whitened steps of two processes: the covariances are those of all rows, and every shard steps as the whole does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.training import CLASSES, SELECTION, assert_same, batch, half, make_model, make_optimizer, sharded
from torch_simu import SIMUOptimizer, register_neuron_hooks
from torch_simu.optimizer import GradientBalance

OPTIONS = {"betas": (0.5, 0.8)}


def train(
    wrapped: nn.Module, model: nn.Module, optimizer: SIMUOptimizer, start: int, stop: int, part: slice = slice(None)
) -> None:
    """Balanced steps on a part of each batch, whose other half is not scored, with the refreshes."""
    balance = GradientBalance(optimizer)
    for step in range(start, stop):
        inputs, labels = batch(step)
        optimizer.zero_grad()
        outputs = optimizer.param_groups[0]["curvature"] == "both"
        with register_neuron_hooks(model, ["0", "2"], reduce="covariance", outputs=outputs) as hooks, balance.forget():
            functional.cross_entropy(wrapped(inputs[part]), labels[part]).backward()
        inputs, labels = batch(1000 + step)
        functional.cross_entropy(wrapped(inputs[part]), labels[part]).backward()
        if optimizer.hessian_due:
            optimizer.update_curvature(hooks)
        balance.combine_(retain_weight=2.0)
        optimizer.step()


def one_process(curvature: str, steps: int = 5) -> tuple[nn.Module, SIMUOptimizer]:
    """The same run in one process."""
    model = make_model()
    optimizer = make_optimizer(model, curvature=curvature, **OPTIONS)
    # Its hooks would wait for the other process, which is in the same place and makes the same sums.
    with mock.patch.object(dist, "is_initialized", return_value=False):
        train(model, model, optimizer, 0, steps)
    return model, optimizer


def whitened_ddp_equals_one_process(rank: int, folder: Path) -> None:
    for curvature in ("neurons", "both"):
        model = make_model()
        optimizer = make_optimizer(model, curvature=curvature, **OPTIONS)
        train(DistributedDataParallel(model), model, optimizer, 0, 5, half(rank))
        assert_same(model, optimizer, *one_process(curvature), rtol=1e-4, atol=1e-5)


def whitened_fsdp2_equals_one_process(rank: int, folder: Path) -> None:
    for curvature in ("neurons", "both"):
        model = sharded()
        optimizer = make_optimizer(model, curvature=curvature, **OPTIONS)
        train(model, model, optimizer, 0, 5, half(rank))
        assert_same(model, optimizer, *one_process(curvature), rtol=1e-4, atol=1e-5)
        state = optimizer.state[model.get_parameter("2.weight")]
        assert state["exp_avg"].shape == (CLASSES, len(SELECTION["2"]))
        assert state["exp_avg"].to_local().shape[0] == (3 if rank == 0 else 2)
        assert state["neuron_factor"].shape == (3, 3)


def whitened_shards_resume(rank: int, folder: Path) -> None:
    whole, resumed = sharded(), sharded()
    optimizer, other = (make_optimizer(model, curvature="both", **OPTIONS) for model in (whole, resumed))
    train(whole, whole, optimizer, 0, 3, half(rank))
    with torch.no_grad():
        for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, each in ((whole, optimizer), (resumed, other)):
        train(model, model, each, 3, 6, half(rank))
    assert_same(resumed, other, whole, optimizer, rtol=0, atol=0)


def _checkpoint(model: nn.Module, optimizer: SIMUOptimizer, options: StateDictOptions) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


def whitened_checkpoints_resume(rank: int, folder: Path) -> None:
    """Saved and loaded by torch.distributed.checkpoint, and once more from what was loaded, runs go on bit by bit."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for curvature in ("neurons", "both"):
        model = sharded()
        optimizer = make_optimizer(model, curvature=curvature, **OPTIONS)
        train(model, model, optimizer, 0, 3, half(rank))
        run = model, optimizer
        for number in range(2):
            place = folder / f"{curvature}{number}"
            dcp.save(_checkpoint(*run, options), checkpoint_id=place)
            twin = sharded(seed=1)
            resumed = make_optimizer(twin, curvature=curvature, **OPTIONS)
            # Makes the state of the new optimizer, which loading fills.
            state = _checkpoint(twin, resumed, options)
            dcp.load(state, checkpoint_id=place)
            twin.load_state_dict(state["model"])
            set_optimizer_state_dict(twin, resumed, state["optimizer"], options=options)
            assert resumed.hessian_due == run[1].hessian_due
            assert_same(twin, resumed, *run, rtol=0, atol=0)
            for each in (run, (twin, resumed)):
                train(each[0], *each, 3 + number, 4 + number, half(rank))
            assert_same(twin, resumed, *run, rtol=0, atol=0)
            run = twin, resumed


def whitening_alone_is_found(rank: int, folder: Path) -> None:
    """A process that takes the norm of its own shard, or the covariance of its own rows, breaks the law."""
    alone = mock.patch("torch_simu.optimizer.stepping.trust.summed_over_shards", lambda values, params: list(values))
    own_rows = mock.patch("torch_simu.optimizer.curvature.factors.dist.is_initialized", lambda: False)
    for mutant in (alone, own_rows):
        try:
            with mutant:
                model = sharded()
                optimizer = make_optimizer(model, curvature="neurons", **OPTIONS)
                train(model, model, optimizer, 0, 5, half(rank))
            assert_same(model, optimizer, *one_process("neurons"), rtol=1e-4, atol=1e-5)
        except AssertionError:
            broken = True
        else:
            broken = False
        found = torch.tensor(int(broken))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        assert found.item()


SCENARIOS = [
    whitened_ddp_equals_one_process,
    whitened_fsdp2_equals_one_process,
    whitened_shards_resume,
    whitened_checkpoints_resume,
    whitening_alone_is_found,
]
