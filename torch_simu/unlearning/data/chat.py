"""Chat: a row as a tokenizer's chat template writes it, cut into prompt, answer and the end of the turn."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple, cast

from torch_simu._checks import problem
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.rows import Row, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue0a1answer\ue0a2"
"""Stands for the answer where the template's own text around it is looked for; of characters that no row has."""
_SECONDS = 5.0
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_DATE = datetime(2024, 7, 26)
"""What a template takes for today, so that a row has the same tokens on every day."""
_OTHER = "Take another template: 'question' or 'raw'."


class ChatTexts(NamedTuple):
    """A conversation as text, in three parts.

    Args:
        prompt: All before the answer, as the model sees it when it is asked.
        answer: The answer as the template writes it.
        end: What the template writes behind it up to the end of the turn; empty where it writes nothing.
    """

    prompt: str
    answer: str
    end: str


def chat_texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> ChatTexts:
    """Return the row as the tokenizer's chat template writes it.

    Everything is taken from the template: it writes the conversation once with the answer and once with a mark in its
    place, and what stands around the mark is prompt and end. So a block that the template puts before an answer, such
    as an empty `<think></think>`, is part of the prompt, and the end is the token that the model says when it is done,
    such as `<end_of_turn>`, which may not be the tokenizer's end token. White space between the generation prompt and
    the answer belongs to the answer. Templates that want contents as lists of parts get them, and those that ask for
    today's date get 26 July 2024, so that a run can be continued tomorrow.

    Raises:
        DataError: If there is no template, it fails, takes longer than five seconds, or loses a text.
    """
    if not tokenizer.chat_template:
        raise DataError(problem("The tokenizer has no chat template", "one for template='chat'", "Take 'question'."))
    try:
        try:
            return _in_time(lambda: _cut(row, tokenizer, as_parts=False))
        except DataError as error:
            try:
                return _in_time(lambda: _cut(row, tokenizer, as_parts=True))
            except DataError:
                raise error from None
    except TimeoutError:
        wrong = f"{row.place}: the chat template takes longer than {_SECONDS:g} seconds"
        raise DataError(problem(wrong, "one that ends", _OTHER)) from None


def _cut(row: Row, tokenizer: PreTrainedTokenizerBase, *, as_parts: bool) -> ChatTexts:
    asked = [*row.turns, Turn("user", row.question.strip())]
    said = row.answer.strip()

    def written(answer: str | None) -> str:
        turns = asked if answer is None else [*asked, Turn("assistant", answer)]
        try:
            return _written(turns, tokenizer, as_parts=as_parts, generation=answer is None)
        # Any exception: templates are programs, and raise what they like.
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            wrong = f"{row.place}: the chat template fails ({reason})"
            raise DataError(problem(wrong, "one that takes the row's turns", _OTHER)) from None

    before, *rest = written(_MARK).split(_MARK)
    whole = written(said)
    if len(rest) != 1:
        raise DataError(problem(f"{row.place}: the chat template loses the answer", "one that writes it", _OTHER))
    (after,) = rest
    for turn in asked:
        # Templates may drop the reasoning of earlier answers, which is no part of what is asked.
        if turn.role != "assistant" and _words(turn.text) not in _words(whole):
            wrong = f"{row.place}: the chat template loses the {turn.role}'s text {turn.text[:40]!r}"
            raise DataError(problem(wrong, "one that writes it", _OTHER))
    opening = written(None)
    # Some openings begin a block that no finished turn has, and some turns a block that no opening has.
    spaced = before.startswith(opening) and not before[len(opening) :].strip()
    for start in (opening if spaced else before, opening):
        answer = whole[len(start) : len(whole) - len(after)]
        if whole.startswith(start) and whole.endswith(after) and answer.strip():
            return ChatTexts(start, answer, _end(after, tokenizer))
    raise DataError(problem(f"{row.place}: the chat template changes the answer", "one that writes it", _OTHER))


def _written(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, *, as_parts: bool, generation: bool) -> str:
    messages: list[dict[str, object]] = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}] if as_parts else turn.text}
        for turn in turns
    ]
    write = cast("Callable[..., object]", tokenizer.apply_chat_template)
    dated = {"chat_template": _TODAY.sub(_on_date, str(tokenizer.get_chat_template()))} if _asks_date(tokenizer) else {}
    return str(write(messages, tokenize=False, add_generation_prompt=generation, **dated))


def _asks_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def _on_date(call: re.Match[str]) -> str:
    return repr(_DATE.strftime(call[2]))


def _end(after: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what ends the turn: all up to the first special token, or all text where there is none."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    ends = [after.index(token) + len(token) for token in special if token.strip() and token in after]
    return after[: min(ends)] if ends else after.rstrip()


def _words(text: str) -> str:
    return " ".join(text.split())


def _in_time(job: Callable[[], ChatTexts]) -> ChatTexts:
    """Return what a job returns, or raise what it raises; TimeoutError when it does not end in time.

    A template is a program from a model folder, and jinja's sandbox lets it loop for as long as it likes.
    """
    results: list[ChatTexts] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(job())
        # Also SystemExit, by which the thread is ended below.
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
