"""Cells as tables and verdicts: paired differences over seeds, and columns of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from benchmarks.forgetting.harness.contenders import CONTROLS, RIVALS
from benchmarks.forgetting.harness.tables import at_equal_divergence, differences, kept_and_back, measures, only
from benchmarks.forgetting.harness.tracing import at_budget, at_level, frontier
from benchmarks.pages.cells import page
from benchmarks.verdicts.claims import CLAIMS
from benchmarks.verdicts.paired import difference, interval
from benchmarks.verdicts.parts import NOT_MEASURED

SEEDS = range(5)
NOISE = (0.0, 0.01, -0.01, 0.005, -0.005)


def rows_of(method: str, kept: float, kl: float, back: float) -> list[dict]:
    """A row a seed, each a little other than the next."""
    return [
        {
            "seed": seed,
            "method": method,
            "forget": {"probability": 0.05, "es": 0.1, "em": 0.2},
            "retain": {"whole": kept + noise},
            "world": {"whole": kept - noise / 2},
            "trace": [{"step": 3, "forget": 0.05, "retain": {"kl": kl + noise, "kept": kept}}],
            "back": {"probability": back + noise},
        }
        for seed, noise in zip(SEEDS, NOISE, strict=True)
    ]


def evidence(**changed: tuple[float, float, float]) -> list[dict]:
    """Rows of which the claim holds, some methods changed."""
    found = {
        "simu": (0.95, 0.1, 0.2),
        **dict.fromkeys(RIVALS, (0.8, 0.3, 0.7)),
        **dict.fromkeys(CONTROLS, (0.9, 0.2, 0.6)),
    }
    return [row for method, figures in {**found, **changed}.items() for row in rows_of(method, *figures)]


def denied(rows: list[dict]) -> list[str]:
    return [part["claim"] for part in CLAIMS["lasting"].verdict({"rows": rows})["parts"] if part["holds"] is not True]


def test_the_claim_holds_of_rows_that_bear_it_out() -> None:
    assert denied(evidence()) == []


@pytest.mark.parametrize(
    ("method", "figures", "expected"),
    [
        (RIVALS[0], (0.95, 0.3, 0.7), "kept, beside first order"),
        (RIVALS[1], (0.8, 0.05, 0.7), "divergence, beside second order"),
        (RIVALS[2], (0.8, 0.3, 0.35), "relearned, beside half of SOUL's steps"),
        (CONTROLS[1], (0.99, 0.2, 0.6), "kept, beside attention only"),
    ],
)
def test_each_part_of_the_claim_can_fail_alone(method: str, figures: tuple[float, float, float], expected: str) -> None:
    (part,) = denied(evidence(**{method: figures}))
    assert part.startswith(expected)


@pytest.mark.parametrize("missing", [*RIVALS, CONTROLS[0]])
def test_what_was_not_run_is_not_measured(missing: str) -> None:
    rows = [row for row in evidence() if row["method"] != missing]
    verdict = CLAIMS["lasting"].verdict({"rows": rows})
    assert verdict["holds"] == NOT_MEASURED
    assert all(missing in part["claim"] for part in verdict["parts"] if part["holds"] == NOT_MEASURED)


def test_a_run_that_ended_above_the_target_compares_with_nothing() -> None:
    rows = [row | {"reached": row["method"] != "simu" or row["seed"] > 0} for row in evidence()]
    verdict = CLAIMS["lasting"].verdict({"rows": rows})
    (failed,) = (part for part in verdict["parts"] if part["holds"] is not True)
    assert (failed["measured"], failed["needs"], failed["bar"]) == (0.8, "at least", 1)
    (line,) = (line for line in kept_and_back({"rows": rows, "lr": {}}) if line.startswith("| simu |"))
    assert "| 0.050 (1 of 5 above) |" in line
    others = [row for row in rows if row["seed"] > 0]
    assert line.split("above)")[1] == next(
        line.split("0.050")[1] for line in kept_and_back({"rows": others, "lr": {}}) if line.startswith("| simu |")
    )


def test_few_seeds_are_no_evidence() -> None:
    assert denied([row for row in evidence() if row["seed"] < 3])[0] == "seeds of simu"


def test_a_difference_is_taken_on_the_seeds_that_both_have_and_its_interval_is_students() -> None:
    def value(row: dict) -> float:
        return row["back"]["probability"]

    rows = [row for row in evidence() if (row["method"], row["seed"]) != ("simu", 4)]
    found = difference(rows, "simu", RIVALS[0], value, share=0.5)
    by = {(row["method"], row["seed"]): value(row) for row in rows}
    expected = [by["simu", seed] - 0.5 * by[RIVALS[0], seed] for seed in range(4)]
    bounds = stats.ttest_1samp(expected, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high))
    assert difference(rows, "simu", "nobody", value) is None
    assert interval([0.5]).low is None


def test_a_level_between_two_points_is_interpolated_over_the_logarithm() -> None:
    points = [(1.0, 1.0), (0.4, 0.8), (0.1, 0.6), (0.3, 0.1), (0.05, 0.0)]
    assert at_level(points, 0.4) == pytest.approx(0.8)
    # Halfway between 0.4 and 0.1 in ratio; the first time counts.
    assert at_level(points, 0.2) == pytest.approx(0.7)
    assert at_level(points, 0.01) is None


def test_a_frontier_is_the_mean_over_its_levels() -> None:
    trace = [
        {"step": step, "forget": level, "retain": {"kl": 0.0, "kept": kept}, "world": {"kl": 0.0, "kept": kept / 2}}
        for step, (level, kept) in enumerate(((0.5, 1.0), (0.2, 0.8), (0.1, 0.6), (0.05, 0.4)))
    ]
    assert frontier(trace, 1.0) == pytest.approx(0.75 * (1.0 + 0.8 + 0.6 + 0.4) / 4)
    assert frontier([], 1.0) is None
    assert frontier(trace[:2], 1.0) is None


def test_a_frontier_begins_where_the_model_was() -> None:
    trace = [
        {"step": step, "forget": level, "retain": {"kl": 0.0, "kept": kept}}
        for step, (level, kept) in enumerate(((0.1, 0.6), (0.05, 0.4)))
    ]
    # A model that knew the set at 0.4 was never at 0.5; halfway down to 0.1 in ratio it is at 0.2.
    assert frontier(trace, 0.4) == pytest.approx((0.8 + 0.6 + 0.4) / 3)


def test_a_budget_is_spent_between_two_points() -> None:
    trace = [{"forget": 0.4, "retain": {"kl": 0.1}, "world": {"kl": 0.3}}, {"forget": 0.1, "retain": {"kl": 0.6}}]
    assert at_budget(trace, 1.0, 0.2) == pytest.approx(0.4)
    # Halfway from 0.2 to 0.6 nats, and halfway from the start to 0.2.
    assert at_budget(trace, 1.0, 0.4) == pytest.approx((0.4 * 0.1) ** 0.5)
    assert at_budget(trace, 1.0, 0.1) == pytest.approx(0.4**0.5)
    assert at_budget(trace, 1.0, 0.7) == pytest.approx(0.1)
    assert at_budget([], 1.0, 0.1) is None


def test_at_equal_divergence_both_have_moved_as_far_as_the_one_that_moved_less() -> None:
    def row(method: str, seed: int, *points: tuple[float, float]) -> dict:
        return {"method": method, "seed": seed, "trace": [{"forget": p, "retain": {"kl": kl}} for p, kl in points]}

    ours = [row("simu", 0, (0.25, 0.1), (0.05, 0.2)), row("simu", 1, (0.04, 0.1)), row("simu", 2, (0.04, 0.1))]
    theirs = [row("other", 0, (0.09, 0.1)), row("other", 1, (0.16, 0.1), (0.05, 0.2))]
    value = at_equal_divergence([*ours, *theirs], "other")
    assert [value(each) for each in ours] == pytest.approx([0.25, 0.04, None])
    assert [value(each) for each in theirs] == pytest.approx([0.09, 0.16])


def test_a_column_that_no_row_fills_is_left_out() -> None:
    result = {"rows": evidence(), "lr": {"simu": 0.04}}
    heads = [next(iter(table(result))) for table in (kept_and_back, measures, differences)]
    assert heads[0] == "| method | step size | forget prob. | retain, whole | world, whole | relearned, prob. |"
    assert heads[1] == "| method | frontier | KL to the start | forget ES | forget EM |"
    assert heads[2].startswith(
        "| simu less | retain, whole | world, whole | all of them | frontier | KL to the start |"
    )
    first = list(differences(result))[2]
    assert first.startswith(f"| {RIVALS[0]} | 0.150 \u00b1 0.000 | 0.150") and first.endswith("| -0.500 \u00b1 0.000 |")


def test_what_near_rows_lift_stands_beside_what_relearning_brings_back() -> None:
    rows = [row | {"format": {"probability": 0.125}} for row in evidence()]
    lines = list(kept_and_back({"rows": rows, "lr": {"simu": 0.04}}))
    assert lines[0].endswith("| relearned, prob. | near rows taught, prob. |")
    assert lines[2].endswith("| 0.200 \u00b1 0.010 | 0.125 \u00b1 0.000 |")


def test_what_is_put_beside_each_other_is_of_the_same_seeds_where_asked() -> None:
    rows = [{"seed": seed, "method": name} for name, last in (("a", 3), ("b", 2), ("c", 1)) for seed in range(last)]
    result = {"seeds": [0, 1, 2], "rows": rows, "lr": {}}
    whole, common = (only(result, ["b", "a", "d"], shared=shared)["rows"] for shared in (False, True))
    assert whole == rows[:5]
    assert common == [row for row in whole if row["seed"] < 2]
    assert only(result, ["d"], shared=True)["rows"] == []


def test_the_page_of_the_cells_is_what_their_rows_give() -> None:
    path = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert path.read_text() == page(path.read_text()), "run python -m benchmarks.pages benchmarks"
    assert json.dumps(CLAIMS["lasting"].text)[1:-1] in path.read_text()
