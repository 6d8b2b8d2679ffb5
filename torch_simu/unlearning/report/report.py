"""Report: what a person reads after a run, and what programs read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from torch_simu._files import replacing
from torch_simu.unlearning.report.page import Note, Part, Picture, Section, Table, to_html, to_markdown
from torch_simu.unlearning.report.result import MEASURES as MEASURES
from torch_simu.unlearning.report.result import RELEARN as RELEARN
from torch_simu.unlearning.report.result import Measures as Measures
from torch_simu.unlearning.report.result import MethodResult as MethodResult
from torch_simu.unlearning.report.result import readable_bytes as readable_bytes
from torch_simu.unlearning.report.words import appendices_of, sections_of

_PACKAGES = ("torch-simu", "torch", "transformers")


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
        summary: What a person should know of a run, as `torch_simu.unlearning.report.facts.RunFacts.to_json` returns
            it; None where the report is a table only.
    """

    title: str
    seed: int
    methods: Mapping[str, MethodResult]
    settings: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    reached: bool | None = None
    summary: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON knows it."""
        return {
            "title": self.title,
            "seed": self.seed,
            "versions": {name: package_version(name) for name in _PACKAGES},
            "methods": {name: result.to_json() for name, result in self.methods.items()},
            "settings": dict(self.settings),
            "notes": list(self.notes),
            **({} if self.reached is None else {"reached": self.reached}),
            **({} if self.summary is None else {"summary": dict(self.summary)}),
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
                # A set that a method was not measured on has empty cells.
                *(
                    f"{result.sets[name][key]:.3f}" if name in result.sets else ""
                    for name in next(iter(self.methods.values())).sets
                    for key in self.measures()
                ),
                *(result.costs().get(name, "") for name in self.costs()),
            ]
            for method, result in self.methods.items()
        ]

    def sections(self, plots: Sequence[str] = ()) -> list[Section]:
        """Return the parts of the report's page.

        Args:
            plots: Files of plots, which lie beside the page.
        """
        figures = Section(
            "" if self.summary is None else "All figures",
            [
                Note(f"Seed {self.seed}. {', '.join(f'{title}: {what}' for title, what in self.measures().values())}."),
                Table(self.header(), self.rows(), numbers=True),
                *self._attack_table(),
                *map(Note, self.notes),
                *map(Picture, plots),
            ],
        )
        if self.summary is None:
            return [figures]
        return [*sections_of(self.summary), figures, *appendices_of(self.summary, self.settings)]

    def to_markdown(self, plots: Sequence[str] = ()) -> str:
        """Return the report as a Markdown page that shows the plots, which lie beside it."""
        return to_markdown(self.title, self.sections(plots))

    def to_html(self, plots: Sequence[str] = (), folder: Path | None = None) -> str:
        """Return the report as an HTML page, with the plots in it that lie in a folder as SVG."""
        return to_html(self.title, self.sections(plots), folder)

    def _attack_table(self) -> list[Part]:
        names = self.attacks()
        if not names:
            return []
        rows = [
            [
                method,
                *(
                    f"{each['probability']:.3f} / {each['es']:.3f}" if (each := (result.attack or {}).get(name)) else ""
                    for name in names
                ),
            ]
            for method, result in self.methods.items()
        ]
        about = (
            "Forget rows that the attacker does not have, after each attack: prob. / ES, the largest that it came to."
        )
        return [about, Table(["method", *names], rows, numbers=True)]

    def save(self, folder: Path, plots: Sequence[str] = ()) -> None:
        """Write `report.json`, `report.md` and `report.html`, with its plots, into a folder."""
        write_json(folder / "report.json", self.to_json())
        for name, page in (("report.md", self.to_markdown(plots)), ("report.html", self.to_html(plots, folder))):
            with replacing(folder / name) as temporary:
                temporary.write_text(page, encoding="utf-8")


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
    """Write content to a file as JSON, whole or not at all; a number that is not finite is refused."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_log(path: Path, log: Sequence[Mapping[str, object]]) -> None:
    """Write a step log to a file as JSON Lines, a record per step."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in log), encoding="utf-8")


def package_version(package: str) -> str:
    """Return the version of an installed package, or that it is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
