"""What else was tried so that forgetting lasts or costs less, on the demo.

One thing is changed at a time of the method by covariances of the forget set, which the default was before.

Each variant runs to the same forget target at the same step size, where its name says nothing else, and is attacked as
in `forgetting.lasting`. What it changes is in `benchmarks.forgetting.tried`.
Usage: python -m benchmarks.forgetting.variants --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.forgetting.cases import demo_case
from benchmarks.forgetting.harness.measures import measured
from benchmarks.forgetting.lasting import attacked
from benchmarks.forgetting.tried.configured import TARGET
from benchmarks.forgetting.tried.table import VARIANTS
from benchmarks.results import RESULTS, command, environment, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS / "variants_cpu_202611.json", help="goes on from its rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in options.seeds:
        for name in options.variants:
            if any((row["seed"], row["variant"]) == (seed, name) for row in rows):
                continue
            case = demo_case(seed)
            model, row = VARIANTS[name](case, seed)
            row = {"seed": seed, "variant": name, **row, **measured(model, case)}
            rows.append({**row, "back": attacked(model, case, TARGET.attack)})
            seeds = sorted({row["seed"] for row in rows})
            content = {"command": command(), "environment": environment(), "seeds": seeds, "rows": rows}
            write_result(options.out, force=True, claim="variants", **content)
            sys.stderr.write(f"seed {seed}, {name}: {rows[-1]['world']['whole']:.3f} {rows[-1]['back']}\n")


if __name__ == "__main__":
    main()
