"""What two processes do together; run by test_distributed.py, which asks for each outcome."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests import mutants
from tests.attribution import distributed_attribution
from tests.deltas import distributed_deltas
from tests.distributed import starting, units, whitening
from tests.distributed.resuming import (
    a_checkpoint_of_two_is_written,
    a_whole_state_is_taken_in_shards,
    flattened_state_resumes,
    full_state_resumes,
    native_state_dict_resumes,
    offloaded_full_state_resumes,
    plain_state_resumes,
)
from tests.distributed.training import (
    CLASSES,
    NEURONS,
    SELECTION,
    WIDTH,
    assert_same,
    batch,
    half,
    make_model,
    make_optimizer,
    one_process,
    sharded,
    tiny_llama,
    train,
    whole,
)
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.trainer.refresh import CurvatureRefresh


def ddp_equals_one_process(rank: int, folder: Path) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    train(DistributedDataParallel(model), optimizer, 0, 5, half(rank))
    assert_same(model, optimizer, *one_process())


def fsdp2_equals_one_process(rank: int, folder: Path, implementation: type[SIMUOptimizer] = SIMUOptimizer) -> None:
    model = sharded()
    optimizer = make_optimizer(model, implementation)
    train(model, optimizer, 0, 5, half(rank))
    assert_same(model, optimizer, *one_process())
    state = optimizer.state[model.get_parameter("2.weight")]["exp_avg"]
    assert state.shape == (CLASSES, 3)
    assert state.to_local().shape == ((3, 3) if rank == 0 else (2, 3))


def mixed_precision_leaves_unselected_weights(rank: int, folder: Path) -> None:
    model = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    before = whole(model.get_parameter("2.weight").detach()).clone()
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, 5, half(rank))
    after = whole(model.get_parameter("2.weight").detach())
    mask = SELECTION.mask("2")
    assert torch.equal(after[:, ~mask], before[:, ~mask])
    assert not torch.isclose(after[:, mask], before[:, mask]).any()
    expected = one_process()[0].get_parameter("2.weight")
    torch.testing.assert_close(after, expected.detach(), rtol=0, atol=5 * 0.02)


def a_bad_shard_stops_every_process(
    rank: int, folder: Path, implementation: type[SIMUOptimizer] = SIMUOptimizer
) -> None:
    model = sharded()
    optimizer = make_optimizer(model, implementation)
    train(model, optimizer, 0, 2, half(rank))
    before = {name: whole(param.detach()).clone() for name, param in model.named_parameters()}
    inputs, labels = batch(7)
    functional.cross_entropy(model(inputs[half(rank)]), labels[half(rank)]).backward()
    if rank == 1:
        model.get_parameter("2.weight").grad.to_local()[0, 3] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    # Gathered before anything is asserted: a process that stopped here would leave the other one waiting.
    after = {name: whole(param.detach()) for name, param in model.named_parameters()}
    assert any("not finite" in str(warning.message) for warning in caught)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert optimizer.diagnostics()["skipped_steps"] == 1


def neurons_across_processes_are_refused(rank: int, folder: Path) -> None:
    def stepped(**placement) -> torch.Tensor:
        # As of GPT-2's Conv1D, the neurons are the rows, which FSDP2 shards unless it is told otherwise.
        model = nn.Linear(WIDTH, 8, bias=False)
        nn.init.ones_(model.weight)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **placement)
        optimizer = SIMUOptimizer([{"params": [model.weight], "neurons": [[1]], "neuron_dim": 0}], lr=0.1)
        model(batch(0)[0]).sum().backward()
        optimizer.step()
        return whole(model.weight.detach())

    try:
        stepped()
    except ValueError as error:
        assert "is sharded along its neurons (dimension 0)" in str(error)
        assert "Shard(1)" in str(error)
    else:
        raise AssertionError("no error")
    # What the message advises works.
    changed = (stepped(shard_placement_fn=lambda param: Shard(1)) != 1).any(dim=1)
    assert changed.nonzero().tolist() == [[1]]


def a_refresh_in_shards_equals_one_process(rank: int, folder: Path) -> None:
    def run(shard: bool) -> tuple[nn.Module, SIMUOptimizer]:
        model = tiny_llama()
        layer = "model.layers.0.mlp.down_proj"
        if shard:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        selection = NeuronSelection({layer: [0, 2, 5]}, {layer: 16})
        optimizer = SIMUOptimizer(selection.param_groups(model, attention="frozen"), lr=1e-2, rho=1.0)
        ids = torch.randint(1, 20, (5, 7), generator=torch.Generator().manual_seed(0))
        rows = [Example(tuple(row[: 4 + n % 3]), tuple(row[: 4 + n % 3])) for n, row in enumerate(ids.tolist())]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        CurvatureRefresh(rows, batch_size=5, micro_batch_size=2).after_step(model, optimizer, 0)
        return model, optimizer

    model, optimizer = run(shard=True)
    with mock.patch("torch_simu.unlearning.refresh._is_distributed", return_value=False):
        assert_same(model, optimizer, *run(shard=False))


def another_selection_keeps_the_state_of_common_neurons(rank: int, folder: Path) -> None:
    new = NeuronSelection({"2": [1, 3, 6]}, {"2": NEURONS})
    model, (single, theirs) = sharded(), one_process(3)
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, 3, half(rank))
    for run in ((optimizer, model), (theirs, single)):
        run[0].change_selection(new, run[1])
    train(model, optimizer, 3, 6, half(rank))
    train(single, theirs, 3, 6)
    assert_same(model, optimizer, single, theirs)


class CountsItsOwnTokens(SIMUOptimizer):
    """Scales the curvature by the tokens of one process."""

    def update_hessian(self, num_tokens, **options):
        super().update_hessian(num_tokens // 2, **options)


def mutants_break_the_law(rank: int, folder: Path) -> None:
    for law, mutant in (
        (a_bad_shard_stops_every_process, mutants.decides_alone),
        (fsdp2_equals_one_process, CountsItsOwnTokens),
        (fsdp2_equals_one_process, mutants.steps_on_its_own_part),
    ):
        try:
            with mutants.implementation(mutant) as implementation:
                law(rank, folder, implementation)
        except AssertionError:
            broken = True
        else:
            broken = False
        # One process alone may be in the right: the mutant is found if any is not.
        found = torch.tensor(int(broken))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        assert found.item(), f"{mutant.__name__} was not found by {law.__name__}"


def the_selection_of_one_process_reaches_all(rank: int, folder: Path) -> None:
    received = NeuronSelection.broadcast(SELECTION if rank == 0 else None)
    assert received == SELECTION


SCENARIOS = [
    ddp_equals_one_process,
    fsdp2_equals_one_process,
    mixed_precision_leaves_unselected_weights,
    a_bad_shard_stops_every_process,
    neurons_across_processes_are_refused,
    plain_state_resumes,
    flattened_state_resumes,
    full_state_resumes,
    offloaded_full_state_resumes,
    native_state_dict_resumes,
    a_whole_state_is_taken_in_shards,
    a_checkpoint_of_two_is_written,
    a_refresh_in_shards_equals_one_process,
    another_selection_keeps_the_state_of_common_neurons,
    the_selection_of_one_process_reaches_all,
    mutants_break_the_law,
    *distributed_attribution.SCENARIOS,
    *distributed_deltas.SCENARIOS,
    *starting.SCENARIOS,
    *units.SCENARIOS,
    *whitening.SCENARIOS,
]


def main() -> None:
    """Run every scenario, and write what went wrong in each."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=int(os.environ["RANK"]), world_size=2, timeout=limit)
    rank = dist.get_rank()
    outcomes = {}
    for scenario in SCENARIOS:
        try:
            scenario(rank, folder)
            outcomes[scenario.__name__] = ""
        except Exception:
            outcomes[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    (folder / f"outcomes{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
    # All is written. Threads of gloo can abort an interpreter that shuts down, so it is left at once.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
