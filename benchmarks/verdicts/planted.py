"""What the rows say of scores that are to find the neurons of a set, and of masks that are to erase it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from benchmarks.verdicts.paired import at_most, difference, more, not_less
from benchmarks.verdicts.parts import Part, Row, part


def planted(rows: Sequence[Row]) -> Iterator[Part]:
    """The largest mean AUC of exact attribution and of the others, each under its best rule, and what comes back."""
    tries: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        if row["kind"] == "scores":
            tries.setdefault((row["method"], row["objective"], row["rule"]), []).append(row["auc"])
    means = {key: mean(values) for key, values in tries.items()}
    exact = max((value for key, value in means.items() if key[0] == "exact"), default=None)
    others = {key: value for key, value in means.items() if key[0] != "exact"}
    best = max(others, key=others.__getitem__, default=None)
    yield part("mean AUC of exact attribution", exact, "at least", 0.95)
    name = "the best other score" if best is None else ", ".join(map(str, best))
    yield part(f"mean AUC of exact attribution, beside {name}", exact, "more than", others.get(best))

    def left(mask: str) -> float | None:
        erased = [row for row in rows if row["kind"] == "erase" and row["mask"] == mask]
        return mean(row["hidden_after_a_third"]["probability"] for row in erased) if erased else None

    for mask in ("true", "exact"):
        claim = f"probability of the other facts after a third is learned again, {mask} mask beside a random one"
        yield part(claim, left(mask), "less than", left("random"))


def knockout(rows: Sequence[Row]) -> Iterator[Part]:
    """What is lost without the 30 % of neurons that each score puts highest, mean over the seeds."""

    def without(score: str, measure: str) -> float | None:
        found = [row["forget"][measure] for row in rows if (row["score"], row.get("share")) == (score, 0.3)]
        return mean(found) if found else None

    for score in ("logprob", "logprob, contrast"):
        claim = f"forget loss without the top 30 % by {score}, beside random ones"
        yield part(claim, without(score, "nll"), "more than", without("random", "nll"))
        yield part(f"forget EM without the top 30 % by {score}", without(score, "em"), "at most", 0.5)
    claim = "forget loss without the top 30 % by the literal loss, beside random ones"
    yield part(claim, without("loss (literal)", "nll"), "at most", without("random", "nll"))


def groups(rows: Sequence[Row]) -> Iterator[Part]:
    """Whether the planting holds, which score finds a group's columns, and what the choice of columns is worth."""
    without = [row for row in rows if row["kind"] == "without"]
    own = [row["em"][row["group"]] for row in without]
    others = [value for row in without for name, value in row["em"].items() if name != row["group"]]
    yield part("largest EM of a group without its own columns", max(own, default=None), "at most", 0.75)
    yield part("mean EM of all others without a group's columns", mean(others) if others else None, "at least", 0.9)
    tries: dict[tuple[object, object], list[float]] = {}
    for row in rows:
        if row["kind"] == "scores":
            tries.setdefault((row["way"], row["rule"]), []).append(row["auc"])
    means = {key: mean(values) for key, values in tries.items()}
    exact = means.get(("midpoint 10", "contrast"))
    yield part("mean AUC of ten midpoints, contrast", exact, "at least", 0.95)
    for rule in ("raw", "contrast"):
        claim = f"mean AUC of ten midpoints, contrast, beside gradient x activation, {rule}"
        yield part(claim, exact, "at least", means.get(("gradient x activation", rule)))
    # What has not reached the target compares with nothing.
    erased = [row | {"method": row["mask"]} for row in rows if row["kind"] == "erase" and row.get("reached", True)]
    for other in ("random", "another group's"):
        yield more(f"kept, own columns beside {other}", difference(erased, "own", other, kept))
        yield at_most(f"relearned, own columns beside {other}", difference(erased, "own", other, back))
    found = "found by ten midpoints"
    yield not_less(f"kept, columns {found} beside own", difference(erased, found, "own", kept))
    yield at_most(f"relearned, columns {found} beside random", difference(erased, found, "random", back))


def kept(row: Row) -> float:
    """The mean probability of what is not to be forgotten: the other groups, the retain set and the world facts."""
    return mean(row["sets"][name]["probability"] for name in row["sets"] if name != "group 1")


def back(row: Row) -> float:
    """What relearning brings back."""
    return row["back"]["probability"]
