"""What `recommend` picks for models that it was not tuned on, beside the best of a grid of 20 on each.

Three small models of different families, sizes and seeds have memorized fictional people. A pilot of some minutes picks
the choices of a run; that run and those of the grid (step size x share of neurons x retain term) then forget the whole
set in copies of the model. A run of the grid may take more steps than any recommended one, and is made also where
the scores of a layer explain little of what its neurons do. Kept is the mean over rows of the probability beside what
it was, of which more is no gain; world facts are in no batch of any run.
Usage: python -m benchmarks.forgetting.recommending --minutes 2
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

from benchmarks.forgetting.cases import BATCH, Case
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.pilot.pilot import recommend
from torch_simu.unlearning.pilot.tries import Try, kept_share
from torch_simu.unlearning.pilot.words import as_changed, one_batch_size

Row = dict[str, Any]


def _llama(vocabulary: int) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=0, **sizes))


def _gpt2(vocabulary: int) -> PreTrainedModel:
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"n_embd": 48, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **special, **sizes))


def _olmo2(vocabulary: int) -> PreTrainedModel:
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Olmo2ForCausalLM(Olmo2Config(vocab_size=vocabulary, max_position_embeddings=64, **special, **sizes))


MODELS: Mapping[str, tuple[Callable[[int], PreTrainedModel], int, int]] = {
    "llama": (_llama, 8, 201),
    "gpt2": (_gpt2, 5, 202),
    "olmo2": (_olmo2, 6, 203),
}
"""Name -> (model of a vocabulary, people to forget, seed)."""

GRID: tuple[dict[str, object], ...] = tuple(
    {"lr": lr, "fraction": fraction, "retain_term": term}
    for lr, fraction, term in itertools.product((0.01, 0.02, 0.04, 0.08, 0.16), (1.0, 0.3), ("nll", "kl"))
)


@functools.cache
def case_of(name: str) -> Case:
    """A model of the named family that has memorized people of its own."""
    make, people, seed = MODELS[name]
    fiction = make_fiction(DemoRecipe(num_forget=people, retain_per_forget=3, num_places=12), seed)
    torch.manual_seed(seed)
    model = make(len(fiction.tokenizer))
    rows = [row for part in fiction.examples.values() for row in part]
    em = memorize(model, rows, config=TrainConfig(epochs=80, lr=4e-3, batch_size=24, seed=seed))
    sys.stderr.write(f"{name}: EM {em:.3f} of {len(rows)} rows\n")
    return Case(fiction.examples, model.eval(), None, batch_size=16)


def run(case: Case, config: UnlearnConfig) -> Row:
    """What a copy of the model that forgot the whole set has kept, and how it went."""
    model = copy.deepcopy(case.model)
    done = unlearn(model, case.sets["forget"], case.sets["retain"], config=config)
    found = {name: score_answers(model, rows, batch_size=BATCH)["probability"] for name, rows in case.sets.items()}
    kept = {name: kept_share(found[name], case.known[name]) for name in ("retain", "world")}
    probability = sum(found["forget"]) / len(found["forget"])
    return {
        "steps": done.steps,
        "seconds": round(done.seconds, 1),
        "reached": done.reached,
        "forget": {"probability": probability},
        **{name: {"kept": value} for name, value in kept.items()},
    }


def shown(each: Try) -> Row:
    """A try of the pilot as a result file has it."""
    figures = {"probability": each.probability, "kept": each.kept, "steps": each.steps}
    return {"changes": each.name, **figures, "seconds": round(each.seconds, 1), "note": each.note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="of each pilot")
    parser.add_argument("--most-steps", type=int, default=3000, help="of a run of the grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "recommending_cpu_202611.json",
        help="result file; what it holds is not run again",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    held = json.loads(options.out.read_text()) if options.out.exists() else {"rows": [], "pilots": {}}
    rows: list[Row] = held["rows"]
    pilots: dict[str, list[Row]] = held["pilots"]
    given = one_batch_size(UnlearnConfig())
    for name in MODELS:
        if sum(row["model"] == name for row in rows) == 1 + len(GRID):
            continue
        case = case_of(name)
        always = {"max_steps": options.most_steps, "max_completeness_error": None}
        runs = [
            ("grid", as_changed(given.updated(**choices), given), given.updated(**always, **choices))
            for choices in GRID
        ]
        if name not in pilots:
            sets = (case.sets["forget"], case.sets["retain"])
            found = recommend(case.model, *sets, minutes=options.minutes, config=given)
            pilots[name] = [shown(each) for each in found.tries]
            runs.insert(0, ("recommended", as_changed(found.config, given), found.config))
        for kind, changes, config in runs:
            if any((row["model"], row["run"], row["changes"]) == (name, kind, changes) for row in rows):
                continue
            row = {"model": name, "run": kind, "changes": changes, **run(case, config)}
            if kind == "recommended":
                row["expected"] = {"steps": found.expected_steps, "seconds": round(60 * found.expected_minutes, 1)}
            rows.append(row)
            sys.stderr.write(f"{json.dumps(row)}\n")
            write_result(
                options.out,
                force=True,
                claim="recommending",
                command=command(),
                environment=environment(),
                seeds=[seed for _, _, seed in MODELS.values()],
                rows=rows,
                pilots=pilots,
            )


if __name__ == "__main__":
    main()
