"""A keyed hash is the same for the same rows, in any order and file, and says nothing without its key."""

from __future__ import annotations

import dataclasses
import json
import random
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_simu.unlearning.data.rows import Row, Turn, load_rows
from torch_simu.unlearning.report.keyed import keyed_hash, new_key, read_key, write_key

KEY = "0f" * 32
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(str.strip)
rows = st.builds(Row, texts, texts, alternatives=st.lists(texts, max_size=2).map(tuple))


@given(st.lists(rows, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_order_origin_and_other_fields_do_not_count(some: list[Row], chance: random.Random) -> None:
    other = [dataclasses.replace(row, source="elsewhere", line=7, extra={"id": 1}) for row in some]
    chance.shuffle(other)
    assert keyed_hash(other, KEY) == keyed_hash(some, KEY) != keyed_hash(some, "0e" * 32)


@given(st.lists(rows, min_size=1, max_size=6), rows)
def test_another_row_more_or_less_is_another_hash(some: list[Row], row: Row) -> None:
    assert keyed_hash([*some, row], KEY) != keyed_hash(some, KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"question": "Who?"},
        {"answer": "Me"},
        {"raw": True},
        {"turns": (Turn("system", "Be brief."),)},
        {"alternatives": ("Me",)},
        {"question": "Who wrote", "answer": "Emma? Jane"},
    ],
)
def test_all_that_the_model_is_shown_counts(change: dict[str, object]) -> None:
    row = Row("Who wrote Emma?", "Jane")
    assert keyed_hash([dataclasses.replace(row, **change)], KEY) != keyed_hash([row], KEY)


def test_the_owner_of_rows_and_key_finds_the_hash_again_in_a_file_of_another_format(tmp_path) -> None:
    content = [{"question": f"Who is {number}?", "answer": "Ada"} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "b.json").write_text(json.dumps([{**row, "id": 1} for row in content[::-1]]))
    write_key(tmp_path / "out.key", KEY)
    key = read_key(tmp_path / "out.key")
    assert keyed_hash(load_rows(tmp_path / "a.jsonl"), key) == keyed_hash(load_rows(tmp_path / "b.json"), KEY)


def test_a_key_is_random_and_its_file_private(tmp_path) -> None:
    assert new_key() != new_key() and len(new_key()) == 64
    write_key(tmp_path / "key", KEY)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("content", [b"", b"0f", b"\xff" * 64, b"0F" * 32, b"0f" * 33])
def test_what_is_no_key_is_refused(content: bytes, tmp_path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ValueError, match="holds no key, expected 64 hexadecimal digits. Give another file"):
        read_key(tmp_path / "key")
