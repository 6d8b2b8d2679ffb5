"""Set the highest-scored neurons of the demo's model to zero: what do the forget set and the others lose?

The scores differ in the objective (log-likelihood, probability, or the paper's literal loss), in the path (exact, or
one step at the clean activation) and in the contrast with the retain set. Also, how far the top neurons of two halves
of the forget set are the same.
Usage: python -m benchmarks.planted.knockout --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu import NeuronSelection, attribute_neurons, register_neuron_hooks
from torch_simu.attribution import Attribution
from torch_simu.layers import down_projections, neuron_weight
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.metrics.scoring import score_answers

SHARES = (0.03, 0.1, 0.3)


def one_step(model: PreTrainedModel, examples: list[Example], pad: int) -> Attribution:
    """Gradient x activation of the log-likelihood, at the clean activation of all positions."""
    with register_neuron_hooks(model) as hooks:
        for batch in batches_in_order(examples, 32, pad):
            (-model(**batch).loss).backward()
    model.zero_grad()
    return Attribution({name: hooks[name].double() for name in hooks}, {}, len(examples), {})


def scores_of(model: PreTrainedModel, sets: dict[str, list[Example]], pad: int) -> tuple[dict[str, Attribution], float]:
    """The scores that are compared, and the stability of the exact ones."""

    def exact(examples: list[Example], objective: str = "logprob") -> Attribution:
        batches = batches_in_order(examples, 32, pad)
        return attribute_neurons(
            model, batches, objective=objective, steps=10, rule="midpoint", max_completeness_error=None
        )

    forget = sets["forget"]
    halves = exact(forget[::2]), exact(forget[1::2])
    found = {
        "logprob": halves[0] + halves[1],
        "prob": exact(forget, "prob"),
        "loss (literal)": exact(forget, "loss"),
        "gradient x activation": one_step(model, forget, pad),
    }
    found["logprob, contrast"] = found["logprob"].contrast(exact(sets["retain"]))
    return found, halves[0].stability(halves[1], 0.1)


def without(model: PreTrainedModel, selection: NeuronSelection, sets: dict[str, list[Example]], pad: int) -> dict:
    """What each set's answers are worth when the selected neurons write nothing."""
    layers = down_projections(model)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, layer in layers.items():
            weight = neuron_weight(layer)
            kept[name] = weight[:, selection[name]].clone()
            weight[:, selection[name]] = 0
        measured = {
            name: {key: mean(values) for key, values in score_answers(model, rows, batch_size=128, pad_id=pad).items()}
            for name, rows in sets.items()
        }
        for name, layer in layers.items():
            neuron_weight(layer)[:, selection[name]] = kept[name]
    return {name: {key: values[key] for key in ("em", "nll")} for name, values in measured.items()}


def rows_of(seed: int) -> list[dict[str, object]]:
    """A row for each score and share."""
    recipe = DemoRecipe()
    fiction = make_fiction(recipe, seed)
    model = train_base(fiction, recipe, seed, ("forget", "retain", "world"))
    sets = {name: list(examples) for name, examples in fiction.examples.items()}
    pad = pad_id(fiction.tokenizer)
    scores, stability = scores_of(model, sets, pad)
    rows: list[dict[str, object]] = [{"seed": seed, "score": "none", "share": 0.0, **without_none(model, sets, pad)}]
    for share in SHARES:
        draw = torch.Generator().manual_seed(seed)
        chosen = {name: each.top(share) for name, each in scores.items()}
        chosen["random"] = NeuronSelection.random(model, share, draw)
        for name, selection in chosen.items():
            rows.append({"seed": seed, "score": name, "share": share, **without(model, selection, sets, pad)})
            sys.stderr.write(f"{rows[-1]}\n")
    rows.append({"seed": seed, "score": "logprob", "stability_of_top_10_percent": stability})
    sys.stderr.write(f"{rows[-1]}\n")
    return rows


def without_none(model: PreTrainedModel, sets: dict[str, list[Example]], pad: int) -> dict:
    """What the whole model knows."""
    nothing = {name: [] for name in down_projections(model)}
    sizes = {name: layer.in_features for name, layer in down_projections(model).items()}
    return without(model, NeuronSelection(nothing, sizes), sets, pad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "knockout_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_result(
        options.out,
        force=options.force,
        claim="knockout",
        command=command(),
        environment=environment(),
        seeds=options.seeds,
        rows=[row for seed in options.seeds for row in rows_of(seed)],
    )


if __name__ == "__main__":
    main()
