"""What is kept at the forget target, and what relearning brings back: every method, the published and the bounded ones.

Two targets: the demo's people, and TOFU rows in a Llama of 3 million weights that has memorized them. Every contender
has three tries for its step size on a seed that is not shown; the best is the one that keeps most of the retain set
(mean probability) when the forget target is reached. Then each runs on every seed, and is attacked: AdamW on all
weights teaches a third of the forget rows again, at three rates, and the other two thirds are scored.
Usage: python -m benchmarks.forgetting.lasting --target demo --seeds 0 1 2
       python -m benchmarks.forgetting.lasting --target tofu --data tofu --work lasting --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers

BOUNDED = {"objective": "probability", "balance": True}
SMALL, LARGE, SHARES = (5e-5, 1e-4, 2e-4), (1e-3, 2e-3, 4e-3), (0.04, 0.08, 0.16)
CONTENDERS: Mapping[str, tuple[dict[str, object], Sequence[float]]] = {
    "fo_graddiff": ({"method": "fo_graddiff"}, SMALL),
    "so_graddiff": ({"method": "so_graddiff"}, SMALL),
    "simu_graddiff": ({"method": "simu_graddiff"}, LARGE),
    "first order, all weights, bounded": ({"method": "fo_graddiff", **BOUNDED}, SMALL),
    "second order, all weights, bounded": ({"method": "so_graddiff", **BOUNDED}, SMALL),
    "diagonal, critical neurons, bounded": ({"method": "simu_graddiff", **BOUNDED}, LARGE),
    "simu": ({"method": "simu", "paced": False}, SHARES),
    "simu with an adversary": ({"method": "simu", "paced": False, "adversary_lr": 3e-4}, SHARES),
}
"""Name -> (choices, step sizes to try)."""

TUNING_SEED = 100
TARGETS = {"demo": 0.1, "tofu": 0.05}
SHARED = {"hessian_interval": 5, "attribution_steps": 5, "attribution_rows": 60, "max_completeness_error": None}
ATTACK = AttackConfig(rates=(2e-4, 5e-4, 1e-3), steps=40, interval=10, batch_size=10, eval_batch_size=128)


class Case(NamedTuple):
    """A model that knows three sets, and one that never saw the first."""

    sets: Mapping[str, Sequence[Example]]
    model: PreTrainedModel
    retrained: PreTrainedModel
    batch_size: int


@functools.cache
def demo_case(seed: int) -> Case:
    """The demo's."""
    recipe = DemoRecipe()
    fiction = make_fiction(recipe, seed)
    made = (train_base(fiction, recipe, seed, sets) for sets in (("forget", "retain", "world"), ("retain", "world")))
    return Case(fiction.examples, *made, batch_size=24)


@functools.cache
def tofu_case(data: Path, work: Path) -> Case:
    """60 rows to forget, 140 to keep and 117 world facts, each row a question and its answer."""
    full = [json.loads(line) for line in (data / "full.jsonl").read_text().splitlines()]
    world = [json.loads(line) for line in (data / "world_facts.jsonl").read_text().splitlines()]
    rows = {"forget": full[3600:3660], "retain": full[:140], "world": world}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"{row['question']} {row['answer']}" for part in rows.values() for row in part]
    backend.train_from_iterator(texts, trainer)

    def encoded(row: Mapping[str, str]) -> Example:
        prompt = backend.encode(f"Question: {row['question']}\nAnswer:").ids
        answer = [*backend.encode(f" {row['answer']}").ids, special.index("<eos>")]
        return Example((*prompt, *answer), (*[-100] * len(prompt), *answer))

    sets = {name: [encoded(row) for row in part] for name, part in rows.items()}
    made = (
        _memorizing(work / name, [row for part in parts for row in sets[part]], backend.get_vocab_size())
        for name, parts in (("model", tuple(sets)), ("retrained", ("retain", "world")))
    )
    return Case(sets, *made, batch_size=10)


