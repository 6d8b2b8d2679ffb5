"""Capture, waiting and peak memory on CUDA; elsewhere what stands for them, so that their tests run there too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.speed.live_bytes import LiveBytes
from tests.fake_cuda.tape import Tape


def recorded(device: torch.device, call: Callable[[], object]) -> Callable[[], object]:
    """Make a call once, captured in a CUDA graph; returns what replays it."""
    if device.type != "cuda":
        tape = Tape()
        with tape:
            call()
        return tape.replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    # What is captured is not run.
    graph.replay()
    return graph.replay


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Fail on CUDA where the processor waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Bytes that a call held at most over those held before: of the allocator, or of the storages that it made."""
    if device.type != "cuda":
        with LiveBytes() as live:
            call()
        return live.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
