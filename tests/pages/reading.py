"""What a page says: headings and fenced blocks of its source, headings, links and anchors of what is built of it."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from tests.rules.sources import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

FENCE = re.compile(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")


def words_of(text: str) -> str:
    """The letters and numbers of a text: what of a heading is the same in the source and in what is built."""
    return "".join(re.findall(r"\w", text.replace("_", "")))


def source_headings(page: Path) -> list[str]:
    """The headings that a page's source has, in its order, without its fenced blocks."""
    text = page.read_text() + ((ROOT / "CHANGELOG.md").read_text() if page.stem == "changelog" else "")
    text = FENCE.sub("", text).replace("# Changelog\n# Changelog\n", "# Changelog\n")
    found = re.findall(r"^#{1,6} (.+?)(?:\s*\{[^}]*\})?$", text, re.MULTILINE)
    return [words_of(LINK.sub(r"\1", heading)) for heading in found]


@dataclass
class Built(HTMLParser):
    """A built page."""

    headings: list[str] = field(default_factory=list)
    """Their letters and numbers."""
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """What it refers to: pages, anchors, images, scripts, style sheets."""
    prose: list[str] = field(default_factory=list)
    """The text outside of code and of scripts."""
    formulas: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if "id" in named:
            self.ids.append(named["id"] or "")
        if tag in ("a", "link") and named.get("href") is not None:
            self.links.append(named["href"])
        if tag in ("img", "script") and named.get("src"):
            self.links.append(named["src"])
        if "arithmatex" in (named.get("class") or "").split():
            self.formulas += 1
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append("")
        if tag not in ("img", "link", "meta", "input", "br", "hr", "wbr", "source", "path"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while tag in self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if any(re.fullmatch(r"h[1-6]", tag) for tag in self._inside):
            self.headings[-1] += words_of(html.unescape(data))
        if not {"code", "pre", "script", "style"} & set(self._inside):
            self.prose.append(data)


def built(path: Path) -> Built:
    """What a built page says."""
    page = Built()
    page.feed(path.read_text())
    return page
