"""What is run on a GPU runs on a processor too, part by part, and says that it is of a processor."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu.run import run
from benchmarks.gpu.timings import TIMINGS
from benchmarks.verdicts.claims import CLAIMS
from benchmarks.verdicts.parts import NOT_MEASURED
from tests.rules.sources import ROOT


def call(out, *arguments):
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", str(out), *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_parts_are_run_once_and_the_same_call_goes_on(tmp_path):
    out = tmp_path / "gpu.json"
    first = call(out, "--parts", "steps_1b", "--minutes", "5")
    assert first.returncode == 0, first.stderr
    before = json.loads(out.read_text())
    assert {row["optimizer"] for row in before["rows"] if row["what"] == "memory"} == {"simu", "simu_compact"}
    again = call(out, "--minutes", "5")
    assert again.returncode == 0 and "steps_1b: done before" in again.stderr, again.stderr
    content = json.loads(out.read_text())
    (tests,) = (row for row in content["rows"] if row["what"] == "tests")
    assert tests["file"] == "tests/devices/test_step.py" and tests["passed"] > 10 and not tests["failed"]
    assert [row for row in content["rows"] if row["part"] == "steps_1b"] == before["rows"]
    assert content["missing"] == [] and not any("does_not_run" in row for row in content["rows"])
    assert {row["what"] for row in content["rows"]} == {"tests", "step", "memory", "attribution", "training"}
    # A processor says nothing of a GPU.
    assert content["verdict"]["holds"] == NOT_MEASURED and "no GPU" in content["environment"]["name"]


def test_without_time_nothing_is_begun_and_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.run.command", lambda: "")
    options = {"device": "cpu", "small": True, "minutes": 0.0, "parts": None, "force": False}
    out = tmp_path / "gpu.json"
    assert run(argparse.Namespace(out=out, **options)) == 3
    content = json.loads(out.read_text())
    assert content["rows"] == [] and content["missing"] == ["tests", *TIMINGS]


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_takes_the_result_and_what_else_is_in_it_stays(tmp_path, monkeypatch, made):
    monkeypatch.setattr("benchmarks.gpu.run.command", lambda: "")
    out = tmp_path / "results"
    if made:
        out.mkdir()
        (out / "other.json").write_text("{}")
    options = {"device": "cpu", "small": True, "minutes": 0.0, "parts": None, "force": True}
    assert run(argparse.Namespace(out=out, **options)) == 3
    (result,) = out.glob("gpu_cpu_small_*.json")
    assert json.loads(result.read_text())["rows"] == []
    assert made == (out / "other.json").exists()


def test_a_failed_test_and_a_slow_step_deny_the_claim():
    tests = {"device": "cuda", "what": "tests", "passed": 400, "failed": 1}
    slow = [
        {"device": "cuda", "what": "step", "size": "7b", "optimizer": name, "median": median}
        for name, median in (("simu", 1.0), ("dense_masked_sophia", 4.0))
    ]
    parts = CLAIMS["gpu"].verdict({"rows": [tests, *slow]})["parts"]
    assert [part["holds"] for part in parts] == [True, False, False, NOT_MEASURED, NOT_MEASURED]
    there = [{**row, "device": "cpu"} for row in (tests, *slow)]
    assert {part["holds"] for part in CLAIMS["gpu"].verdict({"rows": there})["parts"]} == {NOT_MEASURED}
