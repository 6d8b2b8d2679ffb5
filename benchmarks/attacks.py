"""What each attack brings back of the demo's forget set, after the default, its rivals, controls and the paper's.

Every model is attacked by all of `torch_simu.unlearning.attack` but fine-tuning on plain text, of which these models
know none: relearning by AdamW on all weights or by LoRA matrices, fine-tuning on retain rows, rounding to 8 and 4 bits,
and forget rows before each prompt. Of each attack the worst over its rates and steps counts.
Usage: python -m benchmarks.attacks --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case, demo_case
from benchmarks.forgetting.harness.contenders import CONTENDERS, CONTROLS, DEFAULT, RIVALS
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.targets import TARGETS
from benchmarks.forgetting.lasting import UNCHANGED, configured
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.unlearning.attack.attack import attack_model

Row = dict[str, Any]
METHODS = (
    *UNCHANGED,
    DEFAULT,
    "simu with an adversary of all weights",
    "simu, rehearsed, with an adversary",
    *RIVALS,
    "simu_graddiff",
    *CONTROLS,
)


def unlearned(case: Case, seed: int, name: str) -> PreTrainedModel:
    """The model that a method leaves."""
    if name in UNCHANGED:
        model = case.model if name == "before" else case.retrained
        assert model is not None
        return model
    target, contender = TARGETS["demo"], CONTENDERS[name]
    config = configured(case, target, seed, contender, lr=target.rates[contender.unit][0])
    return forgotten(case, contender, config, traced=False)[0]


def attacked(case: Case, seed: int, name: str) -> Iterator[Row]:
    """A row for no attack, and one for each."""
    model, sets = unlearned(case, seed, name), case.sets
    found = attack_model(model, sets["forget"], sets["retain"], config=TARGETS["demo"].attack)
    before = next(iter(found.values())).before
    yield {"seed": seed, "method": name, "attack": "none", "probability": before.probability, "es": before.es}
    for attack, result in found.items():
        yield {"seed": seed, "method": name, "attack": attack, **result.worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "attacks_cpu_202611.json", help="goes on from its rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in options.seeds:
        for name in METHODS:
            if any((row["seed"], row["method"]) == (seed, name) for row in rows):
                continue
            rows += attacked(demo_case(seed), seed, name)
            seeds = sorted({row["seed"] for row in rows})
            content = {"command": command(), "environment": environment(), "seeds": seeds, "rows": rows}
            write_result(options.out, force=True, claim="attacks", **content)
            sys.stderr.write(f"seed {seed}, {name}: {rows[-6:]}\n")


if __name__ == "__main__":
    main()
