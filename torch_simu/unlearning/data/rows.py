"""Rows: questions and answers with their origin, from JSON files or Hugging Face data sets."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch_simu._checks import problem

# (question field, answer field, whether the question is the prompt as it stands).
_LAYOUTS = (("question", "answer", False), ("prompt", "response", False), ("input", "output", True))
_ACCEPTED = " or ".join(f"{question}/{answer}" for question, answer, _ in _LAYOUTS)


class DataError(ValueError):
    """What is wrong with a data file, a row or a tokenizer, in one line with its place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer.

    Args:
        question: What the model is asked. Not empty.
        answer: What it should say: the text that is scored. Not empty.
        extra: The other fields of the record, such as `id`, `task`, `paraphrased_answer` or `option1`.
        source: The file or data set the row comes from.
        line: Line in a JSON Lines file, else the place in the list, counted from one; 0 when unknown.
        raw: Whether the question is the prompt as it stands, without a template, as in LUME.

    Raises:
        DataError: If the question or the answer is no text or is empty.

    Examples:
        >>> Row("Who wrote Emma?", "Jane Austen", source="books.jsonl", line=3).place
        'books.jsonl:3'
    """

    question: str
    answer: str
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)
    source: str = ""
    line: int = 0
    raw: bool = False

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise DataError(problem(f"{self.place}: the {name} is {text!r} of type {type(text).__name__}", "text"))
            if not text.strip():
                raise DataError(problem(f"{self.place}: the {name} is empty ({text!r})", "some text"))

    @property
    def place(self) -> str:
        """Where the row comes from, as `source:line`."""
        return f"{self.source or 'row'}:{self.line}"


def rows_from_records(records: Iterable[Mapping[str, object]], source: str = "records") -> list[Row]:
    """Turn records, such as dicts, into rows.

    Args:
        records: Mappings with the fields question/answer, prompt/response, or LUME's input/output (then `Row.raw` is
            set). All other fields are kept in `Row.extra`.
        source: The name that errors and `Row.source` give the records.

    Raises:
        DataError: If there is no record, or one is no mapping, has other fields, or an empty question or answer.

    Examples:
        >>> rows_from_records([{"prompt": "2 + 2 =", "response": "4", "level": 1}])[0].extra
        {'level': 1}
    """
    return _numbered_rows(enumerate(records, start=1), source)


def load_rows(source: str | Path) -> list[Row]:
    """Load the rows of a JSON Lines file, of a JSON file with one list, or of a Hugging Face data set.

    Args:
        source: A path, or the name of a data set as `name`, `name:config` or `name:config:split` (the split is "train"
            unless named), such as `locuslab/TOFU:forget01`. Fields as in `rows_from_records`; files are UTF-8.

    Raises:
        DataError: If the source cannot be read or holds something else; the message has the file and the line.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "forget.jsonl")
        ...     _ = path.write_text('{"question": "Who wrote Emma?", "answer": "Jane Austen"}')
        ...     load_rows(path)[0].answer
        'Jane Austen'
    """
    path = Path(source)
    if path.is_file():
        return _numbered_rows(_read_json(path), str(path))
    name = str(source)
    looks_like_file = isinstance(source, Path) or path.is_dir() or name.endswith((".json", ".jsonl"))
    if looks_like_file or not ("/" in name or ":" in name):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            problem(f"{name}: the file {what}", "a JSON or JSON Lines file, or a data set as name:config:split")
        )
    return _numbered_rows(enumerate(_download(name), start=1), name)


def check_disjoint(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Raise if a row is to be forgotten and retained at once.

    Two rows are the same when question and answer are, whatever their case and white space.

    Raises:
        DataError: If the sets overlap; it names the first pair and counts the rows.

    Examples:
        >>> check_disjoint([Row("Who wrote Emma?", "Jane Austen")], [Row("Who wrote Ulysses?", "James Joyce")])
    """
    retained = {_content(row): row for row in reversed(retain)}
    both = [row for row in forget if _content(row) in retained]
    if both:
        first = both[0]
        pair = f"{first.place} and {retained[_content(first)].place}"
        count = f"{len(both)} row{'s are' if len(both) > 1 else ' is'}"
        wrong = f"{count} in both the forget and the retain set, the first at {pair} ({first.question[:60]!r})"
        raise DataError(problem(wrong, "disjoint sets", "Remove each such row from one of the two."))


def _content(row: Row) -> tuple[str, str]:
    return " ".join(row.question.split()).casefold(), " ".join(row.answer.split()).casefold()


def _read_json(path: Path) -> list[tuple[int, object]]:
    """Return the (number, record) pairs of a JSON Lines file or of a JSON list."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        wrong = f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8"
        raise DataError(problem(wrong, "a UTF-8 file", "Convert the file, for instance with iconv.")) from None
    if text.lstrip().startswith("["):
        return list(enumerate(cast("list[object]", _parse(text, str(path), 1)), start=1))
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse(line, str(path), number)) for number, line in lines if line.strip()]


def _parse(text: str, source: str, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source}:{line + error.lineno - 1}"
        wrong = f"{where}: broken JSON ({error.msg} at column {error.colno})"
        raise DataError(problem(wrong, "one JSON object a line, or one JSON list")) from None
    except RecursionError:
        raise DataError(problem(f"{source}:{line}: JSON nested too deeply", "one flat JSON object a line")) from None


def _numbered_rows(records: Iterable[tuple[int, object]], source: str) -> list[Row]:
    rows = [_row(record, source, number) for number, record in records]
    if not rows:
        raise DataError(problem(f"{source}: the set is empty", "at least one row"))
    return rows


def _row(record: object, source: str, line: int) -> Row:
    place = f"{source}:{line}"
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise DataError(problem(f"{place}: the row is of type {kind}", f"an object with {_ACCEPTED}"))
    for question, answer, raw in _LAYOUTS:
        if question in record and answer in record:
            extra = {str(key): value for key, value in record.items() if key not in (question, answer)}
            return Row(record[question], record[answer], extra, source, line, raw)
    found = ", ".join(map(repr, record)) or "none"
    raise DataError(problem(f"{place}: the fields are {found}", f"{_ACCEPTED} among them"))


def _download(name: str) -> Iterable[Mapping[str, object]]:
    """Load the records of the Hugging Face data set `name:config:split`."""
    parts = name.split(":")
    if len(parts) > 3 or not all(parts):
        raise DataError(problem(f"The data set name is {name!r}", "name, name:config or name:config:split"))
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        wrong = f"{name}: there is no such file, and the package 'datasets' is not installed"
        raise DataError(problem(wrong, "a file or a data set", "Run: pip install datasets")) from None
    config, split = (*parts[1:], None, None)[:2]
    try:
        return cast("Iterable[Mapping[str, object]]", datasets.load_dataset(parts[0], config, split=split or "train"))
    # Any exception: the network, the hub client and the data set's own files each raise classes of their own.
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        wrong = f"{name}: there is no such file, and the data set cannot be loaded ({reason})"
        raise DataError(problem(wrong, "a file or a data set within reach")) from error
