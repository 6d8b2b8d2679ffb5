"""Runs: the folder OUT.run beside a result OUT, from which a killed run goes on, and which goes when OUT stands."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from torch_simu._files import replacing
from torch_simu.unlearning.checkpoint import saved_steps

RESULTS = "results.json"
"""In the folder of a run over several models: a report with a row of each that is finished."""

TAUGHT = "taught_"
"""How a file with the weights of a model that was taught begins, there."""

_FINISHED = "result.txt"
_REPORT = "report.json"
_PARTIAL = ("attribution.forget", "attribution.retain")


def run_beside(result: Path) -> Path:
    """Return the folder of the run that makes a result.

    Examples:
        >>> run_beside(Path("results/OUT")).name
        'OUT.run'
    """
    return result.with_name(f"{result.name}.run")


def finish_run(run: Path, result: Path) -> None:
    """Note beside a run which result it came to, before that takes its place."""
    with replacing(run / _FINISHED) as temporary:
        temporary.write_text(_named(result))


def is_finished(run: Path, result: Path) -> bool:
    """Say whether a run came to the result that stands: another one may be on its way to replace it."""
    try:
        return (run / _FINISHED).read_text() == _named(result)
    except OSError:
        return False


def how_to_go_on(run: Path | None) -> str:
    """Say in a sentence where a command goes on that was interrupted; one without a run begins again."""
    if run is not None and (finished := finished_models(run)):
        counted = "1 finished model" if len(finished) == 1 else f"{len(finished)} finished models"
        where = f"after {counted} ({', '.join(finished)})"
    elif run is not None and any(run.glob(f"{TAUGHT}*")):
        where = "after the teaching"
    elif run is not None and (steps := saved_steps(run)) is not None:
        where = f"after step {steps}" if steps else "after the attribution"
    elif run is not None and any((run / name).exists() for name in _PARTIAL):
        where = "within the attribution"
    else:
        return "Call the same command again; it starts anew."
    return f"Call the same command again to go on {where}."


def finished_models(run: Path) -> list[str]:
    """Return the names of the models that a run over several has finished, in their order; of any other run none."""
    # What is damaged is said when it is read.
    with suppress(OSError, ValueError, KeyError, TypeError):
        return [str(name) for name in json.loads((run / RESULTS).read_text(encoding="utf-8"))["methods"]]
    return []


def _named(result: Path) -> str:
    # Reports hold wall times: no two runs write the same one.
    return hashlib.sha256((result / _REPORT).read_bytes()).hexdigest()
