"""Plant facts in known columns, then say how well each score finds them, and what a better mask is worth.

Rules of selection are chosen on other seeds than the reported ones: `--seeds 10 11 12 --scores-only` writes them.
Usage: python -m benchmarks.planted.planted --seeds 0 1 2 3 4
       python -m benchmarks.planted.planted --plot docs/images/planted.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from benchmarks.planted.column_scores import RULES, Scores, auc, every_score
from benchmarks.planted.erasing import ERASING, RELEARN_BATCH, RELEARN_LR, RELEARN_STEPS, erased, recovery, zeroed
from benchmarks.planted.planting import Planted, PlantingRecipe, knowledge, norm_ratio, plant
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu import NeuronSelection
from torch_simu.attribution import Attribution

TUNING = RESULTS / "planted_tuning_cpu_202611.json"
SCORES = ("method", "objective", "rule")
MASK_RULES = {"exact": ("exact", "prob", "contrast"), "gradient_activation": ("gradient_activation", "logprob", "raw")}
"""Found mask -> method, objective and rule: that of `Attribution.contrast`, and the best other score."""
PATH_STEPS = 10

Row = dict[str, object]
Found = Mapping[tuple[str, str], tuple[Scores, Scores]]
"""Method and objective -> scores of the forget facts and of as many retain facts."""


def scored(planted: Planted, seed: int, *, steps: int = PATH_STEPS) -> Found:
    """All scores of all methods."""
    forget = planted.sets["forget"]
    # As many as are planted, so that noise is alike; none of them is a world fact.
    retain = planted.sets["retain"][: len(forget)]
    mine = {
        (method, objective): each
        for method, objective, each in every_score(planted.model, forget, steps=steps, seed=seed)
    }
    theirs = every_score(planted.model, retain, steps=steps, seed=seed + 1000)
    return {(method, objective): (mine[method, objective], each) for method, objective, each in theirs}


def ranked(scores: tuple[Scores, Scores], rule: str) -> dict[str, Tensor]:
    """Layer -> one score per column."""
    forget, retain = scores
    return {name: RULES[rule](forget[name], retain[name]) for name in forget}


def found_mask(scores: Mapping[str, Tensor], like: NeuronSelection) -> NeuronSelection:
    """As many columns of each layer as `like` has, those that score highest."""
    masks = {}
    for name, score in scores.items():
        masks[name] = torch.zeros(len(score), dtype=torch.bool)
        masks[name][score.sort(descending=True, stable=True).indices[: len(like[name])]] = True
    return NeuronSelection.from_masks(masks)


def found_rows(found: Found, truth: NeuronSelection) -> Iterator[Row]:
    """How well every method finds the planted columns under every rule."""
    planted = {name: truth.mask(name) for name in truth}
    for (method, objective), scores in found.items():
        for rule in RULES:
            score = ranked(scores, rule)
            layers = [auc(score[name], planted[name]) for name in truth]
            with warnings.catch_warnings():
                # Of the loss, no score need be positive: then nothing is selected.
                warnings.simplefilter("ignore", UserWarning)
                chosen = Attribution(score, {}, 1, {}).select(0.3)
            hits = (chosen & truth).num_selected
            yield {
                "kind": "scores",
                "method": method,
                "objective": objective,
                "rule": rule,
                "auc": mean(layers),
                "auc_lowest_layer": min(layers),
                "auc_all_layers": auc(torch.cat([score[name] for name in truth]), torch.cat(list(planted.values()))),
                "precision_at_k": precision(found_mask(score, truth), truth),
                "select_precision": hits / max(1, chosen.num_selected),
                "select_recall": hits / truth.num_selected,
            }


def precision(mask: NeuronSelection, truth: NeuronSelection) -> float:
    """Share of the mask that is planted; of a mask as large as the truth, also the recall."""
    return (mask & truth).num_selected / mask.num_selected


def masks_of(planted: Planted, found: Found, seed: int) -> dict[str, NeuronSelection]:
    """The true mask, found ones, and random ones as large: of all columns, and of those that are not planted."""
    truth, draw = planted.selection, torch.Generator().manual_seed(1000 + seed)
    noise = {name: torch.rand(size, generator=draw) for name, size in truth.num_neurons.items()}
    masks = {"true": truth}
    for name, (method, objective, rule) in MASK_RULES.items():
        masks[name] = found_mask(ranked(found[method, objective], rule), truth)
    masks["random"] = found_mask(noise, truth)
    masks["unplanted"] = found_mask({name: noise[name] - 2.0 * truth.mask(name) for name in truth}, truth)
    return masks


def erase_rows(planted: Planted, found: Found, seed: int) -> Iterator[Row]:
    """What each mask forgets and keeps, and what comes back; `never_knew` is the model before planting."""

    def row(mask: str, model: object, **more: object) -> Row:
        sets = {name: knowledge(model, planted.sets[name]) for name in ("forget", "retain", "world")}
        return {"kind": "erase", "mask": mask, **more, **sets, **recovery(model, planted, seed)}

    yield row("never_knew", planted.base)
    for name, mask in masks_of(planted, found, seed).items():
        model, done = erased(planted, mask, seed)
        without = zeroed(planted.model, mask)
        removed = {f"{each}_em_zeroed": knowledge(without, planted.sets[each])["em"] for each in ("forget", "retain")}
        yield row(name, model, precision=precision(mask, planted.selection), **done, **removed)


def planting_row(planted: Planted, recipe: PlantingRecipe) -> Row:
    """What was planted, how well, and how far the planted columns' norms are from the others'."""
    known = {name: knowledge(planted.model, facts) for name, facts in planted.sets.items()}
    before = {"forget_before": knowledge(planted.base, planted.sets["forget"])}
    counts = {"num_facts": len(planted.sets["forget"]), "num_columns": planted.selection.num_selected}
    ratio = norm_ratio(planted.model, planted.selection)
    return (
        {"kind": "planting", **counts, "share": recipe.share, "steps": planted.steps, "norm_ratio": ratio}
        | known
        | before
    )


def rows_of(seed: int, recipe: PlantingRecipe, *, erase: bool) -> Iterator[Row]:
    """All rows of one seed."""
    started = time.perf_counter()

    def say(what: str) -> None:
        sys.stderr.write(f"seed {seed}: {what} {time.perf_counter() - started:.0f} s\n")

    planted = plant(recipe, seed)
    yield planting_row(planted, recipe)
    say("planted")
    found = scored(planted, seed)
    yield from found_rows(found, planted.selection)
    say("scored")
    if erase:
        yield from erase_rows(planted, found, seed)
        say("erased")


def over_seeds(rows: Sequence[Row], kind: str, keys: Sequence[str]) -> list[Row]:
    """Mean and standard deviation over the seeds of every number of the rows of one kind, grouped by some keys."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            groups.setdefault(tuple(row[key] for key in keys), []).append(flat(row))
    summary = []
    for values, ours in groups.items():
        entry: Row = {"kind": kind, **dict(zip(keys, values, strict=True))}
        for name in ours[0]:
            if name not in ("seed", "kind", *keys):
                numbers = [float(row[name]) for row in ours]
                entry[name] = {"mean": mean(numbers), "std": stdev(numbers) if len(numbers) > 1 else 0.0}
        summary.append(entry)
    return summary


