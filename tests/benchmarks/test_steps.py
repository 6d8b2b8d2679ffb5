"""Steps take turns, what does not run says why, and ratios are those of the same rounds."""

from __future__ import annotations

import copy
from math import comb

import pytest
import torch

from benchmarks.optimizer.beside import beside
from benchmarks.optimizer.contenders import CONTENDERS, COPY, OURS, LeanMaskedSophia, step_of, touched_bytes
from benchmarks.optimizer.peers import Problem, Size
from benchmarks.optimizer.steps import measured
from benchmarks.verdicts.optimizer import interval, ratio_of

SIZE = Size(8, 64, 2, 2)


def problem(fraction: float = 0.25) -> Problem:
    torch.manual_seed(0)
    return Problem(SIZE, SIZE.layers, fraction, "cpu", torch.float32)


def test_the_lean_baseline_makes_the_steps_of_ours():
    ours, theirs = problem(), problem()
    steps = step_of(OURS, ours), LeanMaskedSophia(theirs).step
    for _ in range(3):
        for step in steps:
            step()
    for mine, other in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "name", [name for name in CONTENDERS if "compiled" not in name and name not in (COPY, "AdamW, 8 bits")]
)
def test_a_step_changes_what_its_optimizer_trains(name):
    given = problem()
    before = copy.deepcopy(given.weights)
    step = step_of(name, given)
    step()
    changed = [not torch.equal(mine, other) for mine, other in zip(given.weights, before, strict=True)]
    # Deltas and adapters are parameters of their own.
    assert changed == [not any(word in name for word in ("deltas", "LoRA", "SHiRA"))] * SIZE.layers


def test_the_limit_counts_each_touched_line_once():
    given = problem()
    given.chosen = [torch.tensor([0, 1, 15, 40]), torch.tensor([16, 17, 18, 19])]
    # Lines of 16 numbers: two of the first layer and one of the second, in each of 8 rows, read twice and written once.
    assert touched_bytes(given) == 3 * 64 * 8 * (2 + 1) + 3 * 4 * 8 * (4 + 4)


@pytest.mark.slow
def test_contenders_take_turns_and_one_that_fails_says_why():
    rows = measured(SIZE, 0.25, 2, [OURS, "no such step", COPY])
    assert [row.get("optimizer", row["what"]) for row in rows] == [OURS, "no such step", COPY, "limit"]
    assert rows[1]["does_not_run"] == "KeyError: 'no such step'"
    assert all(len(row["processor_milliseconds"]) == len(row["milliseconds"]) == 2 for row in (rows[0], *rows[2:]))
    table = list(beside(rows))
    assert len({line.count("|") for line in table}) == 1 and "no such step" in table[3]


def test_a_ratio_is_the_median_over_rounds():
    rows = [
        {"optimizer": name, "processor_milliseconds": times}
        for name, times in {"a": [2.0, 4.0, 30.0], "b": [1.0, 1.0, 10.0]}.items()
    ]
    assert ratio_of(rows, "a", "b") == (3.0, 2.0, 4.0)
    assert ratio_of(rows, "a", "c") is None


def test_the_table_holds_each_ratio_with_its_interval():
    times = {OURS: [2.0, 2.0, 2.0], "Muon": [8.0, 6.0, 10.0], None: [1.0, 1.5, 1.0]}
    rows = [
        {"processor_milliseconds": each, "milliseconds": each, **({} if name is None else {"optimizer": name})}
        for name, each in times.items()
    ]
    lines = list(beside(rows))[2:]
    assert lines[0] == f"| {OURS} | 2.00 ms | 2.00 ms | 1 |"
    assert lines[1] == "| Muon | 8.00 ms | 8.00 ms | 4.00 (3.00-5.00) |"
    assert lines[2].startswith("| limit") and lines[2].endswith("| 1.00 ms | 1.00 ms | 0.50 (0.50-0.75) |")


@pytest.mark.parametrize("count", [6, 25, 40])
def test_the_interval_of_a_median_holds_it_in_95_of_100_draws(count):
    low, high = interval(range(count))
    assert high == count - 1 - low
    missed = [sum(comb(count, place) for place in range(last + 1)) / 2**count for last in (low, low + 1)]
    # One further in would miss it too often.
    assert missed[0] <= 0.025 < missed[1]
