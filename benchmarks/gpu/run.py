"""Parts in the order of their value: each is written when it ends, and not run again."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.gpu.suite import suite
from benchmarks.gpu.timings import TIMINGS
from benchmarks.results import RESULTS, command, environment, write_result

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 20.0
"""With less time left no part is begun."""


def sources() -> str:
    """A hash of the sources, on which every part depends."""
    total = hashlib.sha256()
    for folder in ("torch_simu", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()


def machine(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    if device == "cpu":
        return {"device": "cpu", "name": "a processor, no GPU: the script was tried, nothing of a GPU was measured"}
    found = torch.cuda.get_device_properties(0)
    return {"device": "cuda", "name": found.name, "bytes": found.total_memory, "cuda": torch.version.cuda}


def run(options: argparse.Namespace) -> int:
    """Run the parts that are missing, and write the result; returns the exit status."""
    end = time.time() + 60 * options.minutes
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("There is no CUDA device here; --device cpu --small tries the script.\n")
        return 2
    size = "_small" if options.small else ""
    out = options.out or RESULTS
    if out.suffix != ".json":
        out = out / f"gpu_{options.device}{size}_{time.strftime('%Y%m')}.json"
    folder = out.with_suffix("")
    if options.force and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = {"machine": machine(options.device), "sources": sources(), "small": options.small}
    parts = ["tests", *TIMINGS]
    chosen = [name for name in parts if options.parts is None or name in options.parts]
    for name in chosen:
        path = folder / f"{name}.json"
        if done(path, known):
            sys.stderr.write(f"{name}: done before\n")
            continue
        if end - time.time() < LEAST_SECONDS:
            sys.stderr.write(f"{name}: no time left; the same call goes on here\n")
            break
        started = time.time()
        if name == "tests":
            rows, complete = suite(folder / "outcomes.jsonl", known["sources"], end, options)
        else:
            rows, complete = timed(name, options)
        seconds = round(time.time() - started, 1)
        rows = [{"part": name, "device": options.device, **row} for row in rows]
        path.write_text(json.dumps({**known, "complete": complete, "seconds": seconds, "rows": rows}, indent=1) + "\n")
        sys.stderr.write(f"{name}: {seconds:.0f} s\n")
        collect(out, folder, parts, known)
    collect(out, folder, parts, known)
    return status(folder, chosen, known)


def timed(name: str, options: argparse.Namespace) -> tuple[list[dict[str, object]], bool]:
    """The rows of one part; one that fails says why, and the others are run all the same."""
    try:
        return TIMINGS[name](options.device, options.small), True
    except Exception as error:
        traceback.print_exc()
        return [{"does_not_run": f"{type(error).__name__}: {error}"[:500]}], False
    finally:
        if options.device == "cuda":
            torch.cuda.empty_cache()


def done(path: Path, known: dict[str, object]) -> bool:
    """Whether a part was run to its end, on this machine and with these sources."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return bool(content.get("complete")) and known.items() <= content.items()


def collect(out: Path, folder: Path, parts: list[str], known: dict[str, object]) -> None:
    """Write what the parts found, with the verdict on it."""
    found = {name: json.loads(path.read_text()) for name in parts if (path := folder / f"{name}.json").exists()}
    found = {name: content for name, content in found.items() if known.items() <= content.items()}
    write_result(
        out,
        force=True,
        claim="gpu",
        command=command(),
        environment={**environment(), **known["machine"]},
        seeds=[0],
        sources=known["sources"],
        small=known["small"],
        missing=[name for name in parts if not found.get(name, {}).get("complete")],
        seconds={name: content["seconds"] for name, content in found.items()},
        rows=[row for content in found.values() for row in content["rows"]],
    )


def status(folder: Path, chosen: list[str], known: dict[str, object]) -> int:
    """0 where every chosen part was run to its end and no test failed, 1 where one failed, 3 where some are missing."""
    if any(not done(folder / f"{name}.json", known) for name in chosen):
        return 3
    rows = [row for name in chosen for row in json.loads((folder / f"{name}.json").read_text())["rows"]]
    return int(any(row.get("failed") for row in rows))
