"""Quality against cost of attribution on a really pretrained model: rules and numbers of points, budgets, one step.

Quality is the share of the top 10 % of neurons, of each layer and of the model, that 32 Gauss-Legendre points name,
too: they are exact for polynomials up to degree 63, 64 midpoints up to degree 1. The cost is the processor time of the
whole call. An older checkout of the package may be timed beside it. What is done is noted after every row, and a second
call goes on where the first stopped.
Usage: python -m benchmarks.pretrained.attribution --work FOLDER [--facts 20] [--seeds 2] [--before FOLDER] [--force]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.pretrained.facts import facts
from benchmarks.pretrained.model import make_folder
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu import attribute_neurons, register_neuron_hooks
from torch_simu.attribution import Attribution
from torch_simu.curvature import scored_logits

FRACTION = 0.1
REFERENCE = {"rule": "gauss", "steps": 32}
DEFAULT = {"rule": "midpoint", "steps": 10}
"""What the package takes by default."""
POINTS = [DEFAULT, *({"rule": "gauss", "steps": steps} for steps in (1, 2, 3))]
PASSES = (2, 6, 11, 16, 31)
BEFORE = """
import sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from torch_simu import attribute_neurons
torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval().requires_grad_(False)
batches = torch.load(sys.argv[2])
start = time.process_time()
found = attribute_neurons(model, batches, method="packed", max_completeness_error=None)
print(time.process_time() - start)
found.save(sys.argv[3])
"""
"""The default of an older checkout, in a process of its own."""


def batches_of(model: PreTrainedModel, folder: Path, count: int) -> list[dict[str, Tensor]]:
    """The first facts whose answer the model finds most likely, answers scored."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for fact in (each for kind in facts().values() for each in kind):
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (fact.prompt, fact.answer))
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            guess = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        if guess.tolist() == answer:
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            found.append({"input_ids": ids, "labels": labels})
        if len(found) == count:
            break
    return found


def by_one_step(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], predicting: bool) -> dict[str, Tensor]:
    """Gradient x activation of all positions, or of those that predict a scored token; one backward pass per batch."""
    total: dict[str, Tensor] = {}
    for batch in batches:
        labels = batch["labels"]
        mask = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)) if predicting else None
        with register_neuron_hooks(model, position_mask=mask) as captured:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
            logits, labels = scored_logits(model(**inputs).logits, labels)
            (-torch.nn.functional.cross_entropy(logits, labels, reduction="sum")).backward()
        for name in captured:
            total[name] = total.get(name, 0.0) + captured[name].double()
        model.zero_grad()
    return total


def agreement(found: Attribution, expected: Attribution) -> dict[str, float]:
    """Shares of the top neurons that both name."""
    return {scope: expected.stability(found, FRACTION, scope) for scope in ("layer", "global")}


def ways(seeds: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, seed and options of every way but the reference."""
    for options in POINTS:
        yield f"{options['rule']} {options['steps']}", 0, options
    for seed in range(seeds):
        for passes in PASSES:
            yield f"budget {passes}", seed, {"budget": passes}


def passes_of(way: str, num_layers: int) -> float:
    """How many passes a row takes: one, its budget, or half a pass for each layer, point and the end at zero."""
    words = way.split(",")[0].split()
    if words[0] == "gradient":
        return 1.0
    count = float(words[1])
    if words[0] == "budget":
        return count
    return (count + 1) * (num_layers if way.endswith("before") else (num_layers + 1) / 2)


def measured(model: PreTrainedModel, batches: list[dict[str, Tensor]], options: dict[str, Any], seed: int) -> Any:
    """An attribution and the processor seconds that it took; the method is known, and so needs no spot check twice."""
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    found = attribute_neurons(
        model, batches, method="packed", max_completeness_error=None, generator=generator, **options
    )
    return found, time.process_time() - start


def measured_before(options: argparse.Namespace, folder: Path, batches: list[dict[str, Tensor]]) -> Any:
    """The same call by another checkout of the package, and the processor seconds that it took."""
    data, out = options.work / "batches.pt", options.work / "before.safetensors"
    torch.save(batches, data)
    call = [sys.executable, "-c", BEFORE, str(folder), str(data), str(out), str(options.threads)]
    surroundings = {**os.environ, "PYTHONPATH": str(options.before)}
    done = subprocess.run(call, cwd=options.before, env=surroundings, check=True, capture_output=True, text=True)
    return Attribution.load(out), float(done.stdout.split()[-1])


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way and seed, the dearest first."""
    folder = make_folder(options.work / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    batches = batches_of(model, folder, options.facts)
    reference, notes = options.work / "reference.safetensors", options.work / "rows.json"
    rows: list[dict[str, Any]] = json.loads(notes.read_text()) if notes.exists() else []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        notes.write_text(json.dumps(rows))
        sys.stderr.write(f"{row}\n")

    if not reference.exists():
        found, seconds = measured(model, batches, REFERENCE, 0)
        found.save(reference)
        note(
            {
                "way": "gauss 32",
                "seed": 0,
                "seconds": seconds,
                "samples": found.num_samples,
                "layer": 1.0,
                "global": 1.0,
            }
        )
    expected = Attribution.load(reference)
    done = {(row["way"], row["seed"]) for row in rows}
    if options.before is not None and ("midpoint 10, before", 0) not in done:
        found, seconds = measured_before(options, folder, batches)
        note({"way": "midpoint 10, before", "seed": 0, "seconds": seconds, **agreement(found, expected)})
    for way, predicting in (("gradient x activation", False), ("gradient x activation, predicting", True)):
        if (way, 0) in done:
            continue
        # The gradients of activations begin at the embedding.
        model.get_input_embeddings().requires_grad_(True)
        start = time.process_time()
        scores = by_one_step(model, batches, predicting)
        seconds = time.process_time() - start
        model.requires_grad_(False)
        found = Attribution(scores, {}, expected.num_samples, {})
        note({"way": way, "seed": 0, "seconds": seconds, **agreement(found, expected)})
    for name, seed, choice in ways(options.seeds):
        if (name, seed) in done:
            continue
        found, seconds = measured(model, batches, choice, seed)
        row = {"way": name, "seed": seed, "seconds": seconds, **agreement(found, expected)}
        if found.incompleteness:
            missed = sorted(found.incompleteness.values())
            row |= {"incompleteness_worst": missed[-1], "incompleteness_median": missed[len(missed) // 2]}
        if found.standard_error:
            one, two = found.halves
            errors = {layer: found.scores[layer] - scores for layer, scores in expected.scores.items()}
            row |= {
                "halves": one.stability(two, FRACTION),
                "error": _size(errors) / _size(expected.scores),
                "standard_error": _size(found.standard_error) / _size(expected.scores),
            }
        note(row)
    counted = ({**row, "passes": passes_of(row["way"], model.config.num_hidden_layers)} for row in rows)
    return sorted(counted, key=lambda row: -row["passes"])


def _size(scores: Any) -> float:
    return torch.cat(list(scores.values())).norm().item()


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the model and for what is done")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--before", type=Path, help="a checkout of the package to time beside it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.add_argument("--out", type=Path, default=RESULTS / "attribution_budget_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # The other checkout runs in its own folder.
    options.work = options.work.resolve()
    options.before = None if options.before is None else options.before.resolve()
    rows = rows_of(options)
    write_result(
        options.out,
        force=options.force,
        claim="attribution_budget",
        command=command(),
        environment=environment(),
        seeds=list(range(options.seeds)),
        rows=rows,
    )


if __name__ == "__main__":
    main()
