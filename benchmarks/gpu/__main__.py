"""Run every test that is marked gpu, then time steps, attribution and training, on one GPU and without a network.

What was measured is written after each part; the same call goes on with the parts that are missing, as long as the
sources are the same. What needs a package beyond torch takes it from a folder of wheels.
Usage: python -m benchmarks.gpu [--minutes 9] [--wheels FOLDER] [--force]
To try the script itself without a GPU: --device cpu --small, whose result says that it is of a processor.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

NEEDED = (
    *("einops", "safetensors", "transformers", "accelerate", "pytest", "hypothesis", "pytest-xdist"),
    *("bitsandbytes", "scipy", "typer", "rich", "matplotlib", "rouge-score"),
)
"""Packages beyond torch that tests and timings import; where one is missing, what needs it is named in the result."""


def missing() -> list[str]:
    """Those of them that are not installed."""
    found = []
    for name in NEEDED:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(name)
    return found


def install(wheels: Path) -> None:
    """Install what is missing from a folder of wheels, without a network, and leave torch as it is."""
    torch = f"torch=={metadata.version('torch')}"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(wheels), torch]
    for name in missing():
        if subprocess.run([*pip, name], check=False).returncode:
            sys.stderr.write(f"{name} is not in {wheels}: what needs it is left out.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop within this time")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, for packages that are missing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and some of the tests, to try the script")
    parser.add_argument("--parts", nargs="+", help="these parts only")
    parser.add_argument("--force", action="store_true", help="start anew, in place of an older result")
    parser.add_argument("--out", type=Path, help="the result file, *.json, or a folder for it; its parts are beside it")
    options = parser.parse_args()
    if options.wheels is not None:
        install(options.wheels)
    # What it imports may have been installed just now.
    from benchmarks.gpu.run import run

    raise SystemExit(run(options))


if __name__ == "__main__":
    main()
