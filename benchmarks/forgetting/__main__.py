"""All cells of the harness, one after the other: every target in every architecture, every contender, every seed.

What a result file holds is not run again, so that this goes on where it was stopped. A row takes a minute or two of one
core, ten to twenty on the pretrained model: what the claim needs takes hours of two cores, all contenders of all cells
take days. Name cells, contenders or seeds to do a part; on a GPU, name it, and a folder for its results.
Usage: python -m benchmarks.forgetting --data data --work lasting
       python -m benchmarks.forgetting --data data --work lasting --cells lume tofu_gpt2 --seeds 0 1
       python -m benchmarks.forgetting --data data --work lasting --device cuda --out results
       python -m benchmarks.forgetting --quick --out results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.forgetting.harness.contenders import CONTENDERS, CONTROLS, DEFAULT, RIVALS
from benchmarks.forgetting.harness.shapes import SHAPES
from benchmarks.forgetting.lasting import Cell, file_of
from benchmarks.results import RESULTS

SEEDS = (0, 1, 2, 3, 4)
CELLS: Mapping[str, tuple[str, str, Sequence[int]]] = {
    "lume": ("lume", "llama", SEEDS),
    "tofu": ("tofu", "llama", SEEDS),
    "demo": ("demo", "llama", SEEDS),
    **{f"{target}_{shape}": (target, shape, SEEDS) for shape in ("gpt2", "olmo2") for target in ("tofu", "lume")},
    "pretrained": ("pretrained", "llama", SEEDS[:3]),
}
"""Name -> (target, architecture, seeds)."""
CLAIMED = (DEFAULT, *RIVALS, *CONTROLS)
"""The contenders that the claim is about, which come first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME", help=", ".join(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of five, three on the pretrained model")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--data", type=Path, help="folder with tofu and lume, the rows of the two")
    parser.add_argument("--work", type=Path, help="folder for the models")
    parser.add_argument("--quick", action="store_true", help="one seed of a tiny model of each architecture: a check")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the models are: cpu, cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cells = {shape: ("quick", shape, (0,)) for shape in SHAPES} if options.quick else {}
    cells = cells or {name: CELLS[name] for name in options.cells}
    rest = tuple(name for name in CONTENDERS if name not in CLAIMED)
    # What the claim needs comes first everywhere.
    for contenders in [options.contenders] if options.contenders else [CLAIMED] if options.quick else [CLAIMED, rest]:
        for name, (target, shape, seeds) in cells.items():
            sys.stderr.write(f"{name}\n")
            out = options.out / file_of(target, shape)
            cell = Cell(target, shape, options.data, options.work, out, device=options.device)
            cell.run(contenders, options.seeds or seeds)


if __name__ == "__main__":
    main()
