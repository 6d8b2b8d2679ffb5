"""A cell's rows as tables: what is kept and what comes back, the other measures, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.forgetting.harness.contenders import DEFAULT
from benchmarks.forgetting.harness.tracing import at_budget, frontier
from benchmarks.verdicts.forgetting import NEVER_UNLEARNED, compares, divergence, in_all, kept_by, relearned
from benchmarks.verdicts.paired import Interval, Value, difference, interval
from benchmarks.verdicts.parts import Row
from torch_simu.unlearning.metrics.truth_ratio import forget_quality


def shown(found: Interval | None) -> str:
    """A mean with half the width of its interval; empty where nothing was measured."""
    if found is None:
        return ""
    return f"{found.middle:.3f}" if found.half is None else f"{found.middle:.3f} \u00b1 {found.half:.3f}"


def cell(rows: Sequence[Row], value: Value) -> str:
    """The interval of a figure over the runs that reached the target; empty where there is none, or one lacks it."""
    found = [value(row) for row in rows if compares(row)]
    return shown(interval(found)) if found and None not in found else ""


def of_set(name: str, measure: str) -> Value:
    """The value of a measure of a set."""
    return lambda row: row[name].get(measure) if name in row and compares(row) else None


def ended(rows: Sequence[Row]) -> str:
    """The mean forget probability at the end, and how many runs ended above the target, whose figures do not count."""
    missed = sum(not compares(row) for row in rows)
    said = f" ({missed} of {len(rows)} above)" if missed else ""
    return f"{mean(row['forget']['probability'] for row in rows):.3f}{said}"


def table(heads: Sequence[str], lines: Iterator[Sequence[str]]) -> Iterator[str]:
    """Lines of Markdown, without the columns that are empty on every line."""
    found = list(lines)
    filled = [place for place in range(len(heads)) if any(line[place] for line in found)]
    for line in (heads, ["---"] * len(heads), *found):
        cells = [line[place] for place in filled]
        yield f"|{'|'.join(cells)}|" if line[0] == "---" else f"| {' | '.join(cells)} |"


def by_method(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Each method with its rows, in the order of the file."""
    for method in dict.fromkeys(row["method"] for row in rows):
        yield method, [row for row in rows if row["method"] == method]


def only(result: Mapping[str, Any], methods: Collection[str], *, shared: bool = False) -> dict[str, Any]:
    """A result with the rows of some methods, where asked on the seeds alone that each of these has."""
    rows = [row for row in result["rows"] if row["method"] in methods]
    seeds = [{row["seed"] for row in ours} for _, ours in by_method(rows)]
    common = set.intersection(*seeds) if shared and seeds else set(result["seeds"])
    return {**result, "rows": [row for row in rows if row["seed"] in common]}


def kept_and_back(result: Mapping[str, Any]) -> Iterator[str]:
    """What each method keeps, and what relearning brings back: means, with 95 % intervals over the seeds."""
    rows = result["rows"]
    sets = kept_by(rows)

    def lines() -> Iterator[Sequence[str]]:
        for method, ours in by_method(rows):
            rate, counts = result["lr"].get(method), [row["steps"] for row in ours if "steps" in row]
            yield [
                method,
                f"{rate:g}" if rate else "",
                f"{mean(counts):.0f}" if counts else "",
                ended(ours),
                *(cell(ours, of_set(name, measure)) for name, measure in sets),
                cell(ours, relearned),
                cell(ours, of_set("format", "probability")),
            ]

    heads = [f"{name}, {measure}" for name, measure in sets]
    after = ["relearned, prob.", "near rows taught, prob."]
    yield from table(["method", "step size", "steps", "forget prob.", *heads, *after], lines())


def qualities(rows: Sequence[Row]) -> Callable[[Row], float | None]:
    """TOFU's forget quality of a row beside the model of its seed that never saw the forget set."""
    reference = {
        row["seed"]: row["truth"]["log_ratios"] for row in rows if row["method"] == "retrained" and "truth" in row
    }

    def quality(row: Row) -> float | None:
        if "truth" not in row or row["seed"] not in reference:
            return None
        return forget_quality(row["truth"]["log_ratios"], reference[row["seed"]])

    return quality


