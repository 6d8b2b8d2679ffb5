"""Reference: the figures of a model that were measured before, in place of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch_simu._checks import check_number, problem
from torch_simu.unlearning.metrics.suites import Figures
from torch_simu.unlearning.report.report import MEASURES, MethodResult

_EXPECTED = "a file that torch-simu evaluate --out wrote"
_ADVICE = "Measure the reference in the same way, or give its folder."


def read_reference(path: Path, settings: Mapping[str, object]) -> tuple[MethodResult, Figures | None]:
    """Read what `torch-simu evaluate --out` wrote of a model, to compare another model with it.

    Sets are compared by the names of their files and the number of their rows: no file holds a hash of the rows, with
    which anyone could test a guess of what was forgotten.

    Args:
        path: The file.
        settings: The settings of the job that compares, as its report has them: "sets", "rows", "suite", "max_length",
            "max_new_tokens", and "attack" if it attacks.

    Returns:
        The measures of the sets, and the suite's figures if the job measures by one.

    Raises:
        ValueError: If the file is no such file, or was measured on other sets or in another way.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # A number that is not finite would be refused when the comparison is written, after the work.
        json.dumps(content, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError(problem(f"The reference {str(path)!r} is neither a model nor JSON", _EXPECTED)) from None
    theirs, methods = _part(content, "settings", path), _part(content, "methods", path)
    for name in ("sets", "rows", "max_length", "max_new_tokens", "suite", "attack"):
        found, wanted = theirs.get(name), settings.get(name)
        if name == "sets":
            found, wanted = _file_names(found), _file_names(wanted)
        # What was measured by a suite, or attacked, was measured without, too.
        if found != wanted and not (name in ("suite", "attack") and wanted is None):
            wrong = f"The reference {str(path)!r} was measured with {name} {found!r}"
            raise ValueError(problem(wrong, repr(wanted), _ADVICE))
    measures = _part(methods, "model", path)
    sets = {name: _measures(measures, name, path) for name in theirs["sets"]}
    figures = None if settings["suite"] is None else _part(_part(content, "suites", path), "model", path)
    attack = None if settings.get("attack") is None else _attack(_part(measures, "attack", path), path)
    return MethodResult(sets, attack=attack), figures


def _measures(measures: Mapping[str, Any], name: str, path: Path) -> dict[str, float]:
    of_set = _part(measures, name, path)
    return {key: check_number(f"{key} of {name} in {str(path)!r}", of_set.get(key), high=1.0) for key in MEASURES}


def _attack(attacks: Mapping[str, Any], path: Path) -> dict[str, dict[str, float]]:
    found = {}
    for name in attacks:
        figures = _part(attacks, name, path)
        found[name] = {
            key: check_number(f"{key} of the attack {name} in {str(path)!r}", figures.get(key), high=1.0)
            for key in ("probability", "es")
        }
    return found


def _part(content: object, name: str, path: Path) -> Mapping[str, Any]:
    part = content.get(name) if isinstance(content, dict) else None
    if not isinstance(part, dict):
        raise ValueError(problem(f"The reference {str(path)!r} has no {name!r}", _EXPECTED))
    return part


def _file_names(sets: object) -> object:
    if not isinstance(sets, Mapping):
        return sets
    # A file may have moved with its folder.
    return {name: Path(source).name if isinstance(source, str) else source for name, source in sets.items()}
