"""The page of supported models says what a measurement says."""

from __future__ import annotations

import os
import re

import pytest
import transformers

from tests.pages import architectures
from tests.pages.reading import DOCS

TEXT = (DOCS / "reference" / "models.md").read_text()
SAMPLE = (
    "apertus",
    "bart",
    "bloom",
    "ctrl",
    "gpt_oss",
    "mamba",
    "prophetnet",
    "qwen2_moe",
    "reformer",
    "xglm",
    "xlm",
    "xlnet",
)
NAMES = architectures.TYPES if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else SAMPLE

pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in TEXT, reason="the page tells of another version of transformers"
)


def rows(text: str) -> set[str]:
    """The rows of the tables of a page, and the names that it tells without one."""
    told = re.findall(r"^[\w, -]+\.$", text.split("## Not measured")[1], re.MULTILINE)
    return {line for line in text.splitlines() if line.startswith("| ")} | set("".join(told).rstrip(".").split(", "))


def test_every_model_type_of_this_version_is_on_the_page_once() -> None:
    told = [row.split("|")[1].strip() if row.startswith("|") else row for row in rows(TEXT)]
    assert sorted(name for name in told if name and name != "model type") == architectures.TYPES


def test_no_attention_is_taken_for_an_mlp() -> None:
    found = TEXT.split("## Found and exact")[1].split("## Refused")[0]
    assert "attention" not in found and not re.search(r"`[^`]*\b(?:self_)?att(?:n|entions)?\b[^`]*`", found)


@pytest.mark.parametrize("name", NAMES)
def test_the_row_of_a_model_is_what_is_measured_now(name: str) -> None:
    found = rows("\n".join(architectures.page([(name, architectures.measured(name))])))
    heads = {row for row in found if row.startswith("| model type")} | {""}
    assert len(found - heads) == 1 and found - heads <= rows(TEXT)
