"""Write the pages that programs write.

Usage: python -m benchmarks.pages [command_line] [models]
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.pages import command_line
from tests.pages import architectures

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


PAGES = {
    "command_line": command_line.page,
    "models": lambda: architectures.page((name, architectures.measured(name)) for name in architectures.TYPES),
}


def main() -> None:
    for name in sys.argv[1:] or PAGES:
        (REFERENCE / f"{name}.md").write_text("\n".join(PAGES[name]()) + "\n")


if __name__ == "__main__":
    main()
