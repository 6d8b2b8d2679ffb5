"""What the processes train: a small network in one piece or in shards, and when two of them are the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from torch_simu import NeuronSelection, SIMUOptimizer

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
