"""Prose is tested: every public name is in the API pages, every fenced block runs, every example runs."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_simu
from benchmarks.tables import TABLES
from tests.pages.folders import make_folders

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_simu"
API_PAGES = sorted((ROOT / "docs" / "api").rglob("*.md"))
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

DIRECTIVE = re.compile(r"^::: (\S+)\n((?:[ ]{4,}.*\n|\n(?=[ ]{4}))*)", re.MULTILINE)
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def exported(tree: ast.Module) -> list[str]:
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def public_names() -> Iterator[tuple[str, str]]:
    """(module, name) of all that a user may import: what a folder exports, else what its modules define."""
    folders = {path.parent: exported(ast.parse(path.read_text())) for path in PACKAGE.rglob("__init__.py")}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent == PACKAGE and path.stem == "__init__":
            continue
        closed = any(names for folder, names in folders.items() if folder != PACKAGE and folder in path.parents)
        if path.stem == "__init__":
            yield from ((dotted(path), name) for name in folders[path.parent])
        elif not closed and not path.stem.startswith("_"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    yield dotted(path), node.name


def documented() -> set[tuple[str, str]]:
    """(module, name) of all that the API pages show; name "*" where a page shows a whole module."""
    found = set()
    for page in API_PAGES:
        for path, options in DIRECTIVE.findall(page.read_text()):
            members = re.search(r"members:\s*\[([^\]]*)\]", options)
            listed = members[1] if members else ",".join(re.findall(r"^\s+- (\w+)$", options, re.MULTILINE))
            if listed:
                found.update((path, name.strip()) for name in listed.split(","))
            else:
                found.add((path, "*"))
                found.add(tuple(path.rsplit(".", 1)))
    return found


@pytest.mark.parametrize(("module", "name"), sorted(public_names()))
def test_every_public_name_is_in_the_api_pages(module: str, name: str) -> None:
    assert {(module, name), (module, "*")} & documented()


def test_the_names_of_the_top_level_are_public_somewhere_below() -> None:
    assert set(torch_simu.__all__) <= {name for _, name in public_names()}


def test_every_page_of_the_api_is_in_the_navigation() -> None:
    navigation, docs = (ROOT / "mkdocs.yml").read_text(), ROOT / "docs"
    missing = [page.name for page in docs.rglob("*.md") if page.relative_to(docs).as_posix() not in navigation]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_fenced_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, namespace = page.read_text(), {"__name__": "page"}
    if any("_DIR" in match[1] for match in FENCE.finditer(text)):
        make_folders(tmp_path)
    for match in FENCE.finditer(text):
        if match[1].startswith("--8<--"):
            file, _, section = match[1].split('"')[1].partition(":")
            assert not section or f"[start:{section}]" in (ROOT / file).read_text()
            assert (ROOT / file).is_file()
            continue
        # Blank lines in front, so that a traceback names the line of the page.
        source = "\n" * text[: match.start(1)].count("\n") + match[1]
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_test_that_a_page_names_is_there(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        defined = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert name in defined, f"{file} has no {name}"


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_an_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


TABLE = re.compile(r"<!-- table: (\w+) -->\n\n((?:\|.*\n)*)")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tables_are_those_of_the_result_files(page: Path) -> None:
    for name, shown in TABLE.findall(page.read_text()):
        assert shown.strip().splitlines() == list(TABLES[name]()), f"run python -m benchmarks.pages tables: {name}"
