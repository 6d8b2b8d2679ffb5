"""What the rows of the harness say, cell by cell: of the claim, and in tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.forgetting.harness.contenders import DEFAULT
from benchmarks.forgetting.harness.tables import differences, kept_and_back, measures
from benchmarks.results import RESULTS
from benchmarks.verdicts.claims import CLAIMS
from benchmarks.verdicts.parts import NOT_MEASURED, Part

MARK = "<!-- cells -->\n"
"""Where the page is written by hand above, and by this below."""


def page(text: str) -> str:
    """The page anew: what stands above the mark, then the claim and every cell."""
    lines = [f"The claim: {CLAIMS['lasting'].text}"]
    for path in sorted(RESULTS.glob("lasting_*.json")):
        lines += section(path)
    return "\n".join([text.partition(MARK)[0] + MARK, *lines]) + "\n"


def section(path: Path) -> Iterator[str]:
    """A cell: its verdict and its tables."""
    result = json.loads(path.read_text())
    name = " ".join(path.stem.removeprefix("lasting_").removesuffix("_cpu_202611").split("_"))
    yield from ("", f"## {name}", "")
    yield f"`{path.stem}`, seeds {', '.join(map(str, result['seeds']))}."
    # A cell without the default has nothing to say of the claim.
    if any(row["method"] == DEFAULT for row in result["rows"]):
        yield from ("", "| part of the claim | measured | needs | holds |", "|---|---|---|---|")
        yield from map(told, result["verdict"]["parts"])
    for table in (kept_and_back, measures, differences):
        lines = list(table(result))
        if lines[0].count("|") > 2:
            yield from ("", *lines)


def told(part: Part) -> str:
    """A part of a verdict as a line of a table."""
    if part["holds"] == NOT_MEASURED:
        return f"| {part['claim']} | | | {NOT_MEASURED} |"
    holds = "yes" if part["holds"] else "**no**"
    return f"| {part['claim']} | {part['measured']:g} | {part['needs']} {part['bar']:g} | {holds} |"
