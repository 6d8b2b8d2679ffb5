"""A file in any form that holds rows is read; any other is refused in one line that says what to do."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.rows import load_rows

RECORDS = [{"question": "Who?", "answer": "Bob", "id": 1}, {"question": "Where?", "answer": "Rome", "id": 2}]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()


def test_a_packed_file_is_read_like_the_plain_one(tmp_path):
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    plain.write_bytes(LINES)
    packed.write_bytes(gzip.compress(LINES))
    for path in (plain, packed):
        rows = load_rows(path)
        assert [(row.question, row.answer, row.line) for row in rows] == [("Who?", "Bob", 1), ("Where?", "Rome", 2)]
        assert rows[0].place == f"{path}:1"


def test_a_parquet_file_is_read_like_json_lines(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    assert [(row.question, row.line, row.extra) for row in load_rows(path)] == [
        ("Who?", 1, {"id": 1}),
        ("Where?", 2, {"id": 2}),
    ]


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rows\.parquet: the file is Parquet, .* Run: pip install pyarrow, or save"):
        load_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "cut.jsonl.gz: the gzip file is damaged"),
        ("bad.jsonl.gz", b"\x1f\x8b" + b"x" * 40, "bad.jsonl.gz: the gzip file is damaged"),
        ("rows.zip", b"PK\x03\x04" + LINES, "rows.zip: the file is a zip archive, expected"),
        ("rows.xz", b"\xfd7zXZ\x00" + LINES, "rows.xz: the file is a xz archive"),
        ("rows.zst", b"\x28\xb5\x2f\xfd" + LINES, "rows.zst: the file is a zstd archive"),
        ("rows.bz2", b"BZh9" + LINES, "rows.bz2: the file is a bzip2 archive"),
        ("rows.parquet", b"PAR1\x15\x04\xff\xfePAR1", "rows.parquet: the Parquet file is damaged"),
        ("rows.csv", b"question,answer\nWho?,Bob\n", "rows.csv:1: broken JSON (Expecting value at column 1), expected"),
        ("rows.csv", b"question,answer\nWho?,Bob\n", "Save a table as JSON Lines: pandas.read_csv(path)"),
        ("utf16.jsonl", LINES.decode().encode("utf-16"), "utf16.jsonl:1: byte 0xff is not UTF-8"),
        ("long.jsonl", b'{"question": ' + b"1" * 5000 + b"}", "long.jsonl:1: a number with too many digits"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", denied)
    with pytest.raises(DataError, match=r"rows\.jsonl: the file cannot be read \(Permission denied\)"):
        load_rows(path)
