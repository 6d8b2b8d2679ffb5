"""Result files as the Markdown tables of the pages, so that prose and files agree; `benchmarks.pages` writes them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from statistics import mean, median

from benchmarks import scale
from benchmarks.forgetting.harness.contenders import CONTROLS, DEFAULT, MASKS, METHODS, OBJECTIVES, RIVALS
from benchmarks.forgetting.harness.tables import kept_and_back, only, variants
from benchmarks.forgetting.recommended import recommended
from benchmarks.job.pages import jobs
from benchmarks.optimizer.beside import beside
from benchmarks.planted import group_masks
from benchmarks.planted.budgets import quality
from benchmarks.pretrained.budgets import budgets
from benchmarks.results import RESULTS
from benchmarks.verdicts.forgetting import NEVER_UNLEARNED


def loaded(name: str) -> dict:
    """A result file of this month's processor runs."""
    return json.loads((RESULTS / f"{name}_cpu_202611.json").read_text())


def bytes_of(count: float) -> str:
    """A number of bytes in decimal units."""
    return "0 B" if not count else f"{count / 1e6:.2f} MB"


def spread(values: list[float]) -> str:
    """The mean, with the smallest and largest where there are several."""
    middle = f"{mean(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f}-{max(values):.3f})"


def kept(name: str) -> Iterator[str]:
    """What each method keeps at the forget target: mean over the seeds, and the range."""
    rows = loaded(name)["rows"]
    attacked = all("attack" in row for row in rows)
    yield "| method | forget prob. | retain EM | world EM | weights changed | optimizer state |" + (
        " relearned, prob. |" if attacked else ""
    )
    yield "|---|---|---|---|---|---|" + ("---|" if attacked else "")
    for method in dict.fromkeys(row["method"] for row in rows):
        ours = [row for row in rows if row["method"] == method]
        cells = [f"{mean(row['forget']['probability'] for row in ours):.3f}"]
        cells += [spread([row[each]["em"] for row in ours]) for each in ("retain", "world")]
        cells += [f"{100 * mean(row['changed_share'] for row in ours):.3g} %"]
        cells += [bytes_of(mean(row["optimizer_bytes"] for row in ours))]
        if attacked:
            cells += [spread([row["attack"]["relearn"]["probability"] for row in ours])]
        yield f"| {method} | {' | '.join(cells)} |"


def compared(methods: Collection[str]) -> Iterator[str]:
    """What some methods keep on the demo's people and what comes back, on the seeds that all of them have."""
    yield from kept_and_back(only(loaded("lasting_demo"), methods, shared=True))


def steps(size: str, fraction: float, run: str = "optimizer_step") -> Iterator[str]:
    """Milliseconds of a step on one size and fraction, and over those of ours."""
    rows = [row for row in loaded(run)["rows"] if row["size"] == size and row["fraction"] == fraction]
    medians = {row["optimizer"]: row["median"] for row in rows if "median" in row}
    yield "| optimizer | step | over simu | over simu_compact |"
    yield "|---|---|---|---|"
    for name, found in medians.items():
        over = [f"{found / medians[ours]:.1f}" for ours in ("simu", "simu_compact")]
        yield f"| {name} | {found:.2f} ms | {' | '.join(over)} |"


def memory(size: str, fraction: float) -> Iterator[str]:
    """State and peak of a step on one size and fraction."""
    yield "| optimizer | state | over two compact moments | peak of three steps |"
    yield "|---|---|---|---|"
    for row in loaded("optimizer_memory")["rows"]:
        if row["size"] == size and row["fraction"] == fraction and "state_bytes" in row:
            peak = bytes_of(row["peak_over_weights_and_gradients"])
            yield f"| {row['optimizer']} | {bytes_of(row['state_bytes'])} | {row['state_ratio']:.2f} | {peak} |"


def whitened() -> Iterator[str]:
    """Step, refreshes and state of the whitened curvatures beside the diagonal one, at several shares of neurons."""
    result = loaded("optimizer_whitened")
    held = {(row["fraction"], row["curvature"]): row["bytes"] for row in result["rows"] if row["what"] == "state"}
    yield "| neurons | curvature | step over diagonal | refreshes in 100 steps over steps | state | over diagonal |"
    yield "|---|---|---|---|---|---|"
    for row in result["ratios"]:
        fraction, name = row["fraction"], row["curvature"]
        own, layers = held[fraction, name], next(r["layers"] for r in result["rows"] if r.get("fraction") == fraction)
        cells = [f"{row['step_over_diagonal']:.2f}", f"{row['refreshes_in_100_steps_over_steps']:.0%}"]
        cells += [f"{bytes_of(own / layers)} a layer", f"{own / held[fraction, 'diagonal']:.2f}"]
        yield f"| {fraction:.0%} | {name} | {' | '.join(cells)} |"


