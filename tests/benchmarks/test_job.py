"""Jobs are measured phase by phase, go on where they stopped, and their verdict is computed from the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.job.pages import PARTS, jobs, seconds_of
from benchmarks.job.phases import NAMES, Phases
from benchmarks.verdicts.claims import CLAIMS
from benchmarks.verdicts.job import FULL, LORA, OURS
from tests.rules.sources import ROOT


def row(job: str, seconds: float, peak: int) -> dict:
    phases = {"load": seconds / 4, "passes": seconds / 4, "rest": seconds / 2}
    sizes = {"steps": 2, "batch_size": 2, "bytes_read": 10**6, "bytes_saved": 0}
    return {"job": job, "processor_seconds": phases, "peak": {"load": peak // 2, "passes": peak}, **sizes}


def test_a_part_inside_another_counts_for_itself_alone():
    phases = Phases()
    with phases.of("rest"):
        time.sleep(0.02)
        with phases.of("passes"):
            time.sleep(0.1)
            kept = torch.ones(2**24)
        del kept
        time.sleep(0.02)
    assert 0.1 <= phases.seconds["passes"] < 10 and phases.seconds["rest"] >= 0.04
    assert phases.peak["passes"] > phases.peak["rest"] - 2**20
    assert phases.processor_seconds["passes"] < phases.seconds["passes"]


def test_every_phase_is_shown_in_one_place():
    assert sorted(name for names in PARTS.values() for name in names) == sorted(NAMES)
    shown = row(FULL, 8.0, 100)
    assert sum(seconds_of(shown, part) for part in PARTS) == 8.0


def test_a_slow_job_and_a_large_one_deny_the_claim():
    rows = [row(FULL, 40.0, 100), row(LORA[0], 12.0, 60), row(LORA[1], 10.0, 60)]
    small = [row(name, 12.0, 50) for name in OURS]
    assert CLAIMS["job"].verdict({"rows": [*rows, *small]})["holds"] is True
    for other in (row(OURS[0], 12.1, 50), row(OURS[0], 12.0, 51)):
        parts = CLAIMS["job"].verdict({"rows": [*rows, other, *small[1:]]})["parts"]
        assert [each["holds"] for each in parts].count(False) == 1
    table = list(jobs([*rows, *small, {"job": "LoRA, 9 bits", "does_not_run": "no kernel"}]))
    assert len({line.count("|") for line in table}) == 1
    assert "| full, AdamW | 40.0 s | 4.00 | 10.0 |" in table[2] and "no kernel" in table[-1]


@pytest.mark.slow
def test_a_job_is_measured_to_the_saved_result_and_the_same_call_goes_on(tmp_path):
    out = tmp_path / "job.json"
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def call(*names: str) -> dict:
        words = [sys.executable, "-m", "benchmarks.job", "--work", str(tmp_path), "--quick", "--force"]
        done = subprocess.run(
            [*words, "--out", str(out), "--jobs", *names], capture_output=True, text=True, cwd=ROOT, env=surroundings
        )
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    first = call("simu_graddiff")
    both = call("simu_graddiff", FULL)
    assert [each["job"] for each in both["rows"]] == ["simu_graddiff", FULL]
    ours, full = both["rows"]
    assert ours == first["rows"][0] and set(ours["seconds"]) <= set(NAMES)
    assert ours["processor_seconds"]["attribution"] > 0 and "attribution" not in full["seconds"]
    # Both save the whole model.
    assert ours["bytes_saved"] == pytest.approx(full["bytes_saved"], rel=0.01) and full["bytes_saved"] > 10**5
