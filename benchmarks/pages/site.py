"""Hooks of mkdocs: names break at their parts, tables of sentences stack on phones, and the changelog is a page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

_CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
_NAME = re.compile(r'(<span class="doc doc-object-name[^"]*">)([^<]+)(</span>)|(<code>)([\w./:-]{20,})(</code>)')
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_HEAD = re.compile(r"<th[ >].*?</th>", re.DOTALL)
_ROW = re.compile(r"<tr>.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<td(.*?)>(.*?)</td>", re.DOTALL)
_CODE = re.compile(r"<code>.*?</code>", re.DOTALL)
_SENTENCE = 40
"""Characters of a cell, outside of code, that is no number and no name."""
_MATHJAX = re.compile(r'<script src="[^"]*javascripts/mathjax[^"]*"></script>\n?')


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Put the changelog into its page; its links are those of a file outside of the pages."""
    if page.file.src_uri != "reference/changelog.md":
        return markdown
    return markdown + _CHANGELOG.read_text().partition("\n")[2].replace("](docs/", "](../")


def on_post_page(output: str, **_: object) -> str:
    """Mark where names may be broken and which tables may be stacked, and leave MathJax out where nothing is drawn.

    It is behind the search, which would take the marks for ends of words.
    """
    if 'class="arithmatex"' not in output:
        output = _MATHJAX.sub("", output)
    return _NAME.sub(_marked, _TABLE.sub(lambda match: stackable(match[0]), output))


def stackable(table: str) -> str:
    """A table of sentences with the head of its column on each cell, for screens that are too narrow for columns.

    Examples:
        >>> head, row = "<tr>" + 3 * "<th>fix</th>" + "</tr>", "<tr><td>" + 9 * "Do it. " + "</td></tr>"
        >>> stackable(f"<table>{head}{row}</table>")[63:95]
        '<tr><td data-label="fix">Do it. '
    """
    heads = [html.escape(_text(head)) for head in _HEAD.findall(table)]
    # Two columns fit, and a formula is no label.
    if (
        len(heads) < 3
        or "arithmatex" in "".join(_HEAD.findall(table))
        or not any(len(_text(_CODE.sub("", cell))) > _SENTENCE for _, cell in _CELL.findall(table))
    ):
        return table

    def labeled(row: re.Match[str]) -> str:
        left = iter(heads)
        return _CELL.sub(lambda cell: f'<td{cell[1]} data-label="{next(left, "")}">{cell[2]}</td>', row[0])

    return _ROW.sub(labeled, table).replace("<table>", "<table data-prose>", 1)


def _text(marked: str) -> str:
    """What is read of a piece of a page."""
    return html.unescape(re.sub(r"<[^>]*>", "", marked)).strip()


def _marked(match: re.Match[str]) -> str:
    opening, name, closing = (part for part in match.groups() if part is not None)
    return f"{opening}{breakable(name)}{closing}"


def breakable(name: str) -> str:
    """The name, with a mark behind each dot, underscore and slash that is inside it.

    Examples:
        >>> breakable("tests/test_docs.py")
        'tests/<wbr>test_<wbr>docs.<wbr>py'
    """
    return re.sub(r"(?<=[^\W_])((?:::|[._/])+)(?=[^\W_])", r"\1<wbr>", name)
