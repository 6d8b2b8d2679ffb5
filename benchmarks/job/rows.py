"""Rows of one length for all jobs: paragraphs of prose, of which the last words are the answer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.pretrained.facts import plain_texts
from torch_simu.unlearning.data.examples import Example

ANSWER = 6
"""Words of a paragraph that are scored."""


def sets(folder: Path, count: int) -> dict[str, list[Example]]:
    """So many rows to forget, and as many to keep."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in plain_texts(2 * count, words=(25, 45)):
        words = text.split()
        parts = " ".join(words[:-ANSWER]), " " + " ".join(words[-ANSWER:])
        prompt, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        rows.append(Example((*prompt, *answer), (*[-100] * len(prompt), *answer)))
    return {"forget": rows[:count], "retain": rows[count:]}
