"""Steps, attribution and training at the shapes of models of 1 and 7 billion parameters."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.optimizer import memory, step
from benchmarks.optimizer.contenders import compact_compiled, ours_compiled
from benchmarks.optimizer.peers import PEERS, SIZES, Problem, Step, ours_fused
from benchmarks.speed.live_bytes import LiveBytes
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, attribute_neurons

Row = dict[str, object]
OURS = ("simu", "simu_compact")
BESIDE = ("dense_masked_sophia", "adamw_fused")
FRACTION = 0.05
SHAPES = {"1b": "olmo_1b", "7b": "llama2_7b"}
CONFIGS = {
    "1b": LlamaConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16
    ),
    "7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "small": LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
}


def steps(size: str, device: str, small: bool) -> list[Row]:
    """Milliseconds of a step of each optimizer on all down projections, and bytes of state and peak of ours."""
    shape = "demo" if small else SHAPES[size]
    options = argparse.Namespace(device=device, dtype="float32", repeats=3 if small else 10, threads=1)
    rows: list[Row] = []
    for peer in (*OURS, *BESIDE, "limits"):
        for label, times in step.alone(shape, FRACTION, peer, options).items():
            median = sorted(times)[len(times) // 2]
            rows.append({"what": "step", "size": size, "optimizer": label, "milliseconds": times, "median": median})
        if device == "cuda":
            torch.cuda.empty_cache()
    for peer in OURS:
        found = memory.alone(shape, FRACTION, peer, device)
        rows.append({"what": "memory", "size": size, "optimizer": peer, **found})
    assert {row["optimizer"] for row in rows} >= set(OURS) <= PEERS.keys()
    return rows


def fused(size: str, device: str, small: bool) -> list[Row]:
    """Our step by one kernel a weight, beside the eager one; of a processor there is none."""
    return by_triton(size, device, small, {"simu_fused": lambda problem: ours_fused(problem).step})


def compiled(size: str, device: str, small: bool) -> list[Row]:
    """Our steps, each compiled into one graph."""
    return by_triton(size, device, small, {"simu_compiled": ours_compiled, "simu_compact_compiled": compact_compiled})


def by_triton(size: str, device: str, small: bool, made: Mapping[str, Callable[[Problem], Step]]) -> list[Row]:
    """Milliseconds of steps whose kernels Triton makes, on the problem of `steps`."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return []
    shape = SIZES["demo" if small else SHAPES[size]]
    rows: list[Row] = []
    for name, make in made.items():
        problem = Problem(shape, shape.layers, FRACTION, device, torch.float32)
        times = step.timed(make(problem), 3 if small else 10, device)
        median = sorted(times)[len(times) // 2]
        rows.append({"what": "step", "size": size, "optimizer": name, "milliseconds": times, "median": median})
        del problem
        torch.cuda.empty_cache()
    return rows


def model_of(size: str, device: str, small: bool) -> LlamaForCausalLM:
    """A model with random weights, in bfloat16 on a GPU."""
    config = CONFIGS["small" if small else size]
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def batch_of(model: LlamaForCausalLM, rows: int, tokens: int, scored: int) -> dict[str, Tensor]:
    """Random rows, of which the last tokens are scored."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=draw).to(model.device)
    labels = ids.clone()
    labels[:, : tokens - scored] = -100
    return {"input_ids": ids, "labels": labels}


def measured(device: str, call: Callable[[], object]) -> Row:
    """Seconds of a call, and the bytes that it held at most."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated() - before, "held_bytes": before}
    start = time.perf_counter()
    with LiveBytes() as live:
        call()
    return {"seconds": time.perf_counter() - start, "peak_bytes": live.peak}


def attribution(size: str, device: str, small: bool) -> list[Row]:
    """One answer of 32 tokens behind a question of 96, by ten path points, the second time."""
    model = model_of(size, device, small).requires_grad_(False)
    tokens, scored = (12, 4) if small else (128, 32)
    batch = batch_of(model, 1, tokens, scored)
    call = functools.partial(attribute_neurons, model, [batch], steps=10, method="packed", max_completeness_error=None)
    call()
    common = {"what": "attribution", "size": size, "tokens": tokens, "scored": scored, "steps": 10}
    return [{**common, "repeat": repeat, **measured(device, call)} for repeat in range(2)]


def training(size: str, device: str, small: bool) -> list[Row]:
    """Forward, backward and step with deltas on 5 % of the neurons of each layer, without checkpointing."""
    model = model_of(size, device, small).requires_grad_(False)
    selection = NeuronSelection.random(model, FRACTION, torch.Generator().manual_seed(0))
    deltas = list(attach_deltas(model, selection).values())
    optimizer = SIMUOptimizer(deltas, lr=1e-5, hessian_interval=1000)
    rows, tokens = (2, 12) if small else (4, 256)
    batch = batch_of(model.train(), rows, tokens, tokens // 2)

    def once() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    once()
    optimizer.update_hessian(1)
    common = {"what": "training", "size": size, "rows": rows, "tokens": tokens}
    state = sum(value.nbytes for kept in optimizer.state.values() for value in kept.values() if value.dim())
    common |= {"trained": sum(delta.numel() for delta in deltas), "state_bytes": state}
    return [{**common, "repeat": repeat, **measured(device, once)} for repeat in range(3)]


TIMINGS: Mapping[str, Callable[[str, bool], list[Row]]] = MappingProxyType(
    {
        f"{part.__name__}_{size}": functools.partial(part, size)
        for size in ("7b", "1b")
        for part in (steps, fused, compiled, attribution, training)
    }
)
"""Part -> what measures it, called with the device and whether small shapes are asked for."""
