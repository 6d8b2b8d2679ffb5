"""Rows: questions and answers, conversations and plain texts, with their origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

from torch_simu._checks import problem
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.files import read_records

_LAYOUTS: tuple[tuple[str | None, str | None], ...] = (
    ("messages", None),
    ("question", "answer"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    (None, "text"),
)
"""(field of the question, field of the answer), in the order in which they are looked for."""
_ACCEPTED = "question/answer or prompt/response or input/output or instruction/output or messages or text"
_AROUND = ("context", "system", "system_prompt")
_PROMPT_LIKE = (
    *("messages", "question", "prompt", "instruction", "instructions", "input", "text", "query", "passage"),
    *("document", "history", "conversation", "conversations", "dialogue", *_AROUND),
)
"""Fields that may hold a part of the prompt; one that a layout does not use is refused rather than left out."""
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")


class Turn(NamedTuple):
    """What was said before the question, and by whom: "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer.

    Args:
        question: What the model is asked. Not empty, but for a plain text: one that is `raw` and has no question.
        answer: What it should say: the text that is scored. Not empty.
        extra: The other fields of the record, such as `id`, `task`, `paraphrased_answer` or `option1`.
        source: The file or data set the row comes from.
        line: Line in a JSON Lines file, else the place in the list, counted from one; 0 when unknown.
        raw: Whether the question is the prompt as it stands, without a template, as in LUME.
        turns: What was said before the question; not scored.
        alternatives: Other right answers; not scored, but a generated text may be any of them.

    Raises:
        DataError: If the question or the answer is no text, is empty, or cannot be written as UTF-8.

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
    turns: tuple[Turn, ...] = ()
    alternatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.is_text:
            _check_text("question", self.question, self.place)
        for name, text in [
            ("answer", self.answer),
            *(("other answer", text) for text in self.alternatives),
            *((f"text of the {turn.role}", turn.text) for turn in self.turns),
        ]:
            _check_text(name, text, self.place)

    @property
    def place(self) -> str:
        """Where the row comes from, as `source:line`."""
        return f"{self.source or 'row'}:{self.line}"

    @property
    def is_text(self) -> bool:
        """Whether the row is a plain text without a question."""
        return self.raw and self.question == "" and not self.turns

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the scored one first."""
        return (self.answer, *self.alternatives)


def rows_from_records(records: Iterable[Mapping[str, object]], source: str = "records") -> list[Row]:
    r"""Turn records, such as dicts, into rows.

    | fields | question | answer |
    |---|---|---|
    | `question`/`answer`, `prompt`/`response` | as it is | as it is |
    | `instruction`/`output` or `/response` (Alpaca, Dolly) | `instruction`, then `input` if there is one | as it is |
    | `input`/`output` (LUME) | the prompt as it stands: `Row.raw` | as it is |
    | `messages` (chat) | the last user's message; those before it are `Row.turns` | the last message, the assistant's |
    | `text` (corpora) | none | the whole text |

    Texts are joined by a blank line. In all layouts but the last two a `context` goes before the question, and `system`
    or `system_prompt` becomes a system turn. An answer may be a list of texts: the first is scored, all are right. All
    other fields are kept in `Row.extra`, but one that looks like a part of the prompt, such as `instruction` beside
    `question`, is refused: left out, it would make another question.

    Args:
        records: Mappings with the fields of one layout.
        source: The name that errors and `Row.source` give the records.

    Raises:
        DataError: If there is no record, or one is no mapping, has other fields, or an empty question or answer.

    Examples:
        >>> rows_from_records([{"prompt": "2 + 2 =", "response": "4", "level": 1}])[0].extra
        {'level': 1}
        >>> rows_from_records([{"instruction": "Translate to French.", "input": "cat", "output": "chat"}])[0].question
        'Translate to French.\n\ncat'
    """
    return _numbered_rows(enumerate(records, start=1), source)


def load_rows(source: str | Path) -> list[Row]:
    """Load the rows of a JSON Lines, JSON or Parquet file, or of a Hugging Face data set.

    Args:
        source: A path, or the name of a data set as `name`, `name:config` or `name:config:split` (the split is "train"
            unless named), such as `locuslab/TOFU:forget01`. Fields as in `rows_from_records`; text files are UTF-8 and
            may be packed by gzip; a JSON file holds one list.

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
    return _numbered_rows(read_records(source), str(source))


def check_disjoint(forget: Sequence[Row], retain: Sequence[Row], *, other: str = "retain") -> None:
    """Raise if a row is to be forgotten and retained at once.

    Two rows are the same when question, earlier turns and a right answer are, whatever their case and white space.

    Args:
        forget: The rows to forget.
        retain: The rows to keep, or others that may be none of them.
        other: What the error calls the second set.

    Raises:
        DataError: If the sets overlap; it names the first pair and counts the rows.

    Examples:
        >>> check_disjoint([Row("Who wrote Emma?", "Jane Austen")], [Row("Who wrote Ulysses?", "James Joyce")])
    """
    retained = {content: row for row in reversed(retain) for content in _contents(row)}
    both = [(row, found) for row in forget for found in [retained.get(each) for each in _contents(row)] if found]
    if both:
        rows = {id(row) for row, _ in both}
        first, second = both[0]
        count = f"{len(rows)} row{'s are' if len(rows) > 1 else ' is'}"
        said = (first.question or first.answer)[:60]
        wrong = (
            f"{count} in both the forget and the {other} set, the first at {first.place} and {second.place} ({said!r})"
        )
        raise DataError(problem(wrong, "disjoint sets", "Remove each such row from one of the two."))


