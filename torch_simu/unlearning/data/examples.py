"""Examples: rows as labeled token sequences, of which only the answer is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from torch_simu._checks import check_choice, check_count, problem
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.data.chat import ChatTexts, chat_texts
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "question", "raw"]
"""How a question becomes a prompt; see `render`."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens: the prompt, then the answer, of which only the answer is scored.

    Args:
        input_ids: Token ids of prompt and answer.
        labels: The same ids where scored, -100 elsewhere. `labels[t]` is scored from the logits at `t - 1`.
        place: Where the row comes from, for errors; two examples are the same whatever it is.
        num_end: How many of the last tokens end the answer and are no part of it, such as `<end_of_turn>`; likewise.

    Examples:
        >>> Example((5, 6, 7), (-100, 6, 7)).prompt_ids
        (5,)
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    place: str = field(default="", compare=False, repr=False)
    num_end: int = field(default=0, compare=False, repr=False)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The token ids before the first scored one."""
        return self.input_ids[: len(self.input_ids) - self.num_scored]

    @property
    def num_scored(self) -> int:
        """How many positions are scored; they are the last ones."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The token ids that end the answer; empty where nothing does."""
        return self.input_ids[len(self.input_ids) - self.num_end :]


def render(row: Row, tokenizer: PreTrainedTokenizerBase, template: Template = "auto") -> tuple[str, str]:
    r"""Return the prompt and the answer as text; the two joined are what the model should say.

    Args:
        row: Question and answer; white space around them is dropped.
        tokenizer: Its chat template is used for "chat".
        template: "chat": the tokenizer's chat template, the question as the user's turn; "question":
            `Question: ...\nAnswer:`, as in TOFU; "raw": the question as it stands; "auto": "raw" for a `row.raw`,
            else "chat" when the tokenizer has a chat template, else "question". In the last two forms a space parts
            prompt and answer and belongs to the answer, and earlier turns stand before the question, parted by blank
            lines. A plain text has no prompt in any form.

    Raises:
        ValueError: If `template` is another word.
        DataError: If the row is written by the chat template, and there is none, it fails, or it loses a text.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "Question": 1, ":": 2, "Answer": 3, "Rome": 4, ".": 5}, "?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token=".")
        >>> render(Row("Where?", "Rome"), tokenizer)
        ('Question: Where?\nAnswer:', ' Rome')
    """
    prompt, answer, _ = _texts(row, tokenizer, template)
    return prompt, answer


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    template: Template = "auto",
) -> list[Example]:
    """Turn rows into token sequences in which the answer, with its end, is scored.

    The boundary is exact: the prompt's tokens are those of the prompt alone. Where a tokenizer would merge the end
    of the prompt with the start of the answer, the two are tokenized apart. A beginning-of-sequence token is put first
    if the tokenizer does so itself (a chat template writes its own). The end of an answer is what the chat template
    writes behind it, else the tokenizer's end token if there is one. A plain text is scored throughout and has no end,
    being an excerpt as a rule; without a beginning token its first token is the prompt of the rest.

    Args:
        rows: Questions and answers, conversations, or texts.
        tokenizer: Any Hugging Face tokenizer.
        max_length: Largest number of tokens. A longer prompt loses its beginning; the answer is never cut.
        template: How a question becomes a prompt; see `render`.

    Raises:
        DataError: If an answer has no token, or does not fit into `max_length` with one token of its prompt.
        ValueError: If `max_length` is not positive or `template` is unknown.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "Question": 1, ":": 2, "Answer": 3, "Rome": 4, ".": 5}, "?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token=".")
        >>> encode([Row("Where?", "Rome")], tokenizer)[0].labels
        (-100, -100, -100, -100, -100, -100, 4, 5)
    """
    if max_length is not None:
        check_count("max_length", max_length)
    if not rows:
        return []
    texts = [_texts(row, tokenizer, template) for row in rows]
    # One call each for all rows: fast tokenizers run over the list in parallel.
    prompts = _tokenize(tokenizer, [prompt for prompt, _, _ in texts])
    wholes = _tokenize(tokenizer, ["".join(parts) for parts in texts])
    ends = sorted({end for _, _, end in texts if end})
    end_lengths = dict(zip(ends, map(len, _tokenize(tokenizer, ends) if ends else []), strict=True))
    bos = _bos(tokenizer)
    eos = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    examples = []
    for row, (_, answer_text, end), prompt, whole in zip(rows, texts, prompts, wholes, strict=True):
        follows = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        answer = whole[len(prompt) :] if follows else _tokenize(tokenizer, [answer_text + end])[0]
        num_end = end_lengths.get(end, 0)
        if len(answer) <= num_end:
            raise DataError(problem(f"{row.place}: the answer {row.answer!r:.80} has no token", "at least one"))
        head = [] if _form(row, tokenizer, template) == "chat" else bos
        if row.is_text:
            head, prompt, answer = [], (head or answer)[:1], answer if head else answer[1:]
            if not answer:
                wrong = f"{row.place}: the text {row.answer!r:.80} has one token"
                raise DataError(problem(wrong, "at least two", "Nothing before the first can predict it."))
        elif not end:
            answer, num_end = answer + eos, len(eos)
        examples.append(_example(row, head + prompt, len(head), answer, num_end, max_length))
    return examples


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    r"""Return the text of an example as the model reads it, with the scored part between `>>>` and `<<<`.

    Other control characters than line ends are escaped, so that the text can be printed whatever is in it.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "Question": 1, ":": 2, "Answer": 3, "Rome": 4, ".": 5}, "?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token=".")
        >>> show_example(encode([Row("?", "Rome")], tokenizer)[0], tokenizer)
        'Question : ? Answer :>>>Rome .<<<'
    """
    scored = list(example.input_ids[len(example.prompt_ids) :])
    parts = [str(tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in (example.prompt_ids, scored)]
    prompt, answer = ("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in part) for part in parts)
    return f"{prompt}>>>{answer}<<<"


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad examples on the right to one length.

    Args:
        examples: At least one.
        pad_id: The token id to pad with.

    Returns:
        `input_ids`, `labels` (-100 where not scored or padded) and `attention_mask` (1 on tokens, 0 on padding), int64.
        Shape of each: `(batch, length)`.

    Raises:
        ValueError: If there is no example.

    Examples:
        >>> collate([Example((5, 6), (-100, 6)), Example((7, 8, 9), (-100, 8, 9))], pad_id=0)["labels"]
        tensor([[-100,    6, -100],
                [-100,    8,    9]])
    """
    if not examples:
        raise ValueError(problem("The batch is empty", "at least one example"))
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
        batch["labels"][row, :length] = torch.tensor(example.labels)
        batch["attention_mask"][row, :length] = 1
    return batch


def _form(row: Row, tokenizer: PreTrainedTokenizerBase, template: Template) -> Template:
    """Return the form that "auto" stands for, or `template` itself."""
    check_choice("template", template, ("auto", "chat", "question", "raw"))
    if row.is_text:
        return "raw"
    if template != "auto":
        return template
    return "raw" if row.raw else "chat" if tokenizer.chat_template else "question"


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase, template: Template) -> ChatTexts:
    form = _form(row, tokenizer, template)
    if form == "chat":
        return chat_texts(row, tokenizer)
    question, answer = row.question.strip(), row.answer.strip()
    if row.is_text:
        return ChatTexts("", answer, "")
    if form == "raw":
        return ChatTexts("\n\n".join([*(turn.text.strip() for turn in row.turns), question]), f" {answer}", "")
    written = {"system": "{}\n\n", "user": "Question: {}\n", "assistant": "Answer: {}\n\n"}
    before = "".join(written[turn.role].format(turn.text.strip()) for turn in row.turns)
    return ChatTexts(f"{before}Question: {question}\nAnswer:", f" {answer}", "")


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-sequence id if the tokenizer puts one before a text itself."""
    start = list(tokenizer("a")["input_ids"])[:1]
    return start if start and start[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []


def _example(
    row: Row, before: list[int], kept: int, answer: list[int], num_end: int, max_length: int | None
) -> Example:
    """Join what stands before the answer, of which the first `kept` tokens are never cut, and the answer."""
    head, prompt = before[:kept], before[kept:]
    if max_length is not None:
        room = max_length - len(head) - len(answer)
        if room < 1:
            wrong = f"{row.place}: the answer takes {len(answer)} tokens of max_length {max_length}"
            advice = "Split the text into several rows." if row.is_text else "Answers are never cut."
            raise DataError(problem(wrong, f"max_length >= {len(head) + 1 + len(answer)}", advice))
        before = head + prompt[-room:]
    if not before:
        raise DataError(problem(f"{row.place}: the prompt {row.question!r:.80} has no token", "at least one"))
    return Example(tuple(before + answer), (IGNORED,) * len(before) + tuple(answer), place=row.place, num_end=num_end)