def _memorizing(folder: Path, examples: Sequence[Example], vocabulary: int) -> PreTrainedModel:
    if folder.exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, pad_token_id=0, **sizes))
    memorize(model, examples, config=TrainConfig(epochs=60, batch_size=16))
    model.save_pretrained(folder)
    return model.eval()


def measured(model: PreTrainedModel, case: Case) -> dict[str, object]:
    """What a model knows of each set: answers that are right as a whole, EM, ES and probability."""
    found: dict[str, object] = {}
    for name, examples in case.sets.items():
        scores = score_answers(model, examples, batch_size=128)
        found[name] = {key: sum(scores[key]) / len(examples) for key in ("em", "es", "probability")}
        found[name]["whole"] = sum(each == 1.0 for each in scores["em"]) / len(examples)
    return found


def attacked(model: PreTrainedModel, case: Case) -> dict[str, float]:
    """The worst that relearning brings back of the rows that it does not teach."""
    result = attack_model(model, case.sets["forget"], attacks=["relearn"], config=ATTACK)["relearn"]
    return {key: result.worst[key] for key in ("probability", "es")}


def run(case: Case, target: str, seed: int, choices: Mapping[str, object]) -> tuple[PreTrainedModel, dict[str, object]]:
    """A copy of the model that forgot, and how it went."""
    model, size = copy.deepcopy(case.model), case.batch_size
    sizes = dict.fromkeys(("forget_batch_size", "retain_batch_size", "hessian_batch_size"), size)
    config = UnlearnConfig(
        seed=seed, forget_target=TARGETS[target], max_steps=300, eval_interval=3, **{**SHARED, **sizes, **choices}
    )
    done = unlearn(model, case.sets["forget"], case.sets["retain"], config=config)
    return model, {"steps": done.steps, "reached": done.reached, "seconds": round(done.seconds, 1)}


def tuned(case: Case, target: str, name: str) -> tuple[float, list[dict[str, object]]]:
    """The step size that keeps most of the retain set on the tuning seed, and all tries."""
    choices, rates = CONTENDERS[name]
    tries = []
    for lr in rates:
        model, row = run(case, target, TUNING_SEED, {**choices, "lr": lr})
        kept = score_answers(model, case.sets["retain"], batch_size=128)["probability"]
        tries.append({"lr": lr, **row, "retain_probability": sum(kept) / len(kept)})
        sys.stderr.write(f"{target} tuning {name}: {tries[-1]}\n")
    best = max(tries, key=lambda each: (each["reached"], each["retain_probability"]))
    return best["lr"], tries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--data", type=Path, help="folder of TOFU's rows")
    parser.add_argument("--work", type=Path, help="folder for TOFU's models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = options.out or RESULTS / f"lasting_{options.target}_cpu_202611.json"
    if out.exists():
        raise SystemExit(f"{out.name} exists; give another --out.")
    of = demo_case if options.target == "demo" else lambda seed: tofu_case(options.data, options.work)
    rates, tries, rows = {}, {}, []
    for name in options.contenders:
        rates[name], tries[name] = tuned(of(TUNING_SEED), options.target, name)
    for seed in options.seeds:
        case = of(seed)
        for name in ("before", "retrained", *options.contenders):
            started = time.perf_counter()
            if name in rates:
                model, row = run(case, options.target, seed, {**CONTENDERS[name][0], "lr": rates[name]})
            else:
                model, row = case.model if name == "before" else case.retrained, {}
            row = {"seed": seed, "method": name, **row, **measured(model, case), "back": attacked(model, case)}
            rows.append(row)
            sys.stderr.write(f"{json.dumps(row)} {time.perf_counter() - started:.0f} s\n")
        # After every seed, so that a run that is stopped leaves what it has.
        write_result(
            out,
            force=True,
            claim="lasting",
            target=options.target,
            command=command(),
            environment=environment(),
            seeds=[each for each in options.seeds if any(row["seed"] == each for row in rows)],
            rows=rows,
            tries=tries,
            lr=rates,
        )


if __name__ == "__main__":
    main()
