"""The tests that are marked gpu, in the order of their value, and what came of each."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.devices.outcomes import read

ROOT = Path(__file__).parents[2]
FOLDERS = ("devices", "optimizer", "hooks", "deltas", "patch", "attribution", "ground", "unlearning", "cli")
SMALL = ("tests/devices/test_step.py", "-k", "captured")
MARGIN = 15.0
"""Seconds that are left for the end of a test that was begun, and for what follows."""


def suite(
    outcomes: Path, sources: str, end: float, options: argparse.Namespace
) -> tuple[list[dict[str, object]], bool]:
    """Run the tests that have not passed with these sources, until the end; returns rows, and whether all were run.

    Args:
        outcomes: Where each outcome is kept as it comes.
        sources: A hash of the sources: outcomes of others are forgotten.
        end: When to stop, in seconds of the epoch.
        options: Of the command line.
    """
    stamp = outcomes.with_suffix(".sources")
    if not stamp.exists() or stamp.read_text() != sources:
        outcomes.unlink(missing_ok=True)
        stamp.write_text(sources)
    what = SMALL if options.small else tuple(f"tests/{name}" for name in FOLDERS)
    workers = min(8, os.cpu_count() or 1)
    parallel = ["-n", str(workers)] if not options.small and importlib.util.find_spec("xdist") else []
    call = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--device", options.device, "--tb=short", *parallel]
    call += ["-p", "tests.devices.outcomes", "--outcomes", str(outcomes.resolve()), "--until", str(end - MARGIN)]
    call += ["-p", "no:cacheprovider", *what]
    # Laws draw fewer examples: each operation of a small one starts a kernel.
    surroundings = {**os.environ, "HYPOTHESIS_PROFILE": "gpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(call, cwd=ROOT, env=surroundings, stdout=sys.stderr)
    try:
        code = process.wait(timeout=max(1.0, end - time.time()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        code = 2
    # 0: all passed, 1: some failed, 5: all had passed before; else it was stopped.
    return rows_of(read(outcomes)), code in (0, 1, 5)


def rows_of(outcomes: dict[str, dict[str, object]]) -> list[dict[str, object]]:
    """How many tests of each file passed, failed and were skipped, with what the failed ones say."""
    files: dict[str, list[dict[str, object]]] = {}
    for test, row in outcomes.items():
        files.setdefault(test.partition("::")[0], []).append(row)
    rows = []
    for file, found in files.items():
        counts = Counter(row["outcome"] for row in found)
        row = {"what": "tests", "file": file, **{key: counts[key] for key in ("passed", "failed", "skipped")}}
        row["seconds"] = round(sum(float(each.get("seconds", 0.0)) for each in found), 1)
        failures = {each["test"]: each["error"] for each in found if each["outcome"] == "failed"}
        rows.append({**row, "failures": failures} if failures else row)
    return json.loads(json.dumps(rows))