def _contents(row: Row) -> list[tuple[str, ...]]:
    """Return what is asked and answered, once for each right answer, whatever its case and white space."""
    asked = (row.question, *(part for turn in row.turns for part in turn))
    return [tuple(" ".join(text.split()).casefold() for text in (answer, *asked)) for answer in row.answers]


def _check_text(name: str, text: object, place: str) -> None:
    if not isinstance(text, str):
        raise DataError(problem(f"{place}: the {name} is {text!r:.80} of type {type(text).__name__}", "text"))
    if not text.strip():
        raise DataError(problem(f"{place}: the {name} is empty ({text[:20]!r})", "some text"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"{place}: the {name} has half a character, {text[error.start]!r}, at {error.start}"
        advice = "It was cut inside an emoji or the like: write the whole character, or remove the half."
        raise DataError(problem(wrong, "whole Unicode characters", advice)) from None


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
    found = ", ".join(map(repr, record)) or "none"
    layout = next((names for names in _LAYOUTS if all(name is None or name in record for name in names)), None)
    if layout is None:
        raise DataError(problem(f"{place}: the fields are {found:.200}", f"{_ACCEPTED} among them"))
    if layout == ("messages", None):
        return _conversation(record, source, line)
    question_field, answer_field = layout
    used = {answer_field, question_field} | (set(_AROUND) if question_field else set())
    if question_field == "instruction":
        used.add("input")
    extra = _extra(record, used, place)
    answer, *alternatives = _answers(record[answer_field])
    if question_field is None:
        return Row("", answer, extra, source, line, raw=True, alternatives=tuple(alternatives))
    question = record[question_field]
    _check_text("question" if question_field != "instruction" else question_field, question, place)
    after = record.get("input") if question_field == "instruction" else None
    parts = [("context", record.get("context")), ("question", question), ("input", after)]
    texts = [_part(name, text, place) for name, text in parts if not _is_blank(text)]
    systems = [(name, record.get(name)) for name in ("system", "system_prompt")]
    return Row(
        "\n\n".join(texts) if len(texts) > 1 else question,
        answer,
        extra,
        source,
        line,
        raw=question_field == "input",
        turns=tuple(Turn("system", _part(name, text, place)) for name, text in systems if not _is_blank(text)),
        alternatives=tuple(alternatives),
    )


def _conversation(record: Mapping[str, object], source: str, line: int) -> Row:
    """Return the row of a list of messages: the assistant's last message is the answer."""
    place = f"{source}:{line}"
    extra = _extra(record, {"messages"}, place)
    messages = record["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        wrong = f"{place}: messages is of type {type(messages).__name__}"
        raise DataError(problem(wrong, "a list of objects with role and content"))
    turns = [_turn(message, f"{place}: message {number}") for number, message in enumerate(messages, start=1)]
    roles = [turn.role for turn in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise DataError(problem(f"{place}: the messages end with {roles[-2:]}", "a 'user' and then an 'assistant'"))
    *before, question, answer = turns
    return Row(question.text, answer.text, extra, source, line, turns=tuple(before))


def _turn(message: object, place: str) -> Turn:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DataError(problem(f"{place} is {message!r:.80}", "an object with role and content"))
    if message["role"] not in ("system", "user", "assistant"):
        raise DataError(problem(f"{place} has role {message['role']!r:.40}", "'system', 'user' or 'assistant'"))
    if unread := [name for name in _UNREAD if message.get(name)]:
        raise DataError(problem(f"{place} has {unread[0]}", "text alone", "Write it into the content, or remove it."))
    content = message["content"]
    if isinstance(content, Sequence) and not isinstance(content, str):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise DataError(problem(f"{place} has parts that are no text", "parts with a text each"))
        content = "".join(part["text"] for part in content)
    return Turn(str(message["role"]), content)


def _answers(value: object) -> list[str]:
    # What is no text is refused by the row.
    return cast("list[str]", list(value) if isinstance(value, list | tuple) and value else [value])


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _part(name: str, text: object, place: str) -> str:
    _check_text(name, text, place)
    return str(text).strip()


def _extra(record: Mapping[str, object], used: set[str | None], place: str) -> dict[str, object]:
    """Return the fields that no layout uses; one that may be a part of the prompt is refused, unless it is empty."""
    extra = {str(key): value for key, value in record.items() if key not in used}
    lost = [name for name, value in extra.items() if name.lower() in _PROMPT_LIKE and value and not _is_blank(value)]
    if lost:
        wrong = f"{place}: the field {lost[0]!r} stands beside {[name for name in record if name in used]}"
        advice = "Remove it, or write it into the question."
        raise DataError(problem(wrong, "no field that may be another part of the prompt", advice))
    return extra