def whitened_solves() -> Iterator[str]:
    """Ways to solve the step of one layer: best time, and the errors beside float64."""
    yield "| neurons | damping | way | processor time | relative error | residual |"
    yield "|---|---|---|---|---|---|"
    for row in loaded("optimizer_whitened")["rows"]:
        if row["what"] == "solve":
            best = f"{min(row['processor_milliseconds']):.2f} ms"
            errors = f"{row['relative_error']:.1e} | {row['residual']:.1e}"
            yield f"| {row['fraction']:.0%} | {row['damping']:g} | {row['way']} | {best} | {errors} |"


def methods() -> Iterator[str]:
    """Seconds of each method of attribution, best of the repeats, and how far it is from one pass per prefix."""
    result = loaded("attribution")
    yield "| method | all positions | a quarter | relative error | rank correlation |"
    yield "|---|---|---|---|---|"
    for name in result["summary"][0]["best_seconds"]:
        seconds = [f"{each['best_seconds'][name]:.3f} s" for each in result["summary"]]
        ours = [row for row in result["rows"] if row["method"] == name]
        error, rank = max(row["relative_error"] for row in ours), min(row["spearman"] for row in ours)
        yield f"| {name} | {' | '.join(seconds)} | {error:.1g} | {rank:.3f} |"


def knockout() -> Iterator[str]:
    """Loss of each set without the neurons that each score puts highest: mean over the seeds, and the range."""
    rows = [row for row in loaded("knockout")["rows"] if "forget" in row]
    shares = sorted({row["share"] for row in rows} - {0.0})
    yield (
        "| score | "
        + " | ".join(f"{each} without {share:.0%}" for share in shares for each in ("forget", "retain"))
        + " |"
    )
    yield "|" + "---|" * (1 + 2 * len(shares))
    for name in dict.fromkeys(row["score"] for row in rows):
        cells = []
        for share in shares:
            ours = [row for row in rows if row["score"] == name and row["share"] in (share, 0.0)]
            cells += [spread([row[each]["nll"] for row in ours]) for each in ("forget", "retain")]
        yield f"| {name} | {' | '.join(cells)} |"


def hooks() -> Iterator[str]:
    """What capturing adds to a forward and backward pass, as time and as bytes held between the two."""
    yield "| capture | parameters | allocator | time over a pass without | held between forward and backward |"
    yield "|---|---|---|---|---|"
    for row in loaded("hooks")["rows"]:
        held = "its own pass" if row["held_bytes"] is None else bytes_of(row["held_bytes"])
        ratio = "{median:.3f} ({low:.3f}-{high:.3f})".format(**row["ratio"])
        yield f"| {row['variant']} | {row['parameters']} | {row['allocator']} | {ratio} | {held} |"


def robustness() -> Iterator[str]:
    """Extraction strength of forget people that no attack shows: mean over the seeds, and the range."""
    rows = loaded("robustness")["rows"]
    most = max(row.get("relearn_steps", 0) for row in rows)
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    yield "| method | " + " | ".join(attacks) + " |"
    yield "|---|" + "---|" * len(attacks)
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for attack in attacks:
            ours = [row for row in rows if (row["method"], row["attack"]) == (method, attack)]
            cells.append(spread([row["forget"]["es"] for row in ours if row.get("relearn_steps", most) == most]))
        yield f"| {method} | {' | '.join(cells)} |"


def attacks() -> Iterator[str]:
    """Probability of the scored rows after the worst of each attack: mean over the seeds, and the range."""
    rows = loaded("attacks")["rows"]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    yield "| method | " + " | ".join(f"`{name}`" if name != "none" else name for name in names) + " |"
    yield "|---|" + "---|" * len(names)
    for method in dict.fromkeys(row["method"] for row in rows):
        found = ([r["probability"] for r in rows if (r["method"], r["attack"]) == (method, name)] for name in names)
        yield f"| {method} | {' | '.join(map(spread, found))} |"


def deltas() -> Iterator[str]:
    """Bytes held under checkpointing, and time beside a masked dense gradient."""
    rows = loaded("deltas")["rows"]
    yield "| | bitsandbytes' own layers | with deltas | ratio |"
    yield "|---|---|---|---|"
    for mode in ("train", "eval"):
        held = {row["layer"]: row["bytes"] for row in rows if row["what"] == "held" and row["mode"] == mode}
        theirs, ours = held["bitsandbytes"], held["with deltas"]
        yield f"| held, {mode} mode | {bytes_of(theirs)} | {bytes_of(ours)} | {ours / theirs:.2f} |"
    yield "| | **dense gradient and mask** | **with deltas** | |"
    for row in rows:
        if row["what"] == "time":
            theirs, ours = (f"{median(values):.0f} ms" for values in row["milliseconds"].values())
            yield f"| forward and backward, {row['fraction']:.0%} | {theirs} | {ours} | {row['ratio']:.2f} |"


