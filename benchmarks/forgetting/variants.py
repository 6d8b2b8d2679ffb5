"""What else was tried so that forgetting lasts or costs less: the default with one thing changed, on the demo.

Each variant runs to the same forget target at the same step size, and is attacked as in `forgetting.lasting`.
Usage: python -m benchmarks.forgetting.variants --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import BATCH, Case, demo_case
from benchmarks.forgetting.harness.contenders import Contender
from benchmarks.forgetting.harness.measures import measured
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.targets import TARGETS
from benchmarks.forgetting.lasting import Row, attacked
from benchmarks.forgetting.lasting import configured as config_of
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu import NeuronSelection, SIMUOptimizer, attribute_neurons, register_neuron_hooks
from torch_simu.optimizer import GradientBalance
from torch_simu.unlearning.config import own_choices
from torch_simu.unlearning.data.batches import Batches, batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import answer_log_probs, mean_answer_nll
from torch_simu.whitening import damped_cholesky, undamped

LR, DAMPING = 0.04, 0.1
TARGET = TARGETS["demo"]
Variant = Callable[[Case, int], tuple[PreTrainedModel, Row]]


def configured(case: Case, seed: int, **choices: object) -> tuple[PreTrainedModel, Row]:
    """The driver's run."""
    choices = {"method": "simu", "paced": False, "lr": LR, **choices}
    contender = Contender(choices=choices, unit="shares")
    return forgotten(case, contender, config_of(case, TARGET, seed, choices), traced=False)


def looped(
    case: Case,
    seed: int,
    *,
    after: Callable[[PreTrainedModel, SIMUOptimizer], Callable[[bool], None]] | None = None,
    neurons: Callable[[PreTrainedModel, Case], NeuronSelection] = lambda model, case: NeuronSelection.full(model),
) -> tuple[PreTrainedModel, Row]:
    """The same run as a plain loop, in which something happens before each step, told whether a refresh was made."""
    model, steps = copy.deepcopy(case.model), 0
    sets = {
        name: Batches(case.sets[name], case.batch_size, 3 * seed + place, 0)
        for place, name in enumerate(("forget", "retain"))
    }
    selection = neurons(model, case)
    optimizer = SIMUOptimizer(
        selection.param_groups(model), lr=LR, betas=(0.9, 0.8), hessian_interval=5, curvature="both", damping=DAMPING
    )
    balance, change = GradientBalance(optimizer), after(model, optimizer) if after is not None else None
    with register_neuron_hooks(model, selection, reduce="covariance", outputs=True, recording=False) as hooks:
        while steps < 300:
            hooks.reset()
            with hooks.recording(), balance.forget():
                log_probs, scored = answer_log_probs(model, sets["forget"].batch(steps))
                log_probs[scored].exp().mean().backward()
            mean_answer_nll(model, sets["retain"].batch(steps)).backward()
            due = optimizer.hessian_due
            if due:
                optimizer.update_curvature(hooks)
            balance.combine_(retain_weight=2.0)
            if change is not None:
                change(due)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps % 3 == 0:
                found = score_answers(model, case.sets["forget"], batch_size=BATCH)["probability"]
                if sum(found) / len(found) <= TARGET.probability:
                    break
    return model, {"steps": steps, "reached": steps < 300}


def of_rank(rank: int, model: PreTrainedModel, optimizer: SIMUOptimizer) -> Callable[[bool], None]:
    """Keep the leading directions of the covariance of the outputs, and the mean of the others."""

    def change(due: bool) -> None:
        for state in optimizer.state.values() if due else ():
            covariance = undamped(state["output_factor"], damping=DAMPING)
            values, vectors = torch.linalg.eigh(covariance)
            values[:-rank] = values[:-rank].mean()
            state["output_factor"] = damped_cholesky((vectors * values) @ vectors.T, damping=DAMPING)

    return change


def toward_zero(model: PreTrainedModel, optimizer: SIMUOptimizer) -> Callable[[bool], None]:
    """Hold every weight between where it was and zero."""
    start = {param: param.detach().clone() for group in optimizer.param_groups for param in group["params"]}

    def hold(*_: object) -> None:
        with torch.no_grad():
            for param, old in start.items():
                param.copy_(torch.where(old > 0, param.clamp(min=0).minimum(old), param.clamp(max=0).maximum(old)))

    optimizer.register_step_post_hook(hold)
    return lambda due: None


