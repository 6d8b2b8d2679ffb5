"""Hooks of mkdocs: names are broken at their parts, not in the middle of a word, and the changelog is a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
_NAME = re.compile(r'(<span class="doc doc-object-name[^"]*">)([^<]+)(</span>)|(<code>)([\w./:-]{20,})(</code>)')
_MATHJAX = re.compile(r'<script src="[^"]*javascripts/mathjax[^"]*"></script>\n?')


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Put the changelog into its page; its links are those of a file outside of the pages."""
    if page.file.src_uri != "reference/changelog.md":
        return markdown
    return markdown + _CHANGELOG.read_text().partition("\n")[2].replace("](docs/", "](../")


def on_post_page(output: str, **_: object) -> str:
    """Mark where names may be broken, and leave MathJax out where nothing is to be drawn.

    It is behind the search, which would take the marks for ends of words.
    """
    if 'class="arithmatex"' not in output:
        output = _MATHJAX.sub("", output)
    return _NAME.sub(_marked, output)


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
