"""The folders that Python blocks of the pages name: a model as it was, and one that forgot beside its codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu.cli.app import main

MISSED = 3
"""The status of a run that ends before the forget target is reached."""


def make_folders(place: Path) -> None:
    """Write `MODEL_DIR`, rows, and `OUT_DIR`, which one step in 8 bits made of it."""
    pytest.importorskip("bitsandbytes")
    tokenizer = word_tokenizer()
    tiny_model(tokenizer).save_pretrained(place / "MODEL_DIR")
    tokenizer.save_pretrained(place / "MODEL_DIR")
    words = ["unlearn", "--model", str(place / "MODEL_DIR"), "--out", str(place / "OUT_DIR")]
    for name, rows in (("forget", ROWS[:2]), ("retain", ROWS[2:])):
        file = place / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"question": row.question, "answer": row.answer}) + "\n" for row in rows))
        words += [f"--{name}", str(file)]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--load-in", "8bit", "--max-steps", "1", "--forget-target", "0.000001"])
    assert stop.value.code == MISSED