def told_by(attack: str) -> Value:
    """What a membership attack tells, by the area under the ROC."""
    return lambda row: row["attacks_on_membership"].get(attack) if "attacks_on_membership" in row else None


def starts(rows: Sequence[Row]) -> Mapping[int, float]:
    """Seed -> the forget probability of its model before anything was forgotten."""
    return {row["seed"]: row["forget"]["probability"] for row in rows if row["method"] == "before"}


def at_equal_divergence(rows: Sequence[Row], other: str) -> Value:
    """The forget probability of a row where it has moved what is to be kept as far as the default and another both did.

    On each seed that is as far as the one of the two that moved it less.
    """
    start = starts(rows)
    moved: dict[int, list[float | None]] = {}
    for row in rows:
        if row["method"] in (DEFAULT, other):
            moved.setdefault(row["seed"], []).append(divergence(row))

    def forgotten(row: Row) -> float | None:
        ends = moved[row["seed"]]
        if len(ends) < 2 or None in ends:
            return None
        return at_budget(row["trace"], start.get(row["seed"], 1.0), min(end for end in ends if end is not None))

    return forgotten


def frontiers(rows: Sequence[Row]) -> Callable[[Row], float | None]:
    """The frontier of a row, from where the model of its seed was before."""
    start = starts(rows)
    return lambda row: frontier(row["trace"], start.get(row["seed"], 1.0)) if "trace" in row else None


def measures(result: Mapping[str, Any]) -> Iterator[str]:
    """What else was measured of each method, where its rows have it."""
    rows = result["rows"]
    columns: dict[str, Value] = {
        "frontier": frontiers(rows),
        "KL to the start": divergence,
        "weights moved": lambda row: row.get("moved"),
        "hiding": lambda row: row["influence"]["hiding"] if "influence" in row else None,
        "forget ES": of_set("forget", "es"),
        "forget EM": of_set("forget", "em"),
        "in other words, prob.": of_set("otherwise", "probability"),
        "text perplexity": of_set("text", "perplexity"),
        "membership AUC": lambda row: row.get("membership"),
        **{f"by {name}": told_by(name) for name in ("zlib", "min_k", "min_k_plus_plus", "reference")},
        "forget quality": qualities(rows),
        "LUME": lambda row: row["lume"]["task_aggregate"] if "lume" in row else None,
    }
    lines = ([method, *(cell(ours, value) for value in columns.values())] for method, ours in by_method(rows))
    yield from table(["method", *columns], lines)


def differences(result: Mapping[str, Any]) -> Iterator[str]:
    """What the default has more than each other method on the same seeds, with 95 % intervals."""
    rows = result["rows"]
    sets = kept_by(rows)
    columns: dict[str, Value | None] = {
        **{f"{name}, {measure}": of_set(name, measure) for name, measure in sets},
        "all of them": in_all(sets),
        "frontier": frontiers(rows),
        "KL to the start": divergence,
        # Of each pair its own.
        "forget prob. at equal KL": None,
        "relearned, prob.": relearned,
    }
    others = [name for name, _ in by_method(rows) if name not in (*NEVER_UNLEARNED, DEFAULT)]
    lines = (
        [
            name,
            *(
                shown(difference(rows, DEFAULT, name, value or at_equal_divergence(rows, name)))
                for value in columns.values()
            ),
        ]
        for name in others
    )
    yield from table([f"{DEFAULT} less", *columns], lines)


def variants(result: Mapping[str, Any]) -> Iterator[str]:
    """What each change of the default keeps and lets come back: means over its seeds."""
    names = dict.fromkeys(row["variant"] for row in result["rows"])
    groups = {name: [row for row in result["rows"] if row["variant"] == name] for name in names}
    sets = [(name, "whole") for name in ("retain", "world")]
    lines = (
        [
            name,
            f"{len(ours)}",
            f"{mean(row['steps'] for row in ours):.0f}",
            ended(ours),
            *(cell(ours, of_set(each, measure)) for each, measure in sets),
            cell(ours, relearned),
        ]
        for name, ours in groups.items()
    )
    heads = [f"{name}, {measure}" for name, measure in sets]
    yield from table(["change", "seeds", "steps", "forget prob.", *heads, "relearned, prob."], lines)
