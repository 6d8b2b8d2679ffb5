"""Where a change of the weights lies among the directions of the forget set's activations: an attacker's, and ours.

On the demo's people. Of each down projection the covariance of its neurons over the forget set gives directions, in
order of how much of the activations they hold. A change of the weights is split among them: what relearning a third of
the forget set changes, and what each method changed to forget.
Usage: python -m benchmarks.forgetting.directions --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case, demo_case
from benchmarks.forgetting.harness.contenders import Contender
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.targets import TARGETS, tuned
from benchmarks.forgetting.lasting import configured
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu import register_neuron_hooks
from torch_simu.layers import down_projections
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.attack.copies import ModelCopy
from torch_simu.unlearning.attack.teaching import teach
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.objectives import mean_answer_nll

METHODS: Mapping[str, Mapping[str, object]] = {
    "simu": {"method": "simu", "paced": True},
    "the same with Sophia's diagonal and clip": {
        "method": "all_neurons",
        "objective": "probability",
        "balance": True,
        "lr": 1e-3,
    },
    "simu_graddiff": {"method": "simu_graddiff", "lr": 2e-3},
}
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LESSON = AttackConfig(rates=(5e-4,), steps=40, interval=40, batch_size=10, eval_batch_size=128)


def directions(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Layer -> directions as columns, those with the largest share of the activations first."""
    with register_neuron_hooks(model, reduce="covariance") as hooks:
        for batch in batches_in_order(examples, 24, 0):
            mean_answer_nll(model, batch).backward()
            model.zero_grad()
    return {name: torch.linalg.eigh(covariance).eigenvectors.flip(1) for name, covariance in hooks.items()}


def split(
    before: PreTrainedModel, after: PreTrainedModel, found: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[float]]]:
    """Layer -> share of its squared change that lies in the leading directions, for each of `SHARES`."""
    old, new = down_projections(before), down_projections(after)
    for name, columns in found.items():
        change = new[name].weight.detach() - old[name].weight.detach()
        parts = (change @ columns).square().sum(0)
        sums = (parts.cumsum(0) / parts.sum()).tolist()
        yield name, [sums[max(0, round(share * len(sums)) - 1)] for share in SHARES]


def rows_of(case: Case, seed: int) -> Iterator[dict[str, object]]:
    """What each method changed, and what relearning changed behind it."""
    forget = case.sets["forget"]
    found = directions(case.model, forget)
    for name, choices in METHODS.items():
        contender = Contender(choices=choices, unit="weights")
        model, _ = forgotten(case, contender, configured(case, tuned(TARGETS["demo"]), seed, contender), traced=False)
        copied = ModelCopy(model)
        taught, scored = forget[::3], [row for place, row in enumerate(forget) if place % 3]
        teach(copied, taught, scored, config=LESSON)
        for what, before, after in (("method", case.model, model), ("relearning", model, copied.model)):
            for layer, shares in split(before, after, found):
                yield {"seed": seed, "method": name, "change": what, "layer": layer, "shares": shares}
        sys.stderr.write(f"seed {seed}: {name}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "directions_cpu_202611.json")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in options.seeds for row in rows_of(demo_case(seed), seed)]
    write_result(
        options.out,
        force=options.force,
        claim="directions",
        command=command(),
        environment=environment(),
        seeds=options.seeds,
        leading=list(SHARES),
        rows=rows,
    )


if __name__ == "__main__":
    main()
