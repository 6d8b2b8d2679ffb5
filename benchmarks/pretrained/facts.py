"""Facts that a pretrained model may know, from the packages `countryinfo`, `pycountry` and `periodictable`.

Plain text is the prose in the docstrings of Python's own modules: it is everywhere where Python is.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

TEMPLATES = {
    "capital": "The capital of {} is",
    "language": "The official language of {} is",
    "continent": "{} is a country in",
    "currency": "The currency of {} is the",
    "symbol": "The chemical symbol for {} is",
}
ASKED_OTHERWISE = "Question: Which city is the capital of {}?\nAnswer:"


class Fact(NamedTuple):
    """What is asked, of what, and the answer with the space before it."""

    kind: str
    subject: str
    answer: str

    @property
    def prompt(self) -> str:
        return TEMPLATES[self.kind].format(self.subject)

    @property
    def otherwise(self) -> str:
        """The same question of a capital in other words."""
        return ASKED_OTHERWISE.format(self.subject)


def facts() -> dict[str, list[Fact]]:
    """Kind -> facts, sorted by subject; a country counts where it has one answer only."""
    found = [*_of_countries(), *_symbols()]
    return {kind: sorted(each for each in found if each.kind == kind) for kind in TEMPLATES}


def _of_countries() -> Iterator[Fact]:
    import pycountry
    from countryinfo import all_countries

    # By their codes: some have two names there.
    found = {each.info().get("ISO", {}).get("alpha3", ""): each.info() for each in all_countries()}
    for code, known in found.items():
        official = pycountry.countries.get(alpha_3=code)
        if official is None or known.get("population", 0) < 1_000_000:
            continue
        name = getattr(official, "common_name", official.name)
        if "," in name:
            continue
        answers = {
            "capital": [known["capital"]] if known.get("capital") else [],
            "language": [_named(pycountry.languages, alpha_2=code) for code in known.get("languages", ())],
            "continent": [known["subregion" if known["region"] == "Americas" else "region"]],
            "currency": [_named(pycountry.currencies, alpha_3=code) for code in known.get("currencies", ())],
        }
        for kind, values in answers.items():
            if len(values) == 1 and values[0]:
                # "Yen", not "Japanese Yen": the last word is what follows "the currency of Japan is the".
                value = values[0].split()[-1].lower() if kind == "currency" else values[0]
                yield Fact(kind, name, f" {value}")


def _named(table: object, **key: str) -> str | None:
    found = table.get(**key)
    return None if found is None else re.sub(r" \(.*\)", "", found.name)


def _symbols() -> Iterator[Fact]:
    import periodictable

    for element in periodictable.elements:
        if 1 <= element.number <= 103:
            yield Fact("symbol", element.name, f" {element.symbol}")


def plain_texts(number: int, words: tuple[int, int] = (25, 70)) -> list[str]:
    """Paragraphs of prose of so many words, always the same ones on one version of Python."""
    found = []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in ("antigravity", "this", "idlelib", "lib2to3"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                text = inspect.getdoc(importlib.import_module(name)) or ""
            except ImportError:
                continue
        for paragraph in text.split("\n\n"):
            flat = " ".join(paragraph.split())
            if words[0] <= len(flat.split()) <= words[1] and re.fullmatch(r"[A-Z][\w ,.;:'()/-]+\.", flat):
                found.append(flat)
    return list(dict.fromkeys(text for text in found if "--" not in text))[:number]
