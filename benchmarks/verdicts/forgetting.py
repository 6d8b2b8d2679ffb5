"""What the rows say of forgetting, keeping and relearning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from benchmarks.forgetting.harness.contenders import CONTROLS, DEFAULT, RIVALS
from benchmarks.forgetting.harness.tracing import divergence_of
from benchmarks.verdicts.paired import Value, at_most, difference, more, not_less
from benchmarks.verdicts.parts import Part, Row, part
from torch_simu.unlearning.demo.demo import DemoRecipe

TARGET = 0.1
SETS = ("retain", "world")
FIRST_AND_SECOND_ORDER = ("fo_graddiff", "so_graddiff")
LEADING = 2
"""The place of the twentieth among the shares of `benchmarks.forgetting.directions`."""
BEFORE_CHANGES = "covariances of the forget set"
"""What the variants change."""
NEVER_UNLEARNED = ("before", "retrained")


def averaged(rows: Sequence[Row], name: str, measure: str, **keys: object) -> float | None:
    """The mean of a measure of a set over the rows with these keys; None where there are none."""
    found = [row[name][measure] for row in rows if keys.items() <= row.items()]
    return mean(found) if found else None


def keeps_more(rows: Sequence[Row]) -> Iterator[Part]:
    """What SIMU keeps at the forget target, beside steps on all weights that have reached it as well."""
    ours = averaged(rows, "forget", "probability", method="simu_graddiff")
    yield part("mean forget probability of SIMU", ours, "at most", TARGET)
    reached = ours is not None and ours <= TARGET
    for other in FIRST_AND_SECOND_ORDER:
        theirs = averaged(rows, "forget", "probability", method=other)
        # What is kept before the target is reached does not compare.
        compares = reached and theirs is not None and theirs <= TARGET
        for name in SETS:
            kept, bar = (averaged(rows, name, "em", method=method) for method in ("simu_graddiff", other))
            claim = f"mean {name} EM of SIMU, beside that of {other}"
            yield part(claim, kept if compares else None, "more than", bar if compares else None)


def tuning(rows: Sequence[Row]) -> Iterator[Part]:
    """For each method, what the demo's choice keeps of the retain set, beside the best of the other tries."""
    shown = {row["method"] for row in rows}
    for method, choice in DemoRecipe().tuned.items():
        if method == "simu" and method not in shown:
            # It was tuned beside the others of `lasting`.
            continue
        tries: dict[bool, dict[tuple[object, ...], list[float]]] = {True: {}, False: {}}
        for row in rows:
            if row["method"] == method:
                group = tries[choice.items() <= row.items()]
                key = (row["lr"], row.get("rho"))
                group.setdefault(key, []).append(row["retain"]["em"] if row["reached"] else 0.0)
        mine, others = (max(map(mean, group.values()), default=None) for group in (tries[True], tries[False]))
        count = len(tries[True]) + len(tries[False])
        yield part(f"tries of {method}", count or None, "at least", 8)
        said = ", ".join(f"{name} {value:g}" for name, value in choice.items())
        yield part(f"mean retain EM of {method} at {said}, beside its best other try", mine, "at least", others)


def lasting(rows: Sequence[Row]) -> Iterator[Part]:
    """What the default keeps, moves and leaves to relearning, beside steps on all weights and masks of its size.

    Of each pair of methods the differences on the same seeds count, with their interval.
    """
    ours = [row for row in rows if row["method"] == DEFAULT]
    yield part(f"seeds of {DEFAULT}", len(ours) or None, "at least", 3 if _pretrained(rows) else 5)
    share = mean(compares(row) for row in ours) if ours else None
    yield part(f"share of runs of {DEFAULT} that reach the forget target", share, "at least", 1)
    kept = in_all(kept_by(rows))
    for other in RIVALS:
        yield more(f"kept, beside {other}", difference(rows, DEFAULT, other, kept))
        yield at_most(f"divergence, beside {other}", difference(rows, DEFAULT, other, divergence))
    for other in CONTROLS:
        yield not_less(f"kept, beside {other}", difference(rows, DEFAULT, other, kept))
    reached = [row for row in rows if compares(row)]
    found = {other: averaged(reached, "back", "probability", method=other) for other in RIVALS}
    measured = {other: value for other, value in found.items() if value is not None}
    best = min(measured, key=lambda other: measured[other], default=None)
    halved = None if best is None else difference(rows, DEFAULT, best, relearned, share=0.5)
    yield at_most(f"relearned, beside half of {best or 'the best of them'}", halved)