def flat(row: Mapping[str, object]) -> Row:
    """The row with the measures of its sets beside the others, as `set_measure`."""
    found: Row = {}
    for name, value in row.items():
        found |= {f"{name}_{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return found


def best_rules(summary: Sequence[Row]) -> list[Row]:
    """For every method and objective the rule of the largest mean AUC."""
    best: dict[tuple[object, object], Row] = {}
    for entry in summary:
        if entry["kind"] == "scores":
            key = entry["method"], entry["objective"]
            if key not in best or entry["auc"]["mean"] > best[key]["auc"]["mean"]:
                best[key] = entry
    return [{name: entry[name] for name in SCORES} for entry in best.values()]


def rounded(value: object) -> object:
    """Numbers with five digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--scores-only", action="store_true", help="do not erase")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "planted_cpu_202611.json")
    parser.add_argument("--plot", type=Path, help="draw the result file and do nothing else")
    options = parser.parse_args()
    if options.plot is not None:
        from benchmarks.planted.plot import plot_planted

        return plot_planted(
            json.loads(options.out.read_text()), json.loads(TUNING.read_text())["best_rules"], options.plot
        )
    torch.set_num_threads(1)
    recipe = PlantingRecipe()
    rows: list[Row] = []
    for number, seed in enumerate(options.seeds):
        rows += [rounded({"seed": seed, **row}) for row in rows_of(seed, recipe, erase=not options.scores_only)]
        summary = [
            *over_seeds(rows, "planting", ()),
            *over_seeds(rows, "scores", SCORES),
            *over_seeds(rows, "erase", ("mask",)),
        ]
        # After every seed, so that a run that is stopped leaves what it has.
        write_result(
            options.out,
            force=options.force or number > 0,
            claim="planted",
            command=command(),
            environment=environment(),
            seeds=options.seeds[: number + 1],
            rows=rows,
            summary=[rounded(entry) for entry in summary],
            best_rules=best_rules(summary),
            recipe=dataclasses.asdict(recipe) | {"path_steps": PATH_STEPS},
            erasing=ERASING.to_json(),
            relearning={"steps": RELEARN_STEPS, "lr": RELEARN_LR, "batch_size": RELEARN_BATCH},
        )


if __name__ == "__main__":
    main()
