"""Write the pages that programs write.

Usage: python -m benchmarks.pages
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages import command_line

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def main() -> None:
    (REFERENCE / "command_line.md").write_text("\n".join(command_line.page()) + "\n")


if __name__ == "__main__":
    main()