def kept_by(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """The sets that tell what is kept and their measure: a pretrained model answers few questions as a whole."""
    if _pretrained(rows):
        return tuple((name, "kept") for name in ("retain", "near", "world", "text"))
    return tuple((name, "whole") for name in ("retain", "near", "world") if any(name in row for row in rows))


def _pretrained(rows: Sequence[Row]) -> bool:
    # Only there is plain text among the sets.
    return any("text" in row for row in rows)


def compares(row: Row) -> bool:
    """Whether a row has reached the forget target; what it kept and what came back compares with nothing otherwise."""
    return bool(row.get("reached", True))


def in_all(sets: Sequence[tuple[str, str]]) -> Value:
    """The mean over sets of what a row keeps of each; None where it lacks one, or has not reached the target."""

    def value(row: Row) -> float | None:
        if not compares(row) or not all(name in row for name, _ in sets):
            return None
        return mean(row[name][measure] for name, measure in sets)

    return value


def divergence(row: Row) -> float | None:
    """How far the predictions of what is to be kept are from those of the model as it was, over the sets; nats."""
    if not compares(row) or not row.get("trace"):
        return None
    return divergence_of(row["trace"][-1])


def relearned(row: Row) -> float | None:
    """The mean probability that relearning brings back."""
    return row["back"]["probability"] if compares(row) else None


def variants(rows: Sequence[Row]) -> Iterator[Part]:
    """How many single changes of the default are better than it, and whether several together reach both bars."""
    names = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != BEFORE_CHANGES))
    better = []
    for name in (name for name in names if TOGETHER not in name):
        seeds = {row["seed"] for row in rows if row["variant"] == name}
        pair = [
            [row for row in rows if row["variant"] == each and row["seed"] in seeds] for each in (BEFORE_CHANGES, name)
        ]
        kept = [[averaged(found, of, "whole") or 0.0 for of in SETS] for found in pair]
        back = [averaged(found, "back", "probability") or 1.0 for found in pair]
        reached = all(row["reached"] for row in pair[1])
        better.append(reached and back[1] < back[0] and all(new >= old for old, new in zip(*kept, strict=True)))
    yield part("single changes that are better in all three", sum(better) if names else None, "at most", 0)
    yield part("variants that reach both bars on three seeds", len(reaching(rows)) if names else None, "at least", 1)


TOGETHER = " + "
"""What is between the names of changes that are made together."""
WORLD_BAR, BACK_BAR = 0.944, 0.267
"""The world answers of the best published step, and a third of what comes back of the paper's, in `lasting_demo`."""


def reaching(rows: Sequence[Row]) -> list[str]:
    """The variants with three seeds or more that keep and forget, in the mean over them, what both bars ask for."""
    found = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        ours = [row for row in rows if row["variant"] == name]
        if len(ours) >= 3 and all(compares(row) for row in ours):
            world, back = averaged(ours, "world", "whole"), averaged(ours, "back", "probability")
            if world is not None and back is not None and world >= WORLD_BAR and back <= BACK_BAR:
                found.append(name)
    return found


def directions(rows: Sequence[Row]) -> Iterator[Part]:
    """What lies in the leading twentieth of the directions of the forget set's activations: means over all rows."""
    diagonal = "the same with Sophia's diagonal and clip"

    def share(**keys: object) -> float | None:
        found = [row["shares"][LEADING] for row in rows if keys.items() <= row.items()]
        return mean(found) if found else None

    for method in ("simu", diagonal):
        yield part(
            f"of what relearning changes behind {method}", share(method=method, change="relearning"), "more than", 1 / 3
        )
    yield part("of what simu changed", share(method="simu", change="method"), "less than", 0.1)
    yield part(f"of what {diagonal} changed", share(method=diagonal, change="method"), "more than", 1 / 3)


