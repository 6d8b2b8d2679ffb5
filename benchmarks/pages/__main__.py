"""Write the pages that programs write.

Usage: python -m benchmarks.pages
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages import command_line
from tests.pages import architectures

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def main() -> None:
    rows = ((name, architectures.measured(name)) for name in architectures.TYPES)
    for name, lines in (("command_line", command_line.page()), ("models", architectures.page(rows))):
        (REFERENCE / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
