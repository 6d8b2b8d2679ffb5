"""What is kept at the forget target, and what relearning brings back: every method, the published and the bounded ones.

Three targets: the demo's people, TOFU rows in a Llama of 3 million weights that has memorized them, and capitals in a
model that was really pretrained, where the retain term is the divergence from the model as it was. Every contender
has three tries for its step size on a seed that is not shown; the best is the one that keeps most of the retain set
(mean probability) when the forget target is reached. Then each runs on every seed, and is attacked: AdamW on all
weights teaches a third of the forget rows again, at three rates, and the other two thirds are scored.
Usage: python -m benchmarks.forgetting.lasting --target demo --seeds 0 1 2
       python -m benchmarks.forgetting.lasting --target tofu --data tofu --work lasting --seeds 0 1 2 3 4
       python -m benchmarks.forgetting.lasting --target pretrained --work lasting --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import BATCH, Case, demo_case, pretrained_case, tofu_case
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers

Row = dict[str, Any]
BOUNDED = {"objective": "probability", "balance": True}
CONTENDERS: Mapping[str, tuple[dict[str, object], str]] = {
    "fo_graddiff": ({"method": "fo_graddiff"}, "weights"),
    "so_graddiff": ({"method": "so_graddiff"}, "weights"),
    "simu_graddiff": ({"method": "simu_graddiff"}, "columns"),
    "first order, all weights, bounded": ({"method": "fo_graddiff", **BOUNDED}, "weights"),
    "second order, all weights, bounded": ({"method": "so_graddiff", **BOUNDED}, "weights"),
    "diagonal, critical neurons, bounded": ({"method": "simu_graddiff", **BOUNDED}, "columns"),
    "simu": ({"method": "simu", "paced": False}, "shares"),
    "simu with an adversary": ({"method": "simu", "paced": False, "adversary_lr": 3e-4}, "shares"),
}
"""Name -> (choices, what its step size is one of)."""

SMALL_MODELS = {"weights": (5e-5, 1e-4, 2e-4), "columns": (1e-3, 2e-3, 4e-3), "shares": (0.04, 0.08, 0.16)}
PRETRAINED = {"weights": (5e-6, 1e-5, 2e-5), "columns": (2e-4, 4e-4, 8e-4), "shares": (1e-4, 2e-4, 4e-4)}
"""Step sizes to try."""


class Target(NamedTuple):
    """When a run ends, the step sizes to try, what all contenders share, and the attacker's choices."""

    probability: float
    rates: Mapping[str, Sequence[float]]
    shared: Mapping[str, object]
    attack: AttackConfig


SHARED = {"hessian_interval": 5, "max_steps": 300, "eval_interval": 3, "max_completeness_error": None}
FEW_ROWS = {**SHARED, "attribution_steps": 5, "attribution_rows": 60}
# A whole pass through the pretrained model takes seconds.
PLAIN = {**SHARED, "attribution_steps": 3, "attribution_rows": 30, "max_steps": 100, "eval_interval": 2}
ATTACK = AttackConfig(rates=(2e-4, 5e-4, 1e-3), steps=40, interval=10, batch_size=10, eval_batch_size=BATCH)
GENTLE = AttackConfig(rates=(1e-5, 3e-5), steps=30, interval=6, batch_size=10, eval_batch_size=BATCH)
TARGETS = {
    "demo": Target(0.1, SMALL_MODELS, FEW_ROWS, ATTACK),
    "tofu": Target(0.05, SMALL_MODELS, FEW_ROWS, ATTACK),
    "pretrained": Target(0.05, PRETRAINED, {**PLAIN, "retain_term": "kl"}, GENTLE),
}
TUNING_SEED = 100


def measured(model: PreTrainedModel, case: Case) -> dict[str, object]:
    """What a model knows of each set: answers that are right as a whole, EM, ES, probability, and how much is kept."""
    found: dict[str, object] = {}
    for name, examples in case.sets.items():
        scores = score_answers(model, examples, batch_size=BATCH)
        found[name] = {key: sum(scores[key]) / len(examples) for key in ("em", "es", "probability")}
        found[name]["whole"] = sum(each == 1.0 for each in scores["em"]) / len(examples)
        found[name]["kept"] = kept(scores["probability"], case.known[name])
    return found


