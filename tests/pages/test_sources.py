"""What programs write is what they would write now, and what stands in a fence runs or is no program."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from benchmarks.pages import command_line
from tests.pages.reading import DOCS, FENCE, PAGES
from tests.rules.sources import ROOT, named
from torch_simu.cli.app import app

SOURCES = [*PAGES, ROOT / "README.md", ROOT / "CHANGELOG.md"]
RUN = ("python", "console")
"""Languages of the fences that other tests run."""
REFERENCES = DOCS / "reference" / "references.md"
SHOWN = ("shell", "text", "json", "toml", "yaml")


def test_the_page_of_the_command_line_is_what_the_program_says() -> None:
    written = (DOCS / "reference" / "command_line.md").read_text()
    assert written.splitlines() == list(command_line.page()), "run python -m benchmarks.pages"


def test_the_page_of_the_command_line_has_every_command_and_every_option_with_its_default() -> None:
    text = (DOCS / "reference" / "command_line.md").read_text()

    def look(command: object, path: tuple[str, ...]) -> int:
        part = text[text.index(f"# {' '.join(path)}\n") :].split("\n## ")[0].split("\n### ")[0]
        for param in command.params:
            anchor = f"{{ #{'-'.join([*(path[1:] or path), param.name]).replace('_', '-')} }}"
            (line,) = (line for line in part.splitlines() if anchor in line)
            assert all(option in line for option in param.opts if option.startswith("-"))
            assert ("*required*" in line) == param.required
            told = part.split(line + "\n")[1].split("\n")[0]
            assert len(told) > len(":   ")
            if param.default not in (None, False) and not param.required:
                assert f"Default: `{str(param.default).strip('()')}`." in told
        return 1 + sum(look(inner, (*path, name)) for name, inner in getattr(command, "commands", {}).items())

    assert look(typer.main.get_command(app), ("torch-simu",)) == 13


@pytest.mark.parametrize("page", SOURCES, ids=named)
def test_a_fence_says_what_it_holds_and_what_can_run_does(page: Path) -> None:
    for indent, language, text in FENCE.findall(page.read_text()):
        assert language in (*RUN, *SHOWN), f"{page.name} has a fence of {language or 'no language'}"
        # Inside a list the tests that run fences would not see them.
        assert not (indent and language in RUN), f"{page.name} has an indented fence of {language}"
        assert language in RUN or not is_program(text), f"{page.name} shows a program that no test runs:\n{text}"


def is_program(text: str) -> bool:
    """Whether a text is Python that does something."""
    try:
        return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(ast.parse(text)))
    except SyntaxError:
        return False


def test_a_program_in_a_fence_of_text_is_seen() -> None:
    assert is_program("from torch import nn\nnn.Linear(2, 2)\n")
    assert not is_program("torch-simu demo\n") and not is_program("simu 0.1\n")


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page that is read where it lies."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", SOURCES[-2:], ids=named)
def test_a_link_of_a_page_that_is_not_built_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", text):
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def test_every_paper_that_code_and_pages_name_is_among_the_references() -> None:
    files = [*(ROOT / "torch_simu").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *SOURCES]
    named_there = {
        name
        for file in files
        for name in re.findall(r"(?i)arxiv[\s:]*(?:\.org/abs/)?(\d{4}\.\d{4,5})", file.read_text())
    }
    listed = re.findall(r"arXiv (\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{4,5})\)", REFERENCES.read_text())
    assert len(named_there) > 10 and named_there == {paper for paper, _ in listed}
    assert all(paper == linked for paper, linked in listed)


def test_every_paper_that_code_names_by_its_authors_is_among_the_references() -> None:
    text = " ".join(REFERENCES.read_text().split())
    pattern = r"\b([A-Z][a-z]+) (?:et al\.|and [A-Z][a-z]+),? ((?:19|20)\d\d)"
    for file in [*(ROOT / "torch_simu").rglob("*.py"), *PAGES]:
        for author, year in re.findall(pattern, file.read_text()):
            assert re.search(rf"\b{author} (?:et al\.|and \w+) {year}", text), f"{named(file)} names {author} {year}"
