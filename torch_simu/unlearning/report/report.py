"""Report: what a person reads after a run, and what programs read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from torch_simu._files import replacing

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

_PACKAGES = ("torch-simu", "torch", "transformers")


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
    """

    sets: Mapping[str, Measures]
    changed_share: float | None = None
    optimizer_bytes: int | None = None
    seconds: float | None = None
    steps: int | None = None
    attack: Mapping[str, Measures] | None = None

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
        }
        attack = {} if self.attack is None else {"attack": {name: dict(each) for name, each in self.attack.items()}}
        return {**sets, **{name: value for name, value in costs.items() if value is not None}, **attack}

    def costs(self) -> dict[str, str]:
        """Return what is known of the work, in words: "changed", "state", "steps" and "seconds"."""
        found = {
            "changed": None if self.changed_share is None else f"{100 * self.changed_share:.3g} %",
            "state": None if self.optimizer_bytes is None else readable_bytes(self.optimizer_bytes),
            "steps": None if self.steps is None else str(self.steps),
            "seconds": None if self.seconds is None else f"{self.seconds:.1f}",
        }
        return {name: text for name, text in found.items() if text is not None}


@dataclass(frozen=True, slots=True)
class Report:
    """The results of several methods on the same sets.

    Attributes:
        title: What was run.
        seed: Its seed.
        methods: Name -> result, in the order of the table.
        settings: Choices to record beside the results.
        notes: Sentences below the table.
        reached: Whether the forget target was reached; None where there was none.
    """

    title: str
    seed: int
    methods: Mapping[str, MethodResult]
    settings: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    reached: bool | None = None

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON knows it."""
        return {
            "title": self.title,
            "seed": self.seed,
            "versions": {name: _version(name) for name in _PACKAGES},
            "methods": {name: result.to_json() for name, result in self.methods.items()},
            "settings": dict(self.settings),
            "notes": list(self.notes),
            **({} if self.reached is None else {"reached": self.reached}),
        }

    def measures(self) -> dict[str, tuple[str, str]]:
        """Return those of `MEASURES` that were measured of every set."""
        sets = [measures for result in self.methods.values() for measures in result.sets.values()]
        return {key: titles for key, titles in MEASURES.items() if all(key in measures for measures in sets)}

    def costs(self) -> list[str]:
        """Return those columns of `MethodResult.costs` that a method has."""
        known = [result.costs() for result in self.methods.values()]
        return [name for name in ("changed", "state", "steps", "seconds") if any(name in costs for costs in known)]

    def attacks(self) -> list[str]:
        """Return the names of the attacks that were made on a method, in the order in which they come."""
        return list(dict.fromkeys(name for result in self.methods.values() for name in result.attack or ()))

    def header(self) -> list[str]:
        """Return the titles of the table's columns."""
        sets = next(iter(self.methods.values())).sets
        measures = [f"{name} {title}" for name in sets for title, _ in self.measures().values()]
        return ["method", *measures, *self.costs()]

    def rows(self) -> list[list[str]]:
        """Return the cells of the table, a list per method."""
        return [
            [
                method,
                *(f"{measures[key]:.3f}" for measures in result.sets.values() for key in self.measures()),
                *(result.costs().get(name, "") for name in self.costs()),
            ]
            for method, result in self.methods.items()
        ]

    def to_markdown(self, plots: Sequence[str] = ()) -> str:
        """Return the report as a Markdown page that shows the plots, which lie beside it."""
        header = self.header()
        lines = [
            f"# {self.title}",
            "",
            f"Seed {self.seed}. {', '.join(f'{title}: {what}' for title, what in self.measures().values())}.",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in self.rows()),
            "",
            *self._attack_table(),
            *(f"{note}\n" for note in self.notes),
            *(f"![{Path(plot).stem.replace('_', ' ')}]({plot})\n" for plot in plots),
        ]
        return "\n".join(lines).rstrip() + "\n"

    def _attack_table(self) -> list[str]:
        names = self.attacks()
        if not names:
            return []
        cells = [
            [
                f"{each['probability']:.3f} / {each['es']:.3f}" if (each := (result.attack or {}).get(name)) else ""
                for name in names
            ]
            for result in self.methods.values()
        ]
        return [
            "Forget rows that the attacker does not have, after each attack: prob. / ES, the largest that it came to.",
            "",
            "| " + " | ".join(["method", *names]) + " |",
            "|" + "---|" * (len(names) + 1),
            *("| " + " | ".join([method, *row]) + " |" for method, row in zip(self.methods, cells, strict=True)),
            "",
        ]

    def save(self, folder: Path, plots: Sequence[str] = ()) -> None:
        """Write `report.json` and `report.md` into a folder."""
        write_json(folder / "report.json", self.to_json())
        with replacing(folder / "report.md") as temporary:
            temporary.write_text(self.to_markdown(plots), encoding="utf-8")


def bargain(before: MethodResult, after: MethodResult, target: float | None, *, reached: bool) -> list[str]:
    """Say in sentences what was forgotten, and what it cost.

    Args:
        before: The measures before, "forget" among the sets.
        after: Those after.
        target: The mean forget probability that was wanted; None: none was.
        reached: Whether it was reached.

    Examples:
        >>> row = {"em": 1.0, "es": 1.0, "probability": 0.9, "qa_exact_match": 1.0}
        >>> worse = {**row, "qa_exact_match": 0.8}
        >>> bargain(MethodResult({"forget": row, "retain": row}), MethodResult({"forget": row, "retain": worse}), 0.1,
        ...         reached=False)[1]
        'Kept of retain: EM 1.000 -> 1.000, ES 1.000 -> 1.000, prob. 0.900 -> 0.900, QA 1.000 -> 0.800.'
    """
    goal = f"a mean forget probability of {target}"
    first = f"Reached {goal} after {after.steps} steps." if reached else f"Did NOT reach {goal} in {after.steps} steps."
    notes = [f"Made {after.steps} steps." if target is None else first]
    for name, measures in before.sets.items():
        if name != "forget":
            moves = [
                f"{title} {measures[key]:.3f} -> {after.sets[name][key]:.3f}"
                for key, (title, _) in MEASURES.items()
                if key in measures
            ]
            notes.append(f"Kept of {name}: {', '.join(moves)}.")
    return notes


def write_json(path: Path, content: object) -> None:
    """Write JSON, whole or not at all; a number that is not finite is refused rather than written as no JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_log(path: Path, log: Sequence[Mapping[str, object]]) -> None:
    """Write a step log as JSON Lines, a record per step."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in log), encoding="utf-8")


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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
