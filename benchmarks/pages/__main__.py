"""Write what programs write of the pages: whole pages, tables and cells from the result files, and the plots.

Usage: python -m benchmarks.pages [command_line] [models] [benchmarks] [tables] [plots]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import plots
from benchmarks.pages import cells, command_line
from benchmarks.tables import TABLES
from tests.pages import architectures

DOCS = Path(__file__).parents[2] / "docs"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n\n)(?:\|.*\n)*")


def write_reference(name: str, lines: Iterable[str]) -> None:
    """Write a whole page."""
    (DOCS / "reference" / f"{name}.md").write_text("\n".join(lines) + "\n")


def write_cells() -> None:
    """Put every cell of the harness on its page."""
    page = DOCS / "benchmarks.md"
    page.write_text(cells.page(page.read_text()))


def write_tables() -> None:
    """Put every table where its mark is, in whichever page, README's too."""
    made = {name: "\n".join(table()) + "\n" for name, table in TABLES.items()}
    for page in (*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"):
        text = page.read_text()
        found = TABLE.sub(lambda match: match[1] + made[match[2]], text)
        if found != text:
            page.write_text(found)


WRITERS: dict[str, Callable[[], None]] = {
    "command_line": lambda: write_reference("command_line", command_line.page()),
    "models": lambda: write_reference(
        "models", architectures.page((name, architectures.measured(name)) for name in architectures.TYPES)
    ),
    "benchmarks": write_cells,
    "tables": write_tables,
    "plots": plots.main,
}


def main() -> None:
    for name in sys.argv[1:] or WRITERS:
        WRITERS[name]()


if __name__ == "__main__":
    main()
