"""What two processes do together; run by test_distributed.py, which asks for each outcome."""

from __future__ import annotations

import copy
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
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from tests import mutants
from tests.attribution import distributed_attribution
from tests.deltas import distributed_deltas
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.trainer.refresh import CurvatureRefresh

WIDTH, NEURONS, CLASSES = 6, 7, 5
SELECTION = NeuronSelection({"2": [0, 3, 6]}, {"2": NEURONS})


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """An MLP whose output layer has five rows, which two processes cannot share evenly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.Tanh(), nn.Linear(NEURONS, CLASSES)).to(dtype)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows and their labels."""
    draw = torch.Generator().manual_seed(step)
    return torch.randn(8, WIDTH, generator=draw), torch.randint(0, CLASSES, (8,), generator=draw)


def tiny_llama() -> LlamaForCausalLM:
    """A model of one layer."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def make_optimizer(model: nn.Module, implementation: type[SIMUOptimizer] = SIMUOptimizer, **options) -> SIMUOptimizer:
    """Selected neurons of the last layer, and the first layer whole."""
    weight, first = model.get_parameter("2.weight"), model.get_parameter("0.weight")
    model.requires_grad_(False)
    groups = [
        {"params": [weight], "neurons": [SELECTION["2"].tolist()]},
        {"params": [first], "neurons": [None], "weight_decay": 0.1},
    ]
    for group in groups:
        group["params"][0].requires_grad_(True)
    return implementation(groups, lr=0.02, rho=1.0, hessian_interval=2, **options)


def train(model: nn.Module, optimizer: SIMUOptimizer, start: int, stop: int, part: slice = slice(None)) -> None:
    """Steps on a part of each batch, with the refreshes; the labels of a refresh are fixed, not sampled."""
    for step in range(start, stop):
        inputs, labels = batch(step)
        functional.cross_entropy(model(inputs[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.hessian_due:
            inputs, labels = batch(1000 + step)
            functional.cross_entropy(model(inputs[part]), labels[part]).backward()
            optimizer.update_hessian(len(inputs))
            optimizer.zero_grad()


def half(rank: int) -> slice:
    """The rows of a process."""
    return slice(4 * rank, 4 * rank + 4)


def one_process(steps: int = 5) -> tuple[nn.Module, SIMUOptimizer]:
    """The same run in one process."""
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, steps)
    return model, optimizer


def sharded(seed: int = 0, **options) -> nn.Module:
    """The model in two shards."""
    model = make_model(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **options)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(model: nn.Module, optimizer: SIMUOptimizer, other: nn.Module, theirs: SIMUOptimizer, **close) -> None:
    """Weights and state are equal, within float tolerance or bit for bit."""
    close = close or {"rtol": 1e-5, "atol": 1e-6}
    for (name, param), (_, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(whole(param.detach()), whole(expected.detach()), **close, msg=name)
        for key, value in theirs.state.get(expected, {}).items():
            torch.testing.assert_close(whole(optimizer.state[param][key]), whole(value), **close, msg=f"{name} {key}")


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
