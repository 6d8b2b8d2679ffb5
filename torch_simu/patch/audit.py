"""Audit: what differs between two models, tensor by tensor, and whether a patch says so."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import cast

from torch import Tensor

from torch_simu._files import replacing
from torch_simu._hashes import sha256_of, sha256_of_hashes
from torch_simu.patch.change import Change


@dataclass(frozen=True, slots=True)
class Audit:
    """Every tensor of a model beside the base's, by hash.

    Attributes:
        tensors: Tensor -> its `status` ("unchanged", "columns", "rows", "whole", "delta", "delta_rows", "unexpected",
            or "unread" where one side only has it and no model reads it), sha256 `before` and `after`, and for columns
            and rows how many are `selected`, of how many.
        problems: What is not as the patch says; empty where everything is.
        about: What was compared: "base" and "model" with a "sha256" over the lines `hash  name` of their tensors and a
            "name" where they have one, "patch" likewise (over what it says of each tensor), "date" and "version".
    """

    tensors: Mapping[str, Mapping[str, object]]
    problems: tuple[str, ...]
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether what the patch says changed, and nothing else did."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.passed

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of tensors."""
        found = [str(tensor["status"]) for tensor in self.tensors.values()]
        return {status: found.count(status) for status in dict.fromkeys(found)}

    def to_json(self) -> str:
        """Return the audit as JSON, for the record."""
        content = {
            "passed": self.passed,
            "problems": self.problems,
            "counts": self.counts,
            **self.about,
            "tensors": self.tensors,
        }
        return json.dumps(content, indent=1, default=dict)

    def named(self, **names: str) -> Audit:
        """Return the audit with names for what was compared: "base", "model", "patch"."""
        parts = {
            part: {"name": name, **cast("dict[str, object]", self.about.get(part, {}))} for part, name in names.items()
        }
        return replace(self, about={**self.about, **parts})

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n")

    @staticmethod
    def is_file(path: str | Path) -> bool:
        """Return whether a file holds an audit that `save` wrote."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and {"passed", "problems", "counts", "tensors"} <= content.keys()

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        verdict = "Exactly what the patch says changed" if self.passed else f"Not as the patch says: {self.problems[0]}"
        return f"{verdict} ({len(self.tensors)} tensors: {counts})."


def audit(
    changes: Mapping[str, Change],
    base: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    *,
    unread: Collection[str] = (),
    codes: Mapping[str, str | None] = MappingProxyType({}),
) -> Audit:
    """Compare all tensors by hash, and those that differ with what a patch says of them.

    Args:
        changes: The patch.
        base: The base's tensors.
        model: The changed model's.
        unread: Tensors that only one side may have, because no model reads them.
        codes: Delta -> sha256 of the codes and scales that it is beside in the changed model, where it is of the
            columns or rows of the patch.
    """
    rows: dict[str, dict[str, object]] = {}
    problems = []
    hashes: dict[str, dict[str, str]] = {"base": {}, "model": {}}
    for name in dict.fromkeys([*base, *model, *changes]):
        change = changes.get(name)
        before = sha256_of(base[name]) if name in base else None
        after = sha256_of(model[name]) if name in model else None
        hashes["base"] |= {} if before is None else {name: before}
        hashes["model"] |= {} if after is None else {name: after}
        expected = (change.before, change.after) if change else (before, before)
        if change is not None and change.is_delta:
            # Of a delta the first hash is that of the codes beside it.
            expected = (None, change.after)
        bound = change is None or not change.is_delta or codes.get(name) == change.before
        if bound and (before, after) == expected:
            rows[name] = {"status": change.kind if change else "unchanged", "before": before, "after": after}
            if change is not None and change.num_neurons:
                rows[name] |= {"selected": len(change.neurons), "of": change.num_neurons}
            continue
        if name in unread and None in (before, after):
            rows[name] = {"status": "unread", "before": before, "after": after}
            continue
        rows[name] = {"status": "unexpected", "before": before, "after": after}
        wanted = "is not as the patch says" if change else "differs and is not in the patch"
        problems.append(f"Tensor {name!r} {wanted}")
    hashes["patch"] = {name: f"{change.before} {change.after}" for name, change in changes.items()}
    about: dict[str, object] = {part: {"sha256": sha256_of_hashes(each)} for part, each in hashes.items()}
    about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "version": _version()}
    return Audit(rows, tuple(problems), about)


def _version() -> str:
    try:
        return metadata.version("torch-simu")
    except metadata.PackageNotFoundError:
        return "not installed as a package"
