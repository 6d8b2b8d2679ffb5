"""Run the demo on several seeds and record every method's row.

Usage: python -m benchmarks.forgetting.demo_seeds --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.unlearning.demo.demo import DemoRecipe, DemoResult, run_demo


def curves_of(result: DemoResult) -> dict[str, Any]:
    """What the plot of a demo shows: of each method the points at which the sets were measured."""
    keys = ("step", "forget_probability", "monitor")
    logs = {
        method: [{key: record[key] for key in keys} for record in log if "monitor" in record]
        for method, log in result.logs.items()
    }
    return {"start": result.start, "target": result.target, "logs": logs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_cpu_202611.json")
    parser.add_argument("--topic-share", type=float, help="see make_corpus; at 0.5 the forget people have no topic")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, seconds, settings, curves = [], {}, {}, {}
    for seed in options.seeds:
        started = time.perf_counter()
        recipe = DemoRecipe() if options.topic_share is None else DemoRecipe(topic_share=options.topic_share)
        result = run_demo(seed, recipe=recipe)
        seconds[seed] = round(time.perf_counter() - started, 1)
        settings = dict(result.report.settings)
        for method, row in result.report.methods.items():
            rows.append({"seed": seed, "method": method, **row.to_json()})
            kept = {name: round(measures["em"], 3) for name, measures in row.sets.items()}
            sys.stderr.write(f"{seed} {method} {kept} steps {row.steps}\n")
        sys.stderr.write(f"seed {seed}: {seconds[seed]} s\n")
        curves = curves or curves_of(result)
        # After every seed, so that a run that is stopped leaves what it has.
        write_result(
            options.out,
            force=seed != options.seeds[0],
            claim="demo",
            command=command(),
            environment=environment(),
            seeds=list(seconds),
            rows=rows,
            seconds=seconds,
            settings=settings,
            curves=curves,
        )


if __name__ == "__main__":
    main()
