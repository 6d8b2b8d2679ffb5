"""Memory and time of deltas beside frozen 8-bit and float layers.

Held: eight blocks of a float up and an 8-bit down projection under non-reentrant activation checkpointing:
bytes alive between forward and backward, with bitsandbytes' own layers and with a delta on each. Trained: gradient and
optimizer bytes by the share of neurons. Time: forward and backward of float down projections with deltas, beside a
gradient of the whole weight that is masked.
Usage: python -m benchmarks.speed.deltas [--repeats 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.optimizer.peers import state_bytes
from benchmarks.results import RESULTS, command, environment, write_result
from benchmarks.speed.live_bytes import LiveBytes
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas

D_MODEL, D_FF, BLOCKS, TOKENS = 512, 2048, 8, 4096
FRACTIONS = (0.01, 0.05, 0.2)


class Block(nn.Module):
    """A float up projection and an 8-bit down projection, behind a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D_MODEL, D_FF, bias=False).requires_grad_(False)
        self.down = bnb.nn.Linear8bitLt(D_FF, D_MODEL, bias=False, has_fp16_weights=False)
        weight = torch.randn(D_MODEL, D_FF) * 0.02
        self.down.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def selected(model: nn.Module, names: list[str], size: int, fraction: float) -> NeuronSelection:
    """The same share of each layer at random."""
    draw = torch.Generator().manual_seed(0)
    count = round(fraction * size)
    return NeuronSelection(
        {name: torch.randperm(size, generator=draw)[:count] for name in names}, dict.fromkeys(names, size)
    )


def held_rows() -> list[dict[str, object]]:
    """Bytes between forward and backward under checkpointing, in train mode and in eval mode."""
    torch.manual_seed(0)
    rows = []
    for training in (True, False):
        bare = nn.Sequential(*(Block() for _ in range(BLOCKS))).to("cpu").train(training)
        x = torch.randn(TOKENS, D_MODEL)
        for layer in ("bitsandbytes", "with deltas"):
            model = copy.deepcopy(bare)
            if layer == "with deltas":
                attach_deltas(model, selected(model, [f"{i}.down" for i in range(BLOCKS)], D_FF, 0.05))
            leaf = x.clone().requires_grad_()
            # Once before: the layers keep their codes elsewhere after their first pass.
            model(leaf[:2])
            with LiveBytes() as live:
                y = leaf
                for block in model:
                    y = checkpoint(block, y, use_reentrant=False)
                held = live.now
                y.sum().backward()
            rows.append({"what": "held", "mode": "train" if training else "eval", "layer": layer, "bytes": held})
            sys.stderr.write(f"{rows[-1]}\n")
    return rows


def trained_rows() -> list[dict[str, object]]:
    """Bytes of gradients and optimizer state by the share of neurons, over those of the selected columns."""
    rows = []
    for fraction in FRACTIONS:
        model = nn.Sequential(*(Block() for _ in range(2))).to("cpu").train()
        deltas = list(attach_deltas(model, selected(model, ["0.down", "1.down"], D_FF, fraction)).values())
        optimizer = SIMUOptimizer(deltas, lr=1e-3)
        model(torch.randn(16, D_MODEL)).sum().backward()
        optimizer.step()
        columns = 4 * 2 * round(fraction * D_FF) * D_MODEL
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        rows.append(
            {
                "what": "trained",
                "fraction": fraction,
                "bytes_of_columns": columns,
                "gradient_over_columns": gradients / columns,
                "state_over_two_columns": state_bytes(optimizer) / (2 * columns),
            }
        )
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def time_rows(repeats: int) -> list[dict[str, object]]:
    """Milliseconds of a forward and backward pass over four float layers of 1024 x 4096; the ways take turns."""
    torch.manual_seed(0)
    x = torch.randn(2048, 4096)
    rows = []
    for fraction in FRACTIONS:
        dense = nn.ModuleList(nn.Linear(4096, 1024, bias=False) for _ in range(4))
        names = [str(i) for i in range(4)]
        selection = selected(dense, names, 4096, fraction)
        masks = [selection.mask(name).float() for name in names]
        with_deltas = copy.deepcopy(dense)
        attach_deltas(with_deltas, selection)

        def run(model: nn.ModuleList, masked: bool, masks: list[Tensor] = masks) -> float:
            leaf = x.clone().requires_grad_()
            start = time.perf_counter()
            sum(layer(leaf).sum() for layer in model).backward()
            if masked:
                for layer, mask in zip(model, masks, strict=True):
                    layer.weight.grad.mul_(mask)
            seconds = time.perf_counter() - start
            model.zero_grad()
            return 1e3 * seconds

        times: dict[str, list[float]] = {"dense gradient and mask": [], "deltas": []}
        for repeat in range(repeats + 1):
            pair = {"dense gradient and mask": run(dense, True), "deltas": run(with_deltas, False)}
            for name, value in pair.items() if repeat else ():
                times[name].append(round(value, 2))
        ratios = [mine / theirs for theirs, mine in zip(*times.values(), strict=True)]
        rows.append({"what": "time", "fraction": fraction, "ratio": statistics.median(ratios), "milliseconds": times})
        sys.stderr.write(f"time {fraction:.0%}: {rows[-1]['ratio']:.3f}\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "deltas_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    write_result(
        options.out,
        force=options.force,
        claim="deltas",
        command=command(),
        environment=environment(),
        seeds=[0],
        rows=[*held_rows(), *trained_rows(), *time_rows(options.repeats)],
    )


if __name__ == "__main__":
    main()
