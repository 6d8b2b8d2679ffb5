"""What the project says of itself is the same everywhere, and true."""

from __future__ import annotations

import re

import pytest
import yaml

import torch_simu
from tests.package.test_dependencies import PROJECT
from tests.rules.sources import PACKAGE, ROOT, named

PROSE = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("*.py"), ROOT / "Makefile"])


def test_the_citation_says_what_the_metadata_say() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["title"], cited["version"]) == (torch_simu.__name__, torch_simu.__version__)
    assert (cited["license"], cited["authors"]) == (PROJECT["license"], PROJECT["authors"])
    assert PROJECT["urls"]["Paper"] == cited["references"][0]["url"]


def from_an_index(text: str) -> list[str]:
    """What installs the package by its name alone, without the address of a repository behind it."""
    return re.findall(r"pip install[^\n`]*?[ '\"]torch[-_]simu\b(?!\S* @)", text)


def test_nothing_says_to_install_the_package_from_an_index_that_does_not_have_it() -> None:
    assert from_an_index("pip install -U 'torch-simu[cli]'") and not from_an_index(
        "pip install 'torch-simu[cli] @ git+"
    )
    assert not [named(path) for path in PROSE if from_an_index(path.read_text())]


@pytest.mark.parametrize(("entry", "page"), [("CONTRIBUTING.md", "contributing.md"), ("SECURITY.md", "security.md")])
def test_an_entry_of_the_checkout_leads_to_its_page_and_repeats_none_of_it(entry: str, page: str) -> None:
    text, said = (ROOT / entry).read_text(), (ROOT / "docs" / page).read_text()
    assert f"](docs/{page})" in text
    assert not {line for line in text.splitlines() if line and not line.startswith("#")} & set(said.splitlines())
