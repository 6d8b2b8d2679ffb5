"""Choose step size and curvature scale of each method of the demo, eight tries each, on seeds the demo does not show.

A try is better when the model has kept more of the retain set (EM, mean over the seeds) at the moment the forget target
is reached; world facts are not looked at. The curvature scale says nothing to AdamW, which gets eight rates instead.
Usage: python -m benchmarks.forgetting.demo_tuning --seeds 10 11 12 13
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path

import torch

from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.unlearning.config import METHODS
from torch_simu.unlearning.demo.demo import DemoRecipe, forget_by, make_fiction, train_base

Choice = dict[str, float]


def _sophia(lowest: float) -> list[Choice]:
    # With rho 100 fewer entries are clipped, so that the same rate makes smaller steps.
    return [{"lr": lowest * factor * 2**i, "rho": rho} for rho, factor in ((0.04, 1), (100.0, 2)) for i in range(4)]


GRIDS: dict[str, list[Choice]] = {
    "fo_graddiff": [{"lr": lr} for lr in (2.5e-5, 5e-5, 7e-5, 1e-4, 1.4e-4, 2e-4, 4e-4, 8e-4)],
    "so_graddiff": _sophia(2.5e-5),
    "simu_graddiff": _sophia(5e-4),
    "random_neurons": _sophia(5e-4),
    "all_neurons": _sophia(1e-4),
    "attention_only": _sophia(1e-4),
}


def tried(seed: int) -> list[dict[str, object]]:
    """Run every choice of every method on one seed."""
    torch.set_num_threads(1)
    recipe = DemoRecipe()
    fiction = make_fiction(recipe, seed)
    base = train_base(fiction, recipe, seed, ("forget", "retain", "world"))
    selection = None
    rows = []
    for method in METHODS:
        for choice in GRIDS[method]:
            config = recipe.unlearning.updated(method=method, seed=seed, monitor_interval=1000, **choice)
            # The critical neurons do not depend on the step size: they are found once a seed.
            known = selection if method == "simu_graddiff" else None
            result, done = forget_by(base, fiction, config, selection=known)
            if method == "simu_graddiff":
                selection = done.selection
            rows.append({"seed": seed, "method": method, **choice, "reached": done.reached, **result.to_json()})
            kept = round(result.sets["retain"]["em"], 3)
            sys.stderr.write(f"{seed} {method} {choice} reached {done.reached} steps {done.steps} retain {kept}\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_tuning_cpu_202611.json")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(chain.from_iterable(pool.map(tried, options.seeds)))

    def kept(method: str, choice: Choice) -> float:
        ours = [row for row in rows if row["method"] == method and choice.items() <= row.items()]
        return sum(row["retain"]["em"] if row["reached"] else 0.0 for row in ours) / len(ours)

    means = {method: [{**choice, "retain_em": kept(method, choice)} for choice in GRIDS[method]] for method in METHODS}
    write_result(
        options.out,
        claim="demo_tuning",
        command=command(),
        environment=environment(),
        seeds=options.seeds,
        rows=rows,
        means=means,
        best={method: max(tries, key=lambda each: each["retain_em"]) for method, tries in means.items()},
        recipe=dataclasses.asdict(dataclasses.replace(DemoRecipe(), tuned={})),
    )


if __name__ == "__main__":
    main()
