"""What is kept at the forget target, and what relearning brings back, of one target in one architecture: a cell.

The targets are the demo's people, rows of TOFU and of LUME in models of three million weights that have memorized them,
and capitals in a model that was really pretrained, where the retain term is the divergence from the model as it was.
No step size is tried: each run begins with a hundredth of its largest and is paced, as the default is, so that all
take about as many steps. With `--tuned` every contender has three tries for a fixed one on a seed that is not shown,
and the best is that which keeps most of the retain set (mean probability) when the forget target is reached. Each
contender runs on every seed, is measured, and is attacked: AdamW on all weights teaches a third of the forget rows
again, at several rates, and the others are scored.
Usage: python -m benchmarks.forgetting.lasting --target demo --seeds 0 1 2
       python -m benchmarks.forgetting.lasting --target tofu --shape gpt2 --data data --work lasting
       python -m benchmarks.forgetting.lasting --target lume --tuned --data data --work lasting
       python -m benchmarks.forgetting.lasting --target pretrained --work lasting --seeds 0 1 2
All cells: python -m benchmarks.forgetting
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import BATCH, Case
from benchmarks.forgetting.harness.contenders import CONTENDERS, Contender
from benchmarks.forgetting.harness.measures import kept, measured
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.shapes import SHAPES
from benchmarks.forgetting.harness.targets import SHAPED, TARGETS, TUNABLE, Target, case_of, tuned
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.attack.result import AttackResult
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.metrics.scoring import score_answers

Row = dict[str, Any]
TUNING_SEED = 100
UNCHANGED = ("before", "retrained")
"""The model as it was, and the one that never saw the forget set."""


def attacked(model: PreTrainedModel, case: Case, config: AttackConfig) -> dict[str, float]:
    """The worst that relearning brings back of the rows that it does not teach."""
    return worst_of(attack_model(model, case.sets["forget"], attacks=["relearn"], config=config)["relearn"])


def lifted(model: PreTrainedModel, case: Case, config: AttackConfig) -> dict[str, float]:
    """The same where as many near rows are taught in their place, of which nothing was forgotten.

    It is what of relearning is the form of question and answer, which all of these rows share.
    """
    forget, near = case.sets["forget"], case.sets["near"]
    taught = near[: len(forget[:: config.attacker_every])]
    return worst_of(attack_model(model, forget, taught, attacks=["fine_tune"], config=config)["fine_tune"])


def worst_of(result: AttackResult) -> dict[str, float]:
    """The figures of an attack where most has come back."""
    return {key: result.worst[key] for key in ("probability", "es")}


def configured(case: Case, target: Target, seed: int, contender: Contender, **choices: object) -> UnlearnConfig:
    """Every choice of a run."""
    names = ("forget_batch_size", "retain_batch_size", "hessian_batch_size")
    sizes: dict[str, object] = dict.fromkeys(names, case.batch_size)
    every: dict[str, Any] = {**target.shared, **sizes, **contender.choices, **choices}
    return UnlearnConfig(seed=seed, forget_target=target.probability, **every)


def best_rate(case: Case, target: Target, contender: Contender) -> tuple[float, list[Row]]:
    """The step size that keeps most of the retain set on the tuning seed, and all tries; none where there is one."""
    tries: list[Row] = []
    rates = target.rates[contender.unit]
    if len(rates) == 1:
        return rates[0], tries
    for lr in rates:
        config = configured(case, target, TUNING_SEED, contender, lr=lr)
        model, row = forgotten(case, contender, config, traced=False)
        found = score_answers(model, case.sets["retain"], batch_size=BATCH)["probability"]
        tries.append({"lr": lr, **row, "retain_kept": kept(found, case.known["retain"])})
        sys.stderr.write(f"tuning: {tries[-1]}\n")
    best = max(tries, key=lambda each: (each["reached"], each["retain_kept"]))
    return best["lr"], tries


class Cell:
    """One target in one architecture, and the file that its results grow in; what that holds is not run again.

    Args:
        target: One of `TARGETS`.
        shape: One of `SHAPES`.
        data: Folder with `tofu` and `lume`.
        work: Folder for the models.
        out: The file.
        tries: Whether fixed step sizes are tried.
        device: Where the models are.
    """

    def __init__(
        self,
        target: str,
        shape: str,
        data: Path | None,
        work: Path | None,
        out: Path,
        *,
        tries: bool = False,
        device: str = "cpu",
    ) -> None:
        self._name, self._shape, self._data, self._work, self._out = target, shape, data, work, out
        self._device = torch.device(device)
        self._target = tuned(TARGETS[target]) if tries else TARGETS[target]
        self._result = json.loads(out.read_text()) if out.exists() else {"rows": [], "tries": {}, "lr": {}}

    def run(self, contenders: Sequence[str], seeds: Sequence[int]) -> None:
        """Tune what is not tuned yet, then run every contender on every seed."""
        for name in contenders:
            if name not in self._result["lr"]:
                found = best_rate(self._case(TUNING_SEED), self._target, CONTENDERS[name])
                self._result["lr"][name], self._result["tries"][name] = found
                self._save()
        for seed in seeds:
            case = self._case(seed)
            for name in (*(name for name in UNCHANGED if name == "before" or case.retrained), *contenders):
                if any((row["seed"], row["method"]) == (seed, name) for row in self._result["rows"]):
                    continue
                started = time.perf_counter()
                row = self._row(case, seed, name)
                self._result["rows"].append(row)
                self._save()
                sys.stderr.write(f"{json.dumps(row)} {time.perf_counter() - started:.0f} s\n")

    def _case(self, seed: int) -> Case:
        case = case_of(self._name, self._shape, seed, self._data, self._work)
        for model in (case.model, case.retrained):
            if model is not None:
                model.to(self._device)
        return case

    def _row(self, case: Case, seed: int, name: str) -> Row:
        row: Row = {"seed": seed, "method": name}
        model = case.model if name == "before" else case.retrained
        if name not in UNCHANGED:
            contender = CONTENDERS[name]
            config = configured(case, self._target, seed, contender, lr=self._result["lr"][name])
            model, found = forgotten(case, contender, config)
            row |= found
        row |= measured(model, case) | {"back": attacked(model, case, self._target.attack)}
        # Facts of one template and one word are taught to a pretrained model by any of them.
        return {**row, "format": lifted(model, case, self._target.attack)} if "text" in case.sets else row

    def _save(self) -> None:
        write_result(
            self._out,
            force=True,
            claim="lasting",
            target=self._name,
            shape=self._shape,
            command=command(),
            environment=environment(),
            seeds=sorted({row["seed"] for row in self._result["rows"]}),
            rows=self._result["rows"],
            tries=self._result["tries"],
            lr=self._result["lr"],
        )


def file_of(target: str, shape: str, *, tries: bool = False) -> str:
    """The name of a cell's result file; a Llama's has that of the target alone."""
    parts = ("lasting", target, *(() if shape == "llama" else (shape,)), *(("tuned",) if tries else ()))
    return f"{'_'.join(parts)}_cpu_202611.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama", help=f"architecture, for {', '.join(SHAPED)}")
    parser.add_argument("--tuned", action="store_true", help=f"try fixed step sizes, for {', '.join(TUNABLE)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--data", type=Path, help="folder with tofu and lume, the rows of the two")
    parser.add_argument("--work", type=Path, help="folder for the models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the models are: cpu, cuda")
    parser.add_argument("--out", type=Path, help="result file; what it holds is not run again")
    options = parser.parse_args()
    if options.shape != "llama" and options.target not in SHAPED:
        parser.error(f"--shape is for {', '.join(SHAPED)}")
    if options.tuned and options.target not in TUNABLE:
        parser.error(f"--tuned is for {', '.join(TUNABLE)}")
    torch.set_num_threads(options.threads)
    out = options.out or RESULTS / file_of(options.target, options.shape, tries=options.tuned)
    cell = Cell(
        options.target, options.shape, options.data, options.work, out, tries=options.tuned, device=options.device
    )
    cell.run(options.contenders, options.seeds)


if __name__ == "__main__":
    main()
