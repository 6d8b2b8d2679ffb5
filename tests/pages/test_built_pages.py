"""What is built is what was written: no heading is swallowed, no link is dead, no Markdown is left as it was."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from benchmarks.pages.site import breakable, stackable
from tests.pages.reading import DOCS, FENCE, PAGES, Built, built, source_headings
from tests.rules.sources import named


@cache
def of(path: Path) -> Built:
    return built(path)


def html_of(site: Path, page: Path) -> Path:
    return site / page.relative_to(DOCS).with_suffix(".html")


def missing(wanted: list[str], found: list[str]) -> list[str]:
    """The headings that are not there, or not in this order."""
    left = iter(found)
    return [heading for heading in wanted if heading not in left]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_heading_of_the_source_is_a_heading_of_the_page(page: Path, site: Path) -> None:
    wanted = source_headings(page)
    assert wanted and not missing(wanted, of(html_of(site, page)).headings)


def test_a_heading_that_a_table_swallowed_is_seen() -> None:
    page = Built()
    page.feed("<h1>Results</h1><table><tr><td>## Cost</td></tr></table>")
    assert missing(["Results", "Cost"], page.headings) == ["Cost"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_markdown_is_left_as_it_was_written(page: Path, site: Path) -> None:
    text = "".join(of(html_of(site, page)).prose)
    left = re.findall(
        r"^(?:#{1,6} \w|\|[-| ]+\||:::|```|--8<--).*|\]\([^)]*\)|\*\*\w|\]\[torch_simu", text, re.MULTILINE
    )
    assert not left


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_of_a_page_leads_to_a_page_and_an_anchor_that_are_there(page: Path, site: Path) -> None:
    path = html_of(site, page)
    for link in of(path).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            assert parts.scheme in ("https", "mailto"), link
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        assert target.is_file(), link
        # The top of a page has the anchor of its first heading, or none.
        if parts.fragment and target.suffix == ".html":
            assert unquote(parts.fragment) in of(target).ids, link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_two_anchors_of_a_page_have_one_name(page: Path, site: Path) -> None:
    ids = [name for name in of(html_of(site, page)).ids if not name.startswith("__")]
    assert not {name for name in ids if ids.count(name) > 1}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_formula_of_the_source_is_a_formula_of_the_page(page: Path, site: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    # One block of two dollars is one formula, as is what stands between single ones.
    written = len(re.findall(r"\$\$.+?\$\$|(?<!\$)\$(?!\s)[^$]+?(?<!\s)\$(?!\d)", text, re.DOTALL))
    assert of(html_of(site, page)).formulas >= written


def test_nothing_is_taken_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", path.read_text()):
            assert not re.search(r"(?:src|href)=\"(?:https?:)?//", tag) or 'rel="canonical"' in tag, tag


def test_a_page_loads_what_draws_formulas_if_it_has_any(site: Path) -> None:
    for page in PAGES:
        path = html_of(site, page)
        assert ("mathjax/tex-svg.js" in path.read_text()) == (of(path).formulas > 0), page.name


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("torch_simu.update.clipped_step_", "torch_|simu.|update.|clipped_|step_"),
        ("tests/test_docs.py::test_a_page", "tests/|test_|docs.|py::|test_|a_|page"),
        ("forward", "forward"),
        ("__init__", "__init__"),
    ],
)
def test_a_name_is_broken_at_its_parts_only(name: str, marked: str) -> None:
    assert breakable(name).replace("<wbr>", "|") == marked


def test_a_table_of_sentences_names_the_column_of_each_cell_and_one_of_numbers_stays_as_it_is() -> None:
    table = "<table><thead><tr><th>a</th><th>b &lt; c</th><th></th></tr></thead><tr><td>1</td><td>{}</td></tr></table>"
    found = stackable(table.format("A word <code>word</code> " * 9))
    assert found.startswith("<table data-prose>") and '<td data-label="a">1</td><td data-label="b &lt; c">A' in found
    formula = table.format("A word " * 9).replace("<th>a", '<th><span class="arithmatex">a</span>')
    for small in (formula, table.format("1.5"), table.format(f"<code>{'name.' * 20}</code>")):
        assert stackable(small) == small


def test_the_errors_of_every_kind_stack_on_a_phone(site: Path) -> None:
    text = (site / "errors.html").read_text()
    assert text.count("<table") == text.count("<table data-prose>") > 5
