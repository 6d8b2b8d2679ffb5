"""Result files: what was claimed, how it was run, on what, and every repeat."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

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
    return " ".join(["python -m", sys.modules["__main__"].__spec__.name, *words])


def write_result(path: Path, *, force: bool = False, **content: object) -> None:
    """Write a result file; an older one stays unless `force` is given."""
    if path.exists() and not force:
        raise SystemExit(f"{path.name} exists; give another --out, or --force to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
