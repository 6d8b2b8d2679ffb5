"""Time one step of SIMUOptimizer and of its peers on down projections with dense gradients.

Every peer runs in a process of its own: what an earlier one left in the allocator changes the time of large temporary
tensors two- to threefold.
Usage: python -m benchmarks.optimizer.step [--sizes bar demo olmo_1b llama2_7b] [--repeats 20] [--threads 1]
On CUDA (--device cuda) steps are timed by events, and whole models are taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.optimizer.peers import FOREIGN, PEERS, SIZES, Problem, Step, limits
from benchmarks.results import RESULTS, command, environment, write_result


def timed(step: Step, repeats: int, device: str) -> list[float]:
    """Milliseconds of each repeat, after two that warm up."""
    milliseconds = []
    for repeat in range(repeats + 2):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            passed = start.elapsed_time(end)
        else:
            before = time.perf_counter()
            step()
            passed = 1e3 * (time.perf_counter() - before)
        if repeat >= 2:
            milliseconds.append(round(passed, 4))
    return milliseconds


def alone(name: str, fraction: float, peer: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Measure one peer, or the limits, in this process: label -> milliseconds of each repeat."""
    torch.set_num_threads(options.threads)
    size = SIZES[name]
    layers = size.layers if options.device == "cuda" else size.cpu_layers
    problem = Problem(size, layers, fraction, options.device, getattr(torch, options.dtype))
    steps = limits(problem) if peer == "limits" else {peer: PEERS[peer](problem).step}
    return {label: timed(step, options.repeats, options.device) for label, step in steps.items()}


def measured(name: str, fraction: float, options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for every peer and limit on one size."""
    size = SIZES[name]
    layers = size.layers if options.device == "cuda" else size.cpu_layers
    common = {"size": name, "layers": layers, "d_model": size.d_model, "d_ff": size.d_ff, "fraction": fraction}
    shared = [f"--{key}={getattr(options, key)}" for key in ("device", "dtype", "repeats", "threads")]
    rows = []
    for peer in (*PEERS, "limits"):
        call = [sys.executable, "-m", __spec__.name, *shared, "--alone", name, str(fraction), peer]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            # Some peers do not run everywhere, which is a result; what is ours must.
            if peer not in FOREIGN:
                raise SystemExit(done.stderr)
            rows.append({**common, "optimizer": peer, "does_not_run": done.stderr.strip().splitlines()[-1]})
            sys.stderr.write(f"{name} {peer}: does not run: {rows[-1]['does_not_run']}\n")
            continue
        for label, times in json.loads(done.stdout).items():
            rows.append({**common, "optimizer": label, "milliseconds": times, "median": statistics.median(times)})
            sys.stderr.write(f"{name} {fraction:.0%} {label}: {rows[-1]['median']:.2f} ms\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.05, 0.2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        name, fraction, peer = options.alone
        sys.stdout.write(json.dumps(alone(name, float(fraction), peer, options)))
        return
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.sizes:
        for fraction in options.fractions:
            rows += measured(name, fraction, options)
    medians = {(row["size"], row["fraction"], row["optimizer"]): row["median"] for row in rows if "median" in row}
    ratios = [
        {"size": size, "fraction": fraction, "optimizer": label, "over": ours, "ratio": value / medians[key]}
        for (size, fraction, label), value in medians.items()
        for ours in ("simu", "simu_compact")
        if (key := (size, fraction, ours)) in medians and label != ours
    ]
    out = options.out or RESULTS / f"optimizer_step_{options.device}_202611.json"
    write_result(
        out,
        force=options.force,
        claim="optimizer_step",
        command=command(),
        environment=environment(),
        seeds=[0],
        rows=rows,
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