def massive(rows: Sequence[Row]) -> Iterator[Part]:
    """How far one neuron moves the mean of a layer's diagonal, and how near the trimmed one is to the median."""
    means, trimmed = (
        [row[kind] / row[beside] for row in rows] for kind, beside in (("mean", "trimmed"), ("trimmed", "median"))
    )
    yield part("mean beside the trimmed one, most of all layers", max(means, default=None), "more than", 100)
    yield part("trimmed mean beside the median, most of all layers", max(trimmed, default=None), "at most", 4)


def recommending(rows: Sequence[Row]) -> Iterator[Part]:
    """What the recommended run of each model keeps beside the best of its grid, each set for itself."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    yield part("models", len(models) or None, "at least", 3)
    for model in models:
        grid = [row for row in rows if row["model"] == model and row["run"] == "grid"]
        yield part(f"runs of the grid on {model}", len(grid) or None, "at least", 20)
        ours = [row for row in rows if row["model"] == model and row["run"] == "recommended"]
        probability = ours[0]["forget"]["probability"] if ours else None
        yield part(f"mean forget probability of the recommended run on {model}", probability, "at most", TARGET)
        for name in SETS:
            best = max((row[name]["kept"] for row in grid if row["reached"]), default=None)
            bar = None if best is None else 0.95 * best
            yield part(
                f"kept of {name} on {model}, beside 95 % of the grid's best",
                ours[0][name]["kept"] if ours else None,
                "at least",
                bar,
            )


def robustness(rows: Sequence[Row]) -> Iterator[Part]:
    """Mean extraction strength (ES) after rounding and after the most steps of relearning, method by method."""
    last = max((row.get("relearn_steps", 0) for row in rows), default=0)

    def strength(method: str, attack: str, **keys: object) -> float | None:
        return averaged(rows, "forget", "es", method=method, attack=attack, **keys)

    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name not in NEVER_UNLEARNED]
    for method in methods:
        before = strength(method, "none")
        for kind in ("8bit", "4bit"):
            after = strength(method, f"rounded to {kind}")
            rise = None if before is None or after is None else after - before
            yield part(f"rise of the ES of {method}, rounded to {kind}", rise, "at most", 0.01)
    for attack in ("relearned from a third of the forget people", "relearned from unseen people"):
        bar = strength("retrained", attack, relearn_steps=last)
        for method in methods:
            after = strength(method, attack, relearn_steps=last)
            claim = f"ES of {method}, {attack}, beside that of retrained"
            yield part(claim, after, "at most", bar)


def attacks(rows: Sequence[Row]) -> Iterator[Part]:
    """Mean probabilities over seeds after each attack, and after the worst beside the rivals' and the paper's."""

    def after(method: str, attack: str) -> float | None:
        found = [row["probability"] for row in rows if (row["method"], row["attack"]) == (method, attack)]
        return mean(found) if found else None

    def worst(method: str) -> float | None:
        found = [after(method, attack) for attack in names]
        return max((each for each in found if each is not None), default=None)

    names = [name for name in dict.fromkeys(row["attack"] for row in rows) if name != "none"]
    for name in names:
        if name != "relearn":
            claim = f"probability of the default after {name}, beside relearn"
            yield part(claim, after("simu", name), "at most", after("simu", "relearn"))
    rivals = [worst(name) for name in RIVALS]
    least = None if None in rivals else min(rivals)
    for method in ("simu", "simu with an adversary of all weights"):
        of = "the default" if method == "simu" else "the default with an adversary"
        claim = f"probability of {of} after its worst attack, beside"
        paper = worst("simu_graddiff")
        half, third = None if least is None else least / 2, None if paper is None else paper / 3
        yield part(f"{claim} half of the least of the published steps", worst(method), "at most", half)
        yield part(f"{claim} a third of the paper's", worst(method), "at most", third)
