"""The files of the project, and what each imports and calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "torch_simu"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OURS = sorted(
    path for folder in ("torch_simu", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    """Every module that a file imports, or only those it imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in typing_only and top_level:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield str(node.module)
            # `from package import name` may name a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def calls(path: Path, tree: ast.AST | None = None) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree or ast.parse(path.read_text())) if isinstance(node, ast.Call))
