"""Quality against cost of attribution where it is known which neurons count: planted columns, and the demo's model.

Of each way to attribute: the share of the top 10 % of neurons of each layer that 32 Gauss-Legendre points name, too; of
planted columns the area under the curve, by the scores themselves and by their contrast with the retain set; of the
demo's model the loss of both sets when the top 10 % by the contrast write nothing. What is done is noted after every
seed, and a second call goes on where the first stopped.
Usage: python -m benchmarks.planted.budgets --work FOLDER [--planted 0 1] [--demo 0] [--force]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.planted.column_scores import auc
from benchmarks.planted.knockout import without
from benchmarks.planted.planting import PlantingRecipe, plant
from benchmarks.pretrained.attribution import by_one_step
from benchmarks.results import RESULTS, command, environment, write_result
from benchmarks.verdicts.parts import Row
from torch_simu import NeuronSelection, attribute_neurons
from torch_simu.attribution import Attribution
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base

FRACTION = 0.1
REFERENCE = {"rule": "gauss", "steps": 32}


def half_of(examples: Sequence[Example], *, rarest: bool) -> list[Example]:
    """The rows with half of their answers' tokens scored: those that are rarest in all answers, or any."""
    counts = Counter(label for each in examples for label in each.labels[1:])
    draw = torch.Generator().manual_seed(0)
    found = []
    for each in examples:
        scored = [place for place, label in enumerate(each.labels) if place and label != IGNORED]
        chance = dict(zip(reversed(scored), torch.rand(len(scored), generator=draw).tolist(), strict=True))
        rank = {place: (counts[each.labels[place]] if rarest else 0, chance[place]) for place in scored}
        kept = set(sorted(scored, key=rank.__getitem__)[: (len(scored) + 1) // 2])
        labels = (label if place in kept else IGNORED for place, label in enumerate(each.labels))
        found.append(Example(each.input_ids, tuple(labels)))
    return found


WAYS: Mapping[str, Mapping[str, Any]] = {
    "gradient x activation": {"predicting": False},
    "gradient x activation, predicting": {"predicting": True},
    "budget 2": {"budget": 2},
    "one midpoint": {"budget": 3},
    "gauss 2": {"rule": "gauss", "steps": 2},
    "gauss 3": {"rule": "gauss", "steps": 3},
    "midpoint 10": {"rule": "midpoint", "steps": 10},
    "midpoint 10, the rarer half of the tokens": {"rarest": True},
    "midpoint 10, any half of the tokens": {"rarest": False},
}
"""Way -> its options; three passes a row are one path point of four layers, and not its end."""


def passes_of(options: Mapping[str, Any], num_layers: int) -> float:
    """How many passes a row takes; of half of its tokens half as many."""
    if "rarest" in options:
        return 11 * (num_layers + 1) / 4
    if "predicting" in options:
        return 1.0
    return float(options.get("budget", (options.get("steps", 0) + 1) * (num_layers + 1) / 2))


def scored(model: PreTrainedModel, examples: Sequence[Example], pad: int, options: Mapping[str, Any]) -> Attribution:
    """The scores of some rows by one way."""
    if "rarest" in options:
        examples, options = half_of(examples, rarest=options["rarest"]), WAYS["midpoint 10"]
    batches = batches_in_order(examples, 32, pad)
    if "predicting" in options:
        return Attribution(by_one_step(model, batches, options["predicting"]), {}, len(examples), {})
    return attribute_neurons(model, batches, method="packed", max_completeness_error=None, **options)


def measured(
    where: str,
    seed: int,
    model: PreTrainedModel,
    sets: Mapping[str, Sequence[Example]],
    pad: int,
    truth: NeuronSelection | None = None,
    ways: Mapping[str, Mapping[str, Any]] = WAYS,
) -> Iterator[dict[str, Any]]:
    """A row for each way."""
    # As many as are to be forgotten, so that noise is alike.
    retain = sets["retain"][: len(sets["forget"])]
    expected = scored(model, sets["forget"], pad, REFERENCE)
    for way, options in ways.items():
        start = time.process_time()
        forget = scored(model, sets["forget"], pad, options)
        seconds = time.process_time() - start
        contrast = forget.contrast(scored(model, retain, pad, options))
        row: dict[str, Any] = {"where": where, "seed": seed, "way": way, "seconds": seconds}
        row["passes"] = passes_of(options, len(forget.scores))
        row["layer"] = expected.stability(forget, FRACTION)
        if truth is not None:
            for name, found in (("auc", forget), ("auc_contrast", contrast)):
                row[name] = mean(auc(found.scores[layer], truth.mask(layer)) for layer in truth)
        else:
            found = {name: list(sets[name]) for name in ("forget", "retain")}
            row["without"] = without(model, contrast.top(FRACTION), found, pad)
        sys.stderr.write(f"{row}\n")
        yield row


def planted_rows(seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a model with planted facts."""
    planted = plant(PlantingRecipe(), seed)
    yield from measured("planted", seed, planted.model, planted.sets, 0, planted.selection)


def demo_rows(seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the demo's model."""
    recipe = DemoRecipe()
    fiction = make_fiction(recipe, seed)
    model = train_base(fiction, recipe, seed, ("forget", "retain", "world"))
    yield from measured("demo", seed, model, fiction.examples, pad_id(fiction.tokenizer))


def quality(rows: Sequence[Row]) -> Iterator[str]:
    """The table: means over the seeds."""
    heads = (
        "planted: top 10 %",
        "AUC",
        "AUC, contrast",
        "demo: top 10 %",
        "forget loss without",
        "retain loss without",
    )
    yield f"| way | passes, planted | {' | '.join(heads)} |"
    yield "|---|---|---|---|---|---|---|---|"
    for way in WAYS:
        planted, demo = ([row for row in rows if (row["where"], row["way"]) == (at, way)] for at in ("planted", "demo"))
        cells = [f"{planted[0]['passes']:g}"]
        cells += [f"{mean(row[key] for row in planted):.3f}" for key in ("layer", "auc", "auc_contrast")]
        cells += [f"{mean(row['layer'] for row in demo):.3f}"]
        cells += [f"{mean(row['without'][name]['nll'] for row in demo):.3f}" for name in ("forget", "retain")]
        yield f"| {way} | {' | '.join(cells)} |"


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is done")
    parser.add_argument("--planted", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--demo", type=int, nargs="*", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.add_argument("--out", type=Path, default=RESULTS / "attribution_quality_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for where, seeds, rows_of in (("planted", options.planted, planted_rows), ("demo", options.demo, demo_rows)):
        for seed in seeds:
            notes = options.work / f"{where}_{seed}.json"
            if not notes.exists():
                notes.write_text(json.dumps(list(rows_of(seed))))
            rows += json.loads(notes.read_text())
    write_result(
        options.out,
        force=options.force,
        claim="attribution_quality",
        command=command(),
        environment=environment(),
        seeds=sorted({*options.planted, *options.demo}),
        rows=rows,
    )


if __name__ == "__main__":
    main()
