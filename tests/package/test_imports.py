"""Importing the package is quiet, and loads itself and what it names: the rest of torch waits until it is needed."""

from __future__ import annotations

import subprocess
import sys

from tests.rules.sources import ROOT

LOADED = """
import sys
import torch
before = set(sys.modules)
import torch_simu
print(*sorted(set(sys.modules) - before))
"""


def run(program: str, *options: str) -> str:
    call = [sys.executable, *options, "-c", program]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_warns_of_nothing_and_loads_nothing_large_beside_torch() -> None:
    loaded = run(LOADED, "-W", "error").split()
    assert "torch_simu.optimizer.entries" in loaded
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names <= {
        *("torch", "torch_simu", "einops", "numpy", "safetensors"),
    }
    assert not [name for name in loaded if name.startswith(("torch.distributed.tensor", "torch.fx", "torch._dynamo"))]


def test_a_distributed_tensor_is_known_whenever_its_module_was_loaded() -> None:
    made = """
import torch, torch_simu
from torch_simu.layers.dtensors import is_dtensor, shard_dims
plain = torch.ones(4, 2)
before = is_dtensor(plain)
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1, 1))
spread = distribute_tensor(plain, mesh, [Replicate(), Shard(1)])
print(before, is_dtensor(plain), is_dtensor(spread), is_dtensor(torch.nn.Parameter(spread)), *shard_dims(spread))
dist.destroy_process_group()
"""
    assert run(made).split() == ["False", "False", "True", "True", "None", "1"]
