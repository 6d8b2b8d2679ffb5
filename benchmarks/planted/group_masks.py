"""Erase one planted group by its own columns, by those found, by random ones or by another group's: what is that worth?

Three groups of people are planted in a twentieth of the columns each (`groups`). Every attribution is scored by how
well it finds each group's columns, among all columns and among those of the other groups. Then the first group is
forgotten by `unlearn` with each mask, to the same target and within as many steps, and attacked by relearning.
Usage: python -m benchmarks.planted.group_masks --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.planted.budgets import WAYS, scored
from benchmarks.planted.column_scores import auc
from benchmarks.planted.groups import KNOWN_BEFORE, Groups, GroupsRecipe, plant_groups, without_columns
from benchmarks.planted.planted import precision, rounded
from benchmarks.planted.planting import knowledge, norm_ratio
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu import NeuronSelection
from torch_simu.attribution import Attribution
from torch_simu.layers import select_layers
from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.driver import unlearn

Row = dict[str, Any]
ERASED = "group 1"
OTHER = "group 2"
FOUND_BY = ("midpoint 10", "one midpoint", "budget 2", "gradient x activation")
"""Of `WAYS`: integrated gradients with ten midpoints and with one, the estimate, and one step."""
ERASING = UnlearnConfig(
    forget_target=0.1, max_steps=200, forget_batch_size=24, retain_batch_size=24, hessian_batch_size=24
)
ATTACK = AttackConfig(rates=(2e-4, 5e-4, 1e-3), steps=40, interval=10, batch_size=8, eval_batch_size=128)
"""As the demo's rows are attacked elsewhere; a third of a group's facts are the attacker's."""


def scores_of(groups: Groups, group: str) -> Iterator[tuple[str, str, Mapping[str, Tensor]]]:
    """Way, rule and the scores of every column."""
    facts = groups.sets[group]
    # As many as are planted, so that noise is alike.
    retain = groups.sets["retain"][: len(facts)]
    for way in FOUND_BY:
        forget = scored(groups.model, facts, 0, WAYS[way])
        yield way, "raw", forget.scores
        yield way, "contrast", forget.contrast(scored(groups.model, retain, 0, WAYS[way])).scores
    layers = select_layers(groups.model, groups.columns[group])
    yield "norm of the column", "raw", {name: layer.weight.detach().norm(dim=0) for name, layer in layers.items()}


def score_rows(groups: Groups) -> Iterator[Row]:
    """How well every score finds the columns of each group: among all, and among those of all groups."""
    for group, own in groups.columns.items():
        others = {name: mask for name, mask in groups.columns.items() if name != group}
        for way, rule, scores in scores_of(groups, group):
            among = []
            for layer, score in scores.items():
                planted = [own[layer], *(mask[layer] for mask in others.values())]
                places = torch.tensor([index for part in planted for index in part])
                among.append(auc(score[places], torch.arange(len(places)) < len(planted[0])))
            yield {
                "kind": "scores",
                "group": group,
                "way": way,
                "rule": rule,
                "auc": mean(auc(score, own.mask(layer)) for layer, score in scores.items()),
                "auc_among_groups": mean(among),
            }


def masks_of(groups: Groups, seed: int) -> dict[str, NeuronSelection]:
    """Own, found, random and another group's columns, as many each, and all of them."""
    own = groups.columns[ERASED]
    found = {(way, rule): scores for way, rule, scores in scores_of(groups, ERASED)}

    def top(way: str, rule: str) -> NeuronSelection:
        return Attribution({name: score.double() for name, score in found[way, rule].items()}, {}, 1, {}).top(
            own.fraction
        )

    return {
        "own": own,
        "found by ten midpoints": top("midpoint 10", "contrast"),
        "found by gradient x activation": top("gradient x activation", "contrast"),
        # Another draw than that of the columns to plant in.
        "random": NeuronSelection.random(groups.model, own.fraction, torch.Generator().manual_seed(1000 + seed)),
        "another group's": groups.columns[OTHER],
        "all": NeuronSelection.full(groups.model, list(own)),
    }


def erase_row(groups: Groups, mask: str, model: PreTrainedModel, **more: object) -> Row:
    """What a model knows of every set, and what relearning brings back of the first group."""
    attack = attack_model(model, groups.sets[ERASED], attacks=["relearn"], config=ATTACK)["relearn"]
    back = {key: attack.worst[key] for key in ("probability", "es")}
    sets = {name: knowledge(model, facts) for name, facts in groups.sets.items()}
    return {"kind": "erase", "mask": mask, **more, "sets": sets, "back": back}


def erase_rows(groups: Groups, seed: int, config: UnlearnConfig = ERASING) -> Iterator[Row]:
    """The first group forgotten by each mask; "never knew" is the model before any group was planted."""
    yield erase_row(groups, "before", groups.model)
    yield erase_row(groups, "never knew", groups.base)
    for name, mask in masks_of(groups, seed).items():
        model = copy.deepcopy(groups.model)
        facts, retain = groups.sets[ERASED], groups.sets["retain"]
        done = unlearn(model, facts, retain, config=config.updated(seed=seed), selection=mask)
        right = precision(mask, groups.columns[ERASED])
        yield erase_row(groups, name, model, precision=right, steps=done.steps, reached=done.reached)