def planted() -> Iterator[str]:
    """How well each score finds planted columns, under the rule that was best on other seeds: mean and deviation."""
    result = loaded("planted")
    found = {
        (row["method"], row["objective"], row["rule"]): row for row in result["summary"] if row["kind"] == "scores"
    }
    tuned = [found[each["method"], each["objective"], each["rule"]] for each in loaded("planted_tuning")["best_rules"]]
    plain = [
        row for key, row in found.items() if key[:2] in (("exact", "logprob"), ("exact", "prob"), ("exact", "loss"))
    ]
    plain = [row for row in plain if row["rule"] in ("raw", "contrast") and row not in tuned]
    yield "| score | objective | rule | AUC | precision and recall at k |"
    yield "|---|---|---|---|---|"
    for row in sorted([*tuned, *plain], key=lambda row: -row["auc"]["mean"]):
        name = " ".join(row["method"].split("_"))
        rule = " ".join(row["rule"].split("_")) + ("" if row in tuned else " (not tuned)")
        auc = f"{row['auc']['mean']:.3f} ({row['auc']['std']:.3f})"
        yield f"| {name} | {row['objective']} | {rule} | {auc} | {row['precision_at_k']['mean']:.3f} |"


def planted_masks() -> Iterator[str]:
    """What each mask erases and keeps, and what comes back: mean and deviation over the seeds."""
    heads = (
        "mask",
        "precision",
        "retain EM",
        "world EM",
        "others after a third",
        "after unrelated",
        "forget EM zeroed",
    )
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|---|---|---|---|---|"
    for row in loaded("planted")["summary"]:
        if row["kind"] != "erase":
            continue
        keys = ("precision", "retain_em", "world_em", "hidden_after_a_third_probability")
        keys += ("hidden_after_unrelated_probability", "forget_em_zeroed")
        cells = [f"{row[key]['mean']:.3f} ({row[key]['std']:.3f})" if key in row else "" for key in keys]
        yield f"| {' '.join(row['mask'].split('_'))} | {' | '.join(cells)} |"


def reliability() -> Iterator[str]:
    """What was tried against the package, how often, and how often it was withstood."""
    yield "| what was tried | by | times | withstood |"
    yield "|---|---|---|---|"
    for row in loaded("reliability")["rows"]:
        yield f"| {row['what']} | `{row['file']}` | {row['tried']:,} | {row['withstood']:,} |"


def verdicts() -> Iterator[str]:
    """What of each claim its rows bear out, and the figures of the parts that they deny."""
    yield "| result | claim holds | parts that hold | parts that fail: measured, and what the claim needs |"
    yield "|---|---|---|---|"
    for path in sorted(RESULTS.glob("*.json")):
        verdict = json.loads(path.read_text())["verdict"]
        held = [part["holds"] for part in verdict["parts"]].count(True)
        failed = [
            f"{part['claim']}: {part['measured']:g}, {part['needs']} {part['bar']:g}"
            for part in verdict["parts"]
            if part["holds"] is False
        ]
        holds = {True: "yes", False: "**no**"}.get(verdict["holds"], verdict["holds"])
        yield f"| `{path.stem}` | {holds} | {held} of {len(verdict['parts'])} | {'<br>'.join(failed)} |"


TABLES = {
    "verdicts": verdicts,
    "demo": lambda: kept("demo"),
    "demo_no_topic": lambda: kept("demo_no_topic"),
    "tofu_forget01": lambda: kept("tofu_forget01"),
    "optimizer_step": lambda: steps("bar", 0.05),
    "optimizer_step_second": lambda: steps("bar", 0.05, "optimizer_step_second"),
    "optimizer_peers": lambda: beside(loaded("optimizer_peers")["rows"]),
    "job": lambda: jobs(loaded("job")["rows"]),
    "optimizer_whitened": whitened,
    "optimizer_whitened_solves": whitened_solves,
    "optimizer_memory": lambda: memory("bar", 0.05),
    "attribution": methods,
    "attribution_budget": lambda: budgets(loaded("attribution_budget")["rows"]),
    "attribution_quality": lambda: quality(loaded("attribution_quality")["rows"]),
    "knockout": knockout,
    "hooks": hooks,
    "planted": planted,
    "planted_masks": planted_masks,
    "planted_groups": lambda: group_masks.scores_table(loaded("planted_groups")["rows"]),
    "planted_groups_without": lambda: group_masks.without_table(loaded("planted_groups")["rows"]),
    "planted_groups_erased": lambda: group_masks.erased_table(loaded("planted_groups")["rows"]),
    "robustness": robustness,
    "attacks": attacks,
    "deltas": deltas,
    "reliability": reliability,
    "scale_models": scale.models,
    "scale_memory": scale.memory,
    "lasting_demo": lambda: kept_and_back(only(loaded("lasting_demo"), [*NEVER_UNLEARNED, *METHODS])),
    "lasting_demo_masks": lambda: compared([DEFAULT, *CONTROLS, *MASKS]),
    "lasting_demo_objectives": lambda: compared([DEFAULT, RIVALS[0], *OBJECTIVES]),
    "variants": lambda: variants(loaded("variants")),
    "lasting_tofu": lambda: kept_and_back(loaded("lasting_tofu")),
    "lasting_pretrained": lambda: kept_and_back(loaded("lasting_pretrained")),
    "recommending": lambda: recommended(loaded("recommending")["rows"]),
}
"""Name in the pages, behind `<!-- table: NAME -->` and an empty line -> its lines."""
