"""MethodResult: what is known of a model on each set, and what it cost to make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

Measures = Mapping[str, float]
"""The `MEASURES` of one set, each in [0, 1]."""

MEASURES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "em": ("EM", "exact memorization"),
        "es": ("ES", "extraction strength"),
        "probability": ("prob.", "probability of the answer"),
        "qa_exact_match": ("QA", "generated answer equals the true one"),
    }
)
"""Measure of every set of a report -> title of its column, and what it is."""

RELEARN = "relearn"
"""The attack that has a column of its own, "back": what comes back of some forget rows when others are learned."""


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One row of a report.

    Attributes:
        sets: "forget", "retain" and perhaps "world" -> measures.
        changed_share: Share of the model's weights that differ from before; None, as below: not known.
        optimizer_bytes: Bytes of the optimizer's state.
        seconds: Wall time.
        steps: Number of optimizer steps.
        attack: Name of an attack -> "probability" and "es" of the forget rows that it was scored on, the largest that
            it came to; see `torch_simu.unlearning.attack`.
        membership: How well forget rows are told from rows that no model saw; see
            `torch_simu.unlearning.metrics.membership.membership_auc`.
    """

    sets: Mapping[str, Measures]
    changed_share: float | None = None
    optimizer_bytes: int | None = None
    seconds: float | None = None
    steps: int | None = None
    attack: Mapping[str, Measures] | None = None
    membership: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return the row as JSON knows it, without what is not known."""
        sets = {
            name: {key: measures[key] for key in MEASURES if key in measures} for name, measures in self.sets.items()
        }
        costs = {
            "changed_share": self.changed_share,
            "optimizer_bytes": self.optimizer_bytes,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "steps": self.steps,
            "membership": self.membership,
        }
        attack = {} if self.attack is None else {"attack": {name: dict(each) for name, each in self.attack.items()}}
        return {**sets, **{name: value for name, value in costs.items() if value is not None}, **attack}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> MethodResult:
        """Return the result whose row this is, as `to_json` returned it.

        Examples:
            >>> row = {"forget": {"em": 0.5}, "steps": 7, "attack": {"relearn": {"probability": 0.25, "es": 0.0}}}
            >>> MethodResult.from_json(row).to_json() == row
            True
        """
        costs = {field.name: row[field.name] for field in fields(cls) if field.name != "sets" and field.name in row}
        return cls({name: part for name, part in row.items() if name not in costs}, **costs)

    def costs(self) -> dict[str, str]:
        """Return what is known of the work, in words: "changed", "state", "steps" and "seconds"."""
        found = {
            "changed": None if self.changed_share is None else f"{100 * self.changed_share:.3g} %",
            "state": None if self.optimizer_bytes is None else readable_bytes(self.optimizer_bytes),
            "steps": None if self.steps is None else str(self.steps),
            "seconds": None if self.seconds is None else f"{self.seconds:.1f}",
        }
        return {name: text for name, text in found.items() if text is not None}


def readable_bytes(count: int) -> str:
    """Return a count of bytes with three digits and a unit.

    Examples:
        >>> readable_bytes(3_221_000)
        '3.22 MB'
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
