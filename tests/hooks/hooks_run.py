"""What two processes capture together, wrapped in DDP or sharded by FSDP2; started by test_hooks_storage.py."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.hooks.hooked_network import PLAIN, Case, loss_of, naive_capture
from torch_simu.hooks import register_neuron_hooks

Wrap = Callable[[nn.Module], nn.Module]
CASES = [PLAIN, replace(PLAIN, keyword=True, checkpointing="non_reentrant"), replace(PLAIN, d_ff=4, twice=False)]


def sharded(net: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """The down projection and the rest in two shards each."""
    options = {"mesh": init_device_mesh("cpu", (2,)), **({"mp_policy": policy} if policy else {})}
    fully_shard(net.down, **options)
    return fully_shard(net, **options)


def captured(rank: int, case: Case, wrap: Wrap, reduce: str | None) -> Tensor:
    """What the hooks of this process have after a forward and a backward of its batch, added up if it adds up."""
    model = wrap(case.network())
    with register_neuron_hooks(model, "down", reduce=reduce) as hooks:
        loss_of(model(case.inputs(rank))).backward()
        if reduce is not None:
            hooks.all_reduce_()
    return next(iter(hooks.values()))


def assert_equal_to_one_process(rank: int, wrap: Wrap) -> None:
    """Every process captures its own batch exactly, and the sum is that of one process over both batches."""
    # All collectives run before the first assertion, because a process that fails would leave the other waiting.
    found = [(case, captured(rank, case, wrap, None), captured(rank, case, wrap, "attribution")) for case in CASES]
    for case, own, total in found:
        batches = [torch.stack(naive_capture(case, number)) for number in (0, 1)]
        assert torch.equal(own, batches[rank])
        expected = sum((activation * gradient).sum(0) for activation, gradient in batches)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def ddp_equals_one_process(rank: int) -> None:
    assert_equal_to_one_process(rank, DistributedDataParallel)


def fsdp2_equals_one_process(rank: int) -> None:
    assert_equal_to_one_process(rank, sharded)


def fsdp2_captures_in_the_dtype_of_the_layer(rank: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    found = captured(rank, PLAIN, lambda net: sharded(net, policy), None)
    net = PLAIN.network().to(torch.bfloat16)
    expected = naive_capture(replace(PLAIN, dtype=torch.bfloat16), rank, net)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.stack(expected))


def hooks_are_gone_from_a_sharded_model(rank: int) -> None:
    model = sharded(PLAIN.network())
    before = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    with register_neuron_hooks(model):
        loss_of(model(PLAIN.inputs(rank))).backward()
    after = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    grads = [param.grad.full_tensor() for param in model.parameters()]
    assert after == before
    model.zero_grad()
    loss_of(model(PLAIN.inputs(rank))).backward()
    again = [param.grad.full_tensor() for param in model.parameters()]
    assert all(torch.equal(*pair) for pair in zip(grads, again, strict=True))


SCENARIOS = [
    ddp_equals_one_process,
    fsdp2_equals_one_process,
    fsdp2_captures_in_the_dtype_of_the_layer,
    hooks_are_gone_from_a_sharded_model,
]


def run(rank: int, folder: str) -> None:
    """Run every scenario in one of two processes, and write what went wrong in each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outcomes = {}
    for scenario in SCENARIOS:
        try:
            scenario(rank)
            outcomes[scenario.__name__] = ""
        except Exception:
            outcomes[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"outcomes{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
    # All is written. Threads of gloo can abort an interpreter that shuts down, so it is left at once.
    os._exit(0)
