"""Result files: what was claimed, what of it holds, how it was run, on what, and every repeat."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.verdicts.claims import CLAIMS

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, object]:
    """Versions, processor and threads of this run."""
    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {**versions, "python": platform.python_version(), "cpu": model, "threads": torch.get_num_threads()}


def command() -> str:
    """How this script was called, without the folders of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    spec = sys.modules["__main__"].__spec__
    # A process of a test run has none.
    name = spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).stem
    return f"python -m {shlex.join([name, *words])}"


def write_result(path: Path, *, claim: str, force: bool = False, **content: object) -> None:
    """Write a result file with its verdict on a claim; an older one stays unless `force` is given."""
    if path.exists() and not force:
        raise SystemExit(f"{path.name} exists; give another --out, or --force to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(claim, content))


def as_text(claim: str, content: Mapping[str, object]) -> str:
    """The text of a result file: the claim in words, what its rows say of it, and the rest."""
    known = CLAIMS[claim]
    return json.dumps({"claim": known.text, "verdict": known.verdict(content), **content}, indent=1) + "\n"