def kept(after: Sequence[float], before: Sequence[float]) -> float:
    """The mean over rows of the probability beside what it was, of which more is no gain."""
    return mean(min(1.0, new / old) for new, old in zip(after, before, strict=True))


def attacked(model: PreTrainedModel, case: Case, config: AttackConfig) -> dict[str, float]:
    """The worst that relearning brings back of the rows that it does not teach."""
    result = attack_model(model, case.sets["forget"], attacks=["relearn"], config=config)["relearn"]
    return {key: result.worst[key] for key in ("probability", "es")}


def run(case: Case, target: Target, seed: int, choices: Mapping[str, object]) -> tuple[PreTrainedModel, Row]:
    """A copy of the model that forgot, and how it went."""
    model, size = copy.deepcopy(case.model), case.batch_size
    sizes = dict.fromkeys(("forget_batch_size", "retain_batch_size", "hessian_batch_size"), size)
    config = UnlearnConfig(seed=seed, forget_target=target.probability, **{**target.shared, **sizes, **choices})
    done = unlearn(model, case.sets["forget"], case.sets["retain"], config=config)
    return model, {"steps": done.steps, "reached": done.reached, "seconds": round(done.seconds, 1)}


def tuned(case: Case, target: Target, name: str) -> tuple[float, list[Row]]:
    """The step size that keeps most of the retain set on the tuning seed, and all tries."""
    choices, unit = CONTENDERS[name]
    tries = []
    for lr in target.rates[unit]:
        model, row = run(case, target, TUNING_SEED, {**choices, "lr": lr})
        found = score_answers(model, case.sets["retain"], batch_size=BATCH)["probability"]
        tries.append({"lr": lr, **row, "retain_kept": kept(found, case.known["retain"])})
        sys.stderr.write(f"tuning {name}: {tries[-1]}\n")
    best = max(tries, key=lambda each: (each["reached"], each.get("retain_kept", each.get("retain_probability"))))
    return best["lr"], tries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--data", type=Path, help="folder of TOFU's rows")
    parser.add_argument("--work", type=Path, help="folder for the models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="result file; what it holds is not run again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = options.out or RESULTS / f"lasting_{options.target}_cpu_202611.json"
    target = TARGETS[options.target]
    case_of: Callable[[int], Case] = {
        "demo": demo_case,
        "tofu": lambda _: tofu_case(options.data, options.work),
        "pretrained": lambda seed: pretrained_case(options.work, seed),
    }[options.target]
    result = json.loads(out.read_text()) if out.exists() else {"rows": [], "tries": {}, "lr": {}}

    def save() -> None:
        write_result(
            out,
            force=True,
            claim="lasting",
            target=options.target,
            command=command(),
            environment=environment(),
            seeds=sorted({row["seed"] for row in result["rows"]}),
            rows=result["rows"],
            tries=result["tries"],
            lr=result["lr"],
        )

    for name in options.contenders:
        if name not in result["lr"]:
            result["lr"][name], result["tries"][name] = tuned(case_of(TUNING_SEED), target, name)
            save()
    for seed in options.seeds:
        case = case_of(seed)
        for name in ("before", *(["retrained"] if case.retrained else []), *options.contenders):
            if any((row["seed"], row["method"]) == (seed, name) for row in result["rows"]):
                continue
            started = time.perf_counter()
            if name in CONTENDERS:
                model, row = run(case, target, seed, {**CONTENDERS[name][0], "lr": result["lr"][name]})
            else:
                model, row = case.model if name == "before" else case.retrained, {}
            row = {"seed": seed, "method": name, **row, **measured(model, case)}
            row["back"] = attacked(model, case, target.attack)
            result["rows"].append(row)
            save()
            sys.stderr.write(f"{json.dumps(row)} {time.perf_counter() - started:.0f} s\n")


if __name__ == "__main__":
    main()
