"""Choose the learning rate of each method of the demo from one grid of equal size, on seeds the demo does not show.

A rate is better when the model has kept more of the retain set (EM) at the moment the forget target is reached; world
facts are not looked at. Usage: python benchmarks/demo_tuning.py --seeds 10 11
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from results import environment, write_result

from torch_simu.unlearning.config import METHODS
from torch_simu.unlearning.demo import DemoRecipe, forget_by, make_fiction, train_base

GRIDS = {
    "fo_graddiff": (5e-5, 1e-4, 2e-4, 4e-4),
    "so_graddiff": (5e-5, 1e-4, 2e-4, 4e-4),
    "simu_graddiff": (3e-4, 6e-4, 1.2e-3, 2.4e-3),
    "random_neurons": (3e-4, 6e-4, 1.2e-3, 2.4e-3),
    "all_neurons": (2e-4, 4e-4, 8e-4, 1.6e-3),
    "attention_only": (1e-4, 2e-4, 4e-4, 8e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_tuning_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = DemoRecipe()
    rows = []
    for seed in options.seeds:
        fiction = make_fiction(recipe, seed)
        base = train_base(fiction, recipe, seed, ("forget", "retain", "world"))
        selection = None
        for method in METHODS:
            for lr in GRIDS[method]:
                config = recipe.unlearning.updated(method=method, lr=lr, seed=seed, monitor_interval=1000)
                # The critical neurons do not depend on the rate: they are found once a seed.
                known = selection if method == "simu_graddiff" else None
                result, done = forget_by(base, fiction, config, selection=known)
                if method == "simu_graddiff":
                    selection = done.selection
                rows.append({"seed": seed, "method": method, "lr": lr, "reached": done.reached, **result.to_json()})
                kept = {name: round(result.sets[name]["em"], 3) for name in ("retain", "world")}
                sys.stderr.write(f"{seed} {method} {lr:g} reached {done.reached} steps {done.steps} {kept}\n")
    best = {}
    for method in METHODS:
        means = {
            lr: sum(
                row["retain"]["em"] if row["reached"] else 0.0
                for row in rows
                if (row["method"], row["lr"]) == (method, lr)
            )
            for lr in GRIDS[method]
        }
        best[method] = max(means, key=means.get)
    write_result(
        options.out,
        claim="The demo's learning rates: for each method the best of four by retain EM at the forget target.",
        command=f"python benchmarks/demo_tuning.py --seeds {' '.join(map(str, options.seeds))}",
        environment=environment(),
        seeds=options.seeds,
        rows=rows,
        best=best,
        recipe=dataclasses.asdict(dataclasses.replace(recipe, rates={})),
    )


if __name__ == "__main__":
    main()
