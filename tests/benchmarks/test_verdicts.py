"""Every result file says what of its claim its own rows bear out."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks.results import RESULTS, write_result
from benchmarks.verdicts.claims import CLAIMS
from benchmarks.verdicts.parts import NOT_MEASURED, part, verdict

FILES = sorted(RESULTS.glob("*.json"))
BY_TEXT = {claim.text: claim for claim in CLAIMS.values()}


def check(path: Path) -> None:
    """The verdict of a result file is the one that its rows give."""
    content = json.loads(path.read_text())
    assert content.get("verdict") == BY_TEXT[content["claim"]].verdict(content)


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}_cpu_202611.json").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_verdict_of_a_result_file_is_recomputed_from_its_rows(path):
    check(path)


def test_no_two_claims_share_a_sentence():
    assert len(BY_TEXT) == len(CLAIMS)


def test_every_benchmark_writes_a_claim_that_has_a_verdict():
    found = [
        ast.literal_eval(keyword.value)
        for path in RESULTS.parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "write_result"
        for keyword in node.keywords
        if keyword.arg == "claim"
    ]
    assert sorted(found) == sorted(CLAIMS)


@pytest.mark.parametrize("wrong", ["no verdict", "another row", "a verdict by hand", "another claim"])
def test_a_file_without_its_verdict_fails(tmp_path, wrong):
    content = stored("optimizer_step")
    if wrong == "no verdict":
        del content["verdict"]
    elif wrong == "another row":
        next(row for row in content["rows"] if (row["size"], row["fraction"]) == ("bar", 0.05))["median"] /= 4
    elif wrong == "a verdict by hand":
        content["verdict"]["holds"] = True
    else:
        content["claim"] = "It is fast."
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    with pytest.raises((AssertionError, KeyError)):
        check(path)


@pytest.mark.parametrize("name", ["optimizer_step", "optimizer_step_second", "robustness", "demo_no_topic"])
def test_a_claim_that_its_own_rows_deny_does_not_hold(name):
    assert stored(name)["verdict"]["holds"] is False


def test_what_is_kept_before_the_target_is_reached_is_not_measured():
    missed, *kept = stored("demo_no_topic")["verdict"]["parts"]
    assert missed["holds"] is False
    assert {each["holds"] for each in kept} == {NOT_MEASURED}


@pytest.mark.parametrize("name", CLAIMS)
def test_nothing_is_claimed_of_a_run_without_rows(name):
    found = CLAIMS[name].verdict({"rows": []})
    assert found["holds"] == NOT_MEASURED


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        ((True, True), True),
        ((True, False, NOT_MEASURED), False),
        ((True, NOT_MEASURED), NOT_MEASURED),
        ((), NOT_MEASURED),
    ],
)
def test_a_claim_holds_when_all_of_its_parts_were_measured_and_hold(found, holds):
    assert verdict({"holds": each} for each in found)["holds"] == holds


@pytest.mark.parametrize(
    ("needs", "below", "equal", "above"),
    [
        ("at least", False, True, True),
        ("more than", False, False, True),
        ("at most", True, True, False),
        ("less than", True, False, False),
    ],
)
def test_a_figure_is_held_to_its_bar(needs, below, equal, above):
    assert [part("", value, needs, 2.0)["holds"] for value in (1.0, 2.0, 3.0)] == [below, equal, above]
    # A figure that is rounded when it is shown is compared as it is.
    assert part("", 2.00001, "at most", 2.0) == {
        "claim": "",
        "measured": 2.0,
        "needs": "at most",
        "bar": 2.0,
        "holds": False,
    }
    assert {part("", *missing)["holds"] for missing in ((None, needs, 1.0), (1.0, needs, None))} == {NOT_MEASURED}


def test_a_result_is_written_with_its_verdict(tmp_path):
    rows = [{"optimizer": name, "state_ratio": 1.5} for name in ("simu", "simu_compact")]
    path = tmp_path / "new" / "memory.json"
    write_result(path, claim="optimizer_memory", rows=rows)
    check(path)
    assert json.loads(path.read_text())["verdict"]["holds"] is False
    with pytest.raises(SystemExit, match="memory.json exists"):
        write_result(path, claim="optimizer_memory", rows=rows)