def supporting(model: PreTrainedModel, case: Case) -> NeuronSelection:
    """The neurons that support the forget set."""
    batches = list(batches_in_order(case.sets["forget"], 24, 0))
    attribution = attribute_neurons(model, batches, steps=20)
    return NeuronSelection.from_masks({name: scores > 0 for name, scores in attribution.scores.items()})


def folded(case: Case, seed: int, *, folds: int) -> tuple[PreTrainedModel, Row]:
    """Forget the first fold, then the first two, and so on, while the rest of the forget set is retained."""
    forget, model, steps = list(case.sets["forget"]), case.model, 0
    for last in range(1, folds + 1):
        own = [row for place, row in enumerate(forget) if place * folds // len(forget) < last]
        kept = [*case.sets["retain"], *forget[len(own) :]]
        part = Case({**case.sets, "forget": own, "retain": kept}, model, None, case.batch_size)
        model, row = configured(part, seed)
        steps += row["steps"]
    return model, {**row, "steps": steps}


def rehearsed(case: Case, seed: int, *, samples: int, length: int = 24) -> tuple[PreTrainedModel, Row]:
    """Retain what the model writes of itself, too, but for what shares three tokens with the forget set alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, case.model.config.vocab_size, (samples, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length):
            chances = case.model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    written = [Example(tuple(row), (-100, *row[1:])) for row in ids.tolist()]
    own = _threes(case.sets["forget"]) - _threes(case.sets["retain"])
    retain = [*case.sets["retain"], *(row for row in written if not _threes([row]) & own)]
    return configured(Case({**case.sets, "retain": retain}, case.model, None, case.batch_size), seed)


def _threes(rows: Sequence[Example]) -> set[tuple[int, ...]]:
    return {row.input_ids[place : place + 3] for row in rows for place in range(len(row.input_ids) - 2)}


AT_RANDOM: dict[str, Any] = {"method": "random_neurons", "fraction": 0.3, "paced": False, "lr": LR}
RELEARNING: dict[str, Any] = {"adversary_lr": 3e-4}
VARIANTS: Mapping[str, Variant] = {
    "simu": configured,
    "the same as a plain loop": looped,
    "retain term KL": partial(configured, retain_term="kl"),
    "retain weight 4": partial(configured, retain_weight=4.0),
    "objective NPO": partial(configured, objective="npo"),
    "objective SimNPO": partial(configured, objective="simnpo"),
    "objective SatImp": partial(configured, objective="satimp"),
    "curvature of the neurons only": partial(configured, curvature="neurons"),
    "covariance of the outputs of rank 8": partial(looped, after=partial(of_rank, 8)),
    "covariance of the outputs of rank 32": partial(looped, after=partial(of_rank, 32)),
    "30 % of the neurons, contrast": partial(configured, fraction=0.3),
    "30 % of the neurons, at random": partial(configured, **{**own_choices("simu"), **AT_RANDOM}),
    "units: gate and up rows, too": partial(configured, units=True),
    "neurons that support the forget set": partial(looped, neurons=supporting),
    "... and toward zero only": partial(looped, neurons=supporting, after=toward_zero),
    "four layered folds": partial(folded, folds=4),
    "200 texts of its own rehearsed": partial(rehearsed, samples=200),
    "adversary, trained weights": partial(configured, **RELEARNING),
    "adversary, all weights": partial(configured, **RELEARNING, adversary_scope="all"),
    "adversary, all weights, 1e-4": partial(configured, adversary_lr=1e-4, adversary_scope="all"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "variants_cpu_202611.json", help="goes on from its rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for seed in options.seeds:
        for name in options.variants:
            if any((row["seed"], row["variant"]) == (seed, name) for row in rows):
                continue
            case = demo_case(seed)
            model, row = VARIANTS[name](case, seed)
            row = {"seed": seed, "variant": name, **row, **measured(model, case)}
            rows.append({**row, "back": attacked(model, case, TARGET.attack)})
            seeds = sorted({row["seed"] for row in rows})
            content = {"command": command(), "environment": environment(), "seeds": seeds, "rows": rows}
            write_result(options.out, force=True, claim="variants", **content)
            sys.stderr.write(f"seed {seed}, {name}: {rows[-1]['world']['whole']:.3f} {rows[-1]['back']}\n")


if __name__ == "__main__":
    main()
