"""Page: headings, paragraphs, tables and pictures, as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch_simu.unlearning.report.style import INK

_SPECIAL = re.compile(r"([\\`*\[\]<>|&#~])")
_HASH = re.compile(r"[0-9a-f]{64}")
_WIDE = 8
_CODE = re.compile(r"`([^`]*)`")


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph of this package's own words, with names of things between backticks."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Cells below titles.

    Attributes:
        header: The titles.
        rows: The cells of each row.
        numbers: Whether all cells but the first of a row are figures.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = False


@dataclass(frozen=True, slots=True)
class Bullets:
    """Sentences, each of its own."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot: the file beside the page, a PNG, with an SVG of the same name beside it."""

    file: str

    @property
    def title(self) -> str:
        """What it shows, as its name says."""
        return Path(self.file).stem.replace("_", " ")


Part = str | Note | Table | Bullets | Picture
"""A piece of a section; a plain `str` is a paragraph in which nothing is markup."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading; empty for what stands before the first one.
        parts: What stands below it.
        tone: "good", "bad" or "mixed" for a section that is set off.
    """

    title: str
    parts: Sequence[Part] = field(default_factory=tuple)
    tone: str = ""


def plain(text: object) -> str:
    r"""Return text with all that a terminal or a page would act on as escapes: it may come from a file of others.

    Examples:
        >>> print(plain("a\x1b[2J\u202eb\n"))
        a\x1b[2J\u202eb\n
    """
    shown = (each if each.isprintable() or unicodedata.category(each) == "Zs" else _escaped(each) for each in str(text))
    return "".join(shown)


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    r"""Return a page with this title as Markdown.

    Examples:
        >>> print(to_markdown("A", [Section("B", ["1 < 2 | x"])]))
        # A
        <BLANKLINE>
        ## B
        <BLANKLINE>
        1 \< 2 \| x
        <BLANKLINE>
    """
    blocks = [f"# {_markdown(title)}"]
    for section in sections:
        blocks += [f"## {_markdown(section.title)}"] if section.title else []
        blocks += [_markdown_part(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def to_html(title: str, sections: Sequence[Section], folder: Path | None = None) -> str:
    """Return a page as HTML: one file without scripts, for light and dark screens and for print.

    Args:
        title: Heading of the page.
        sections: Its parts.
        folder: Where the plots lie; an SVG there becomes a part of the page.

    Examples:
        >>> "<p>1 &lt; 2</p>" in to_html("A", [Section("B", ["1 < 2"])])
        True
    """
    body = [f"<h1>{_html(title)}</h1>"]
    for section in sections:
        body.append(f'<section class="{section.tone or "plain"}">')
        body += [f"<h2>{_html(section.title)}</h2>"] if section.title else []
        body += [_html_part(part, folder) for part in section.parts]
        body.append("</section>")
    return _FRAME.format(title=_html(title), style=_STYLE, body="\n".join(body))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _markdown(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", plain(text))


def _markdown_part(part: Part) -> str:
    match part:
        case Note(text):
            return plain(text)
        case Bullets(items):
            return "\n".join(f"- {_markdown(item)}" for item in items)
        case Table(header, rows):
            lines = [_line(header), "|" + "---|" * len(header), *map(_line, rows)]
            return "\n".join(lines)
        case Picture(file):
            return f"![{part.title}]({file})"
        case _:
            return _markdown(part)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown, cells)) + " |"


def _html(text: str) -> str:
    return html.escape(plain(text))


def _html_part(part: Part, folder: Path | None) -> str:
    match part:
        case Note(text):
            return "<p>" + _CODE.sub(r"<code>\1</code>", _html(text)) + "</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_html(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            return _html_table(header, rows, numbers=part.numbers)
        case Picture():
            return _html_picture(part, folder)
        case _:
            return f"<p>{_html(part)}</p>"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool) -> str:
    kinds = [name for name, holds in (("numbers", numbers), ("wide", len(header) > _WIDE)) if holds]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    titles = "".join(f'<th scope="col">{_html(each)}</th>' for each in header)
    lines = "".join(f'<tr><th scope="row">{_html(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows)
    return f"<div><table{kind}><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"


def _cell(text: str) -> str:
    return f'<td class="hash">{text}</td>' if _HASH.fullmatch(text) else f"<td>{_html(text)}</td>"


def _html_picture(picture: Picture, folder: Path | None) -> str:
    caption = f"<figcaption>{_html(picture.title)}</figcaption>"
    drawing = None if folder is None else (folder / picture.file).with_suffix(".svg")
    if drawing is None or not drawing.is_file():
        shown = f'<img src="{_html(picture.file)}" alt="{_html(picture.title)}">'
    else:
        # Within a page an SVG begins with its own element, and two of them must not share an id.
        text = drawing.read_text(encoding="utf-8")
        text = text[text.index("<svg") :]
        mark = re.sub(r"\W", "-", Path(picture.file).stem)
        text = re.sub(r'(?<=\bid=")', f"{mark}-", text.replace(INK, "currentColor"))
        shown = re.sub(r'(?<=url\(#)|(?<=href="#)', f"{mark}-", text)
    return f'<figure role="img" aria-label="{_html(picture.title)}">{shown}{caption}</figure>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --ground: #fff; --line: #8888; --good: #009e73; --bad: #d55e00;
  --mixed: #e69f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --ground: #14161a; } }
body { color: var(--ink); background: var(--ground); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
section.good, section.bad, section.mixed { border-left: .5rem solid; padding: .1rem 1rem; }
section.good { border-color: var(--good); } section.bad { border-color: var(--bad); }
section.mixed { border-color: var(--mixed); }
div { overflow-x: auto; }
table { border-collapse: collapse; margin: .7rem 0; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; min-width: 7rem; }
.hash { font: .75rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; min-width: 12rem; }
.wide { font-size: .75rem; } .wide th, .wide td { padding-right: .5rem; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; }
svg, img { max-width: 100%; height: auto; }
@media print { :root { --ink: #000; --ground: #fff; } body { max-width: none; margin: 0; font-size: 10pt; }
  h2, figure, tr { break-inside: avoid; break-after: auto; } h2 { break-after: avoid; } div { overflow: visible; } }
"""

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