def planting_rows(groups: Groups) -> Iterator[Row]:
    """What was planted and how well, and what is known without each group's columns."""
    ratios = {name: norm_ratio(groups.model, mask) for name, mask in groups.columns.items()}
    known = {name: knowledge(groups.model, facts) for name, facts in groups.sets.items()}
    before = {name: knowledge(groups.base, facts) for name, facts in groups.sets.items()}
    sizes = {name: len(facts) for name, facts in groups.sets.items()}
    columns = {name: mask.num_selected for name, mask in groups.columns.items()}
    told = {"rows": sizes, "columns": columns, "norm_ratio": ratios, "sets": known, "sets_before": before}
    yield {"kind": "planting", **groups.told, **told}
    for name, sets in without_columns(groups).items():
        yield {"kind": "without", "group": name, "em": sets}


def rows_of(seed: int, recipe: GroupsRecipe, config: UnlearnConfig = ERASING) -> Iterator[Row]:
    """All rows of one seed."""
    started = time.process_time()
    groups = plant_groups(recipe, seed)
    for rows in (planting_rows(groups), score_rows(groups), erase_rows(groups, seed, config)):
        for row in rows:
            sys.stderr.write(f"{time.process_time() - started:.0f} s {row}\n")
            yield row


def scores_table(rows: Sequence[Row]) -> Iterator[str]:
    """How well each score finds a group's columns: means over groups and seeds, and the smallest."""
    yield "| score | rule | AUC among all columns | AUC among those of the groups |"
    yield "|---|---|---|---|"
    ours = [row for row in rows if row["kind"] == "scores"]
    for way, rule in dict.fromkeys((row["way"], row["rule"]) for row in ours):
        found = [row for row in ours if (row["way"], row["rule"]) == (way, rule)]
        cells = [
            f"{mean(values):.3f} (from {min(values):.3f})"
            for values in ([row[key] for row in found] for key in ("auc", "auc_among_groups"))
        ]
        yield f"| {way} | {rule} | {' | '.join(cells)} |"


def without_table(rows: Sequence[Row]) -> Iterator[str]:
    """EM of every set without a group's columns: means over the seeds."""
    ours = [row for row in rows if row["kind"] == "without"]
    sets = list(ours[0]["em"])
    yield f"| without the columns of | {' | '.join(f'EM of {name}' for name in sets)} |"
    yield "|---|" + "---|" * len(sets)
    for group in dict.fromkeys(row["group"] for row in ours):
        found = [row["em"] for row in ours if row["group"] == group]
        yield f"| {group} | {' | '.join(f'{mean(each[name] for each in found):.3f}' for name in sets)} |"


def erased_table(rows: Sequence[Row]) -> Iterator[str]:
    """What each mask forgets and keeps, and what comes back: means over the seeds, and the range."""
    ours = [row for row in rows if row["kind"] == "erase"]
    heads = (
        "mask",
        "right columns",
        "steps",
        "forget prob.",
        "EM of the other groups",
        "retain EM",
        "world EM",
        "back",
    )
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for mask in dict.fromkeys(row["mask"] for row in ours):
        found = [row for row in ours if row["mask"] == mask]
        others = [mean(row["sets"][name]["em"] for name in row["sets"] if is_other(name)) for row in found]
        steps, right = ([row[key] for row in found if key in row] for key in ("steps", "precision"))
        missed = sum(not row.get("reached", True) for row in found)
        forget = f"{mean(row['sets'][ERASED]['probability'] for row in found):.3f}"
        cells = [f"{mean(right):.2f}" if right else "", f"{mean(steps):.0f}" if steps else ""]
        cells += [forget + (f" ({missed} of {len(found)} above)" if missed else "")]
        em = [[row["sets"][name]["em"] for row in found] for name in KNOWN_BEFORE]
        cells += [ranged(values) for values in (others, *em, [row["back"]["probability"] for row in found])]
        yield f"| {mask} | {' | '.join(cells)} |"


def is_other(name: str) -> bool:
    """Whether a set is a group that is not erased."""
    return name not in (ERASED, *KNOWN_BEFORE)


def ranged(values: Sequence[float]) -> str:
    """The mean, with the smallest and the largest."""
    return f"{mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "planted_groups_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = GroupsRecipe()
    rows: list[Row] = []
    for number, seed in enumerate(options.seeds):
        rows += [rounded({"seed": seed, **row}) for row in rows_of(seed, recipe)]
        # After every seed, so that a run that is stopped leaves what it has.
        write_result(
            options.out,
            force=options.force or number > 0,
            claim="planted_groups",
            command=command(),
            environment=environment(),
            seeds=options.seeds[: number + 1],
            rows=rows,
            recipe=dataclasses.asdict(recipe),
            erasing=ERASING.to_json(),
            attack=ATTACK.to_json(),
        )


if __name__ == "__main__":
    main()
