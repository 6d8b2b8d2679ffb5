"""A bad row or file of rows gets one error of one line, with file and line, that says what was expected."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.language import tiny_model, word_tokenizer
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.data.rows import load_rows

GOOD = {"question": "Who ?", "answer": "Bob"}
USER, ASSISTANT = {"role": "user", "content": "Who ?"}, {"role": "assistant", "content": "Bob"}
LAYOUTS = [
    {"question": "Who ?", "answer": "Bob"},
    {"prompt": "Who ?", "response": "Bob"},
    {"instruction": "Answer .", "input": "Who ?", "output": "Bob"},
    {"instruction": "Who ?", "context": "Bob wrote .", "response": "Bob"},
    {"input": "Who is", "output": "Bob"},
    {"system": "Be brief .", "question": "Who ?", "answer": "Bob"},
    {"text": "Bob wrote it ."},
]
NO_TEXT = [3, 2.5, True, {"a": "b"}, "\ud83d", "cut \udc00", [1], [None]]
EMPTY = [None, "", " \n\t", []]
PROMPT_LIKE = ["instruction", "input", "text", "history", "messages", "conversations", "document", "query", "Context"]


def bad_records() -> dict[str, object]:
    """Name -> what stands on the second line of a file of rows."""
    found: dict[str, object] = {f"no object: {value!r}": value for value in (3, 2.5, "text", None, True, [1], [], {})}
    for layout in LAYOUTS:
        named = "/".join(layout)
        for field in layout:
            # A part that may be left out may be empty.
            may_lack = field in ("context", "system") or (field == "input" and "instruction" in layout)
            for value in NO_TEXT + ([[]] if may_lack else EMPTY):
                found[f"{named}: {field} is {value!a}"] = {**layout, field: value}
            rest = {name: value for name, value in layout.items() if name != field}
            if not may_lack and not (rest.keys() >= {"input", "output"}):
                found[f"{named}: without {field}"] = rest
        # These two make an Alpaca row.
        joined = {"input"} if "instruction" in layout else {"instruction"} if "input" in layout else set()
        for field in PROMPT_LIKE:
            if field not in layout and field not in joined:
                found[f"{named}: {field} beside"] = {**layout, field: ["more"] if field == "history" else "more"}
    messages: list[object] = [
        *("Who ?", 3, None, {}, [], [USER], [ASSISTANT], [ASSISTANT, USER], [USER, USER], [USER, ASSISTANT, USER]),
        *([USER, USER, ASSISTANT, ASSISTANT], [3, ASSISTANT], [USER, "Bob"], [USER, None], [{}, ASSISTANT]),
        *([USER, {"role": "assistant"}], [USER, {"content": "Bob"}], [USER, {"role": "tool", "content": "Bob"}]),
        *([USER, {"role": 3, "content": "Bob"}], [USER, {**ASSISTANT, "tool_calls": [{}]}]),
        *([USER, {**ASSISTANT, "reasoning_content": "hm"}], [USER, {**ASSISTANT, "content": [{"type": "image"}]}]),
        *([USER, {**ASSISTANT, "content": ["Bob"]}], [USER, {**ASSISTANT, "content": [{"text": 3}]}]),
        *([{**USER, "content": content}, ASSISTANT] for content in ("", " ", None, 3, {}, [], "\ud83d")),
        *([{"role": "system", "content": content}, USER, ASSISTANT] for content in ("", None, "\udfff", 3)),
    ]
    found |= {f"messages: {value!a}": {"messages": value} for value in messages}
    return found


TEXT = json.dumps(GOOD).encode()
BAD_LINES = {
    "cut": TEXT[:-1],
    "cut in a text": TEXT[:-4],
    "two objects": TEXT + TEXT,
    "trailing comma": TEXT[:-1] + b",}",
    "comma behind": TEXT + b",",
    "single quotes": TEXT.replace(b'"', b"'"),
    "no quotes": b"question: Who",
    "a comment": b"// " + TEXT,
    "a control character": TEXT.replace(b"Who", b"W\x00o"),
    "a tab": TEXT.replace(b"Who", b"W\to"),
    "half an escape": TEXT.replace(b"Who", b"W\\u12"),
    "Latin-1": TEXT.replace(b"Who", "Wér".encode("latin-1")),
    "a byte of UTF-16": b"\xff" + TEXT,
    "an overlong character": TEXT.replace(b"Who", b"\xc0\xaf"),
    "half a surrogate in UTF-8": TEXT.replace(b"Who", b"\xed\xa0\xbd"),
    "nested": b'{"question":' + b"[" * 100_000,
    "a long number": b'{"question":' + b"1" * 5_000 + b"}",
    "not a number": b'{"question": NaN, "answer": "a"}',
    "CSV": b"Who,Bob",
    "XML": b"<row>Who</row>",
}
"""Name -> bytes of the second line."""
BAD_FILES = {
    "empty": b"",
    "blank": b"\n \n",
    "an empty list": b"[]",
    "a list that is cut": b"[" + TEXT,
    "a list of lists": b"[[]]",
    "zip": b"PK\x03\x04" + TEXT,
    "xz": b"\xfd7zXZ\x00" + TEXT,
    "zstd": b"\x28\xb5\x2f\xfd" + TEXT,
    "bzip2": b"BZh91AY" + TEXT,
    "gzip that is cut": gzip.compress(TEXT * 50)[:-12],
    "gzip of nothing": gzip.compress(b""),
    "gzip of broken JSON": gzip.compress(TEXT[:-1]),
    "gzip of bytes": gzip.compress(b"\xff\xfe"),
    "Parquet that is cut": b"PAR1\x15\x04\xff\xfe",
    "Parquet of nothing": b"PAR1PAR1",
    "UTF-16": TEXT.decode().encode("utf-16"),
    "UTF-32": TEXT.decode().encode("utf-32"),
    "a picture": b"\x89PNG\r\n\x1a\n\x00",
    "PDF": b"%PDF-1.7\n",
    "a tensor file": b"\x08\x00\x00\x00\x00\x00\x00\x00{}",
}
LOOP = "{% for m in messages %}"
BAD_TEMPLATES = {
    "raises": "{{ raise_exception('a system\nmessage is required') }}",
    "broken": LOOP,
    "undefined": "{{ messages[5].content.upper() }}",
    "divides": "{{ 1 / 0 }}",
    "too many": "{% for i in range(10 ** 12) %}{% endfor %}",
    "unsafe": "{{ messages.__class__.__mro__ }}",
    "empty": "x",
    "loses the question": LOOP + "{% if m.role != 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "loses the answer": LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "doubles": LOOP + "{{ m.content }}{{ m.content }}{% endfor %}",
}
BAD = bad_records()


def assert_refused(work, place: str) -> None:
    with pytest.raises(DataError) as caught:
        work()
    message = str(caught.value)
    assert type(caught.value) is DataError
    assert message.startswith(place) and ", expected " in message and len(message.splitlines()) == 1
    message.encode()


def second_line(folder: Path, line: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(TEXT + b"\n" + line + b"\n")
    return path


def test_there_are_at_least_200_bad_rows_and_files() -> None:
    assert len(BAD) + len(BAD_LINES) + len(BAD_FILES) + len(BAD_TEMPLATES) >= 200


@pytest.mark.parametrize("record", BAD.values(), ids=BAD)
def test_a_bad_record_is_refused_with_its_line(record: object, tmp_path: Path) -> None:
    path = second_line(tmp_path, json.dumps(record).encode())
    assert_refused(lambda: load_rows(path), f"{path}:2: ")


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(line: bytes, tmp_path: Path) -> None:
    path = second_line(tmp_path, line)
    assert_refused(lambda: load_rows(path), f"{path}:2: ")


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_with_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert_refused(lambda: load_rows(path), f"{path}:")


@pytest.mark.parametrize("template", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_row_that_the_template_does_not_write_is_refused_with_its_line(template: str, tmp_path: Path) -> None:
    (row,) = load_rows(second_line(tmp_path, b""))
    assert_refused(lambda: encode([row], word_tokenizer(chat_template=template)), f"{tmp_path / 'rows.jsonl'}:1: ")


@pytest.mark.parametrize("max_length", [1, 2])
def test_an_answer_that_does_not_fit_is_refused_with_its_line(max_length: int, tmp_path: Path) -> None:
    path = second_line(tmp_path, TEXT)
    assert_refused(lambda: encode(load_rows(path), word_tokenizer(), max_length=max_length), f"{path}:1: ")


@pytest.mark.parametrize("family", ["gpt2", "gpt2 of fewer tokens"])
def test_a_row_that_the_model_cannot_read_is_refused_with_its_line(family: str, tmp_path: Path) -> None:
    fewer = "fewer" in family
    question = "Who is the mayor ?" if fewer else "Who ? " * 99
    path = second_line(tmp_path, json.dumps({"question": question, "answer": "Bob"}).encode())
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer, "gpt2")
    if fewer:
        model.resize_token_embeddings(max(encode(load_rows(path)[:1], tokenizer)[0].input_ids) + 1)
    assert_refused(lambda: check_fits(model, encode(load_rows(path), tokenizer)), f"{path}:2: ")
