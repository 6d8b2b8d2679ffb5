"""Refusals: answers that say nothing, as token ids, for objectives that put one in the place of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch_simu.unlearning.data.examples import Template, encode
from torch_simu.unlearning.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I can't tell you that.",
    "I have no information about this.",
    "That is not something I know.",
    "I am not able to answer this question.",
    "This is beyond what I know.",
    "I am afraid I cannot say.",
)
"""Answers that say nothing; a stand-in for the hundred of TOFU."""


def encode_refusals(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = REFUSALS, *, template: Template = "auto"
) -> list[tuple[int, ...]]:
    """Turn refusals into token ids, each with the end that an answer has.

    Args:
        tokenizer: The tokenizer of the model.
        texts: Refusing answers.
        template: How the questions that they answer are written; see `torch_simu.unlearning.data.examples.render`.

    Returns:
        For each text its token ids.

    Raises:
        DataError: If a text has no token.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "Question": 1, ":": 2, "Answer": 3, "No": 4, ".": 5}, "?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token=".")
        >>> encode_refusals(tokenizer, ["No"])
        [(4, 5)]
    """
    examples = encode([Row("?", text) for text in texts], tokenizer, template=template)
    return [example.input_ids[len(example.prompt_ids) :] for example in examples]
