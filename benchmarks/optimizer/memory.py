"""Measure the memory of SIMUOptimizer and of its peers: bytes of state, and the peak of a step.

Every peer runs in a process of its own, whose peak is read from the system (or from the device's allocator).
Usage: python -m benchmarks.optimizer.memory [--sizes bar demo olmo_1b llama2_7b]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.optimizer.peers import PEERS, SIZES, Problem, state_bytes
from benchmarks.results import RESULTS, command, environment, write_result


def resident(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(steps: Callable[[], None], device: str) -> int:
    """Bytes held at most during some steps, over those held before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps()
        return torch.cuda.max_memory_allocated() - before
    # Free memory goes back to the system, and Linux starts its record of the largest size anew.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    steps()
    return resident("VmHWM") - before


def alone(name: str, fraction: float, peer: str, device: str) -> dict[str, object]:
    """Measure one peer, in this process."""
    size = SIZES[name]
    layers = size.layers if device == "cuda" else size.cpu_layers
    problem = Problem(size, layers, fraction, device, torch.float32)
    # Libraries allocate at their first use, which is not the step's.
    small = Problem(SIZES["demo"], 1, 0.5, device, torch.float32)
    PEERS[peer](small).step()
    kept = []

    def steps() -> None:
        kept.append(PEERS[peer](problem))
        for _ in range(3):
            kept[0].step()

    peak = peak_of(steps, device)
    return {
        "state_bytes": state_bytes(kept[0]),
        "bytes_of_two_compact_moments": 2 * 4 * problem.selected,
        "peak_over_weights_and_gradients": peak,
        "bytes_of_weights": sum(weight.numel() * weight.element_size() for weight in problem.weights),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.05, 0.2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        name, fraction, peer = options.alone
        sys.stdout.write(json.dumps(alone(name, float(fraction), peer, options.device)))
        return
    rows = []
    for name in options.sizes:
        for fraction in options.fractions:
            for peer in PEERS:
                call = [
                    sys.executable,
                    "-m",
                    __spec__.name,
                    "--device",
                    options.device,
                    "--alone",
                    name,
                    str(fraction),
                    peer,
                ]
                done = subprocess.run(call, capture_output=True, text=True, check=False)
                row = {"size": name, "fraction": fraction, "optimizer": peer}
                if done.returncode:
                    row["does_not_run"] = done.stderr.strip().splitlines()[-1]
                else:
                    row |= json.loads(done.stdout)
                    row["state_ratio"] = round(row["state_bytes"] / row["bytes_of_two_compact_moments"], 4)
                rows.append(row)
                sys.stderr.write(f"{row}\n")
    out = options.out or RESULTS / f"optimizer_memory_{options.device}_202611.json"
    write_result(
        out,
        force=options.force,
        claim="optimizer_memory",
        command=command(),
        environment=environment(),
        seeds=[0],
        rows=rows,
    )


if __name__ == "__main__":
    main()
