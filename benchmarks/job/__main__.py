"""Measure whole jobs, from `from_pretrained` to the saved result: time by phase, memory, bytes read and written.

Every job runs in a process of its own, on the same rows, with as many steps of as many rows; each step makes a pass
over a batch to forget and one over a batch to keep. Processor time is the first figure: it does not count what other
programs take. What was measured is noted after every job, and the same call goes on where the first stopped.
Usage: python -m benchmarks.job --work FOLDER [--steps 4] [--batch 4] [--rows 8] [--quick] [--force]
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.results import RESULTS, command, environment, write_result


def alone(name: str, folder: Path, steps: int, batch_size: int, rows: int) -> dict[str, object]:
    """Run one job in this process."""
    from benchmarks.job.jobs import JOBS, Job
    from benchmarks.job.phases import Phases
    from benchmarks.job.rows import sets
    from benchmarks.optimizer.memory import resident

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    found = sets(folder, rows)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        out, phases = Path(made), Phases()
        before = resident("VmRSS")
        JOBS[name](Job(folder, out, found, steps, batch_size, phases))
        saved = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "seconds": phases.seconds,
        "processor_seconds": phases.processor_seconds,
        "peak": phases.peak,
        "before": before,
        "bytes_saved": saved,
        "bytes_read": phases.bytes_read,
        "tokens": sum(len(row.input_ids) for part in found.values() for row in part),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the model and for what is done")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="rows of each set in a step")
    parser.add_argument("--rows", type=int, default=8, help="rows of each set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two steps, to try the script")
    parser.add_argument("--jobs", nargs="+", help="these jobs only")
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "job_cpu_202611.json")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.work / ("tiny" if options.quick else "smollm2")
    if options.quick:
        options.steps, options.batch, options.rows = 2, 2, 4
    sizes = {"steps": options.steps, "batch_size": options.batch, "rows": options.rows}
    if options.alone is not None:
        sys.stdout.write(json.dumps(alone(options.alone, folder, *sizes.values())))
        return
    # Here alone: what a job imports must not be what this process imports.
    from benchmarks.job.jobs import names
    from benchmarks.job.model import make_model

    make_model(folder, tiny=options.quick)
    notes = options.work / f"{options.out.stem}.notes.json"
    found: dict[str, dict[str, object]] = json.loads(notes.read_text()) if notes.exists() else {}
    if found.get("sizes") != sizes:
        found = {"sizes": sizes}
    for name in options.jobs or names():
        if name in found:
            continue
        words = [f"--{key}={getattr(options, key)}" for key in ("work", "steps", "batch", "rows", "threads")]
        call = [sys.executable, "-m", "benchmarks.job", *words, *(["--quick"] if options.quick else [])]
        done = subprocess.run([*call, "--alone", name], capture_output=True, text=True, check=False)
        if done.returncode:
            found[name] = {"does_not_run": done.stderr.strip().splitlines()[-1][:300]}
        else:
            found[name] = json.loads(done.stdout.splitlines()[-1])
        sys.stderr.write(f"{name}: {found[name]}\n")
        notes.write_text(json.dumps(found))
    rows = [{"job": name, **sizes, **row} for name, row in found.items() if name != "sizes"]
    write_result(
        options.out,
        force=options.force,
        claim="job",
        command=command(),
        environment=environment(),
        seeds=[0],
        rows=rows,
    )


if __name__ == "__main__":
    main()
