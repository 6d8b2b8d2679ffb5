"""What the rows say of scores that are to find the neurons of a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

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
