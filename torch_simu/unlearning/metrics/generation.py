"""Generation: what a model says by itself, and how that compares with the answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from torch_simu._checks import check_count, problem
from torch_simu.unlearning.data.batches import batches_of_similar_length
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics.scoring import Progress, evaluating

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[str]:
    """Let the model answer the prompt of each example, greedily and in batches.

    Prompts are padded on the left and masked, so that a row's answer does not depend on the rows beside it. It ends
    before the first end token, the tokenizer's or one of `model.generation_config`.

    Args:
        model: A causal language model; its training flags are restored.
        tokenizer: The tokenizer that the examples were encoded with.
        examples: Encoded rows; of each, only the prompt is shown to the model.
        max_new_tokens: Largest number of tokens to generate. None: as many as the longest scored answer has, the least
            that tells whether answers are right. A tokenizer without an end token cannot tell where an answer ends;
            then None cuts each row's text at the length of its own answer.
        batch_size: Prompts per call of `model.generate`.
        progress: Called as `progress(done, total)` after each batch.

    Returns:
        One text per example, in order, without special tokens (but with the unknown token) and outer white space.

    Raises:
        ValueError: If there is no example or `max_new_tokens` is not positive.
    """
    if not examples:
        raise ValueError(problem("There is no example to answer", "at least one"))
    longest = max(example.num_scored for example in examples)
    limit = longest if max_new_tokens is None else check_count("max_new_tokens", max_new_tokens)
    ends = _end_ids(model, tokenizer)
    padding = pad_id(tokenizer)
    # Without an end token, one that cannot be generated, because `generate` fills None from the model's own settings.
    config = _greedy(limit, sorted(ends) or [model.config.get_text_config().vocab_size], padding)
    hidden = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | ends
    texts = [""] * len(examples)
    device = next(model.parameters()).device
    generate = cast("Callable[..., Tensor]", model.generate)
    done = 0
    with evaluating(model):
        for indices in batches_of_similar_length([len(example.prompt_ids) for example in examples], batch_size):
            prompts = [examples[index].prompt_ids for index in indices]
            width = max(map(len, prompts))
            input_ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            # The positions follow from the mask: `generate` counts its ones.
            output = generate(input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config)
            for index, ids in zip(indices, output[:, width:].tolist(), strict=True):
                stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                if max_new_tokens is None and not ends:
                    stop = examples[index].num_scored
                texts[index] = _text(tokenizer, [token for token in ids[:stop] if token not in hidden])
            done += len(indices)
            if progress is not None:
                progress(done, len(examples))
    return texts


def normalized(text: str) -> str:
    """Return the words of a text for comparison: lower case, NFKC, one space for each run of other characters.

    Word-level tokenizers put spaces around punctuation, so punctuation cannot count. A text without any word is
    returned in lower case with single spaces.

    Examples:
        >>> normalized(" The author's name is Hsiao Yun-Hwa. ")
        'the author s name is hsiao yun hwa'
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", text)) or " ".join(text.split())


def equals_answer(generated: str, answer: str) -> bool:
    """Say whether the generated text is the answer and nothing else, both `normalized`.

    Examples:
        >>> equals_answer("jane austen .", "Jane Austen")
        True
    """
    return normalized(generated) == normalized(answer)


def contains_answer(generated: str, answer: str) -> bool:
    """Say whether the words of the answer stand together in the generated text, both `normalized`.

    Examples:
        >>> contains_answer("It was Jane Austen.", "Jane Austen")
        True
        >>> contains_answer("Nice", "ice")
        False
    """
    return f" {normalized(answer)} " in f" {normalized(generated)} "


TEXT_MEASURES: Mapping[str, Callable[[str, str], float]] = MappingProxyType(
    {"qa_exact_match": equals_answer, "qa_containment": contains_answer}
)
"""Measure -> its value for a generated text and an answer."""


def rouge_l_recall(generated: Iterable[str], answers: Iterable[str]) -> list[float]:
    """Return, pair by pair, the share of the answer's stemmed words in the longest common subsequence, in [0, 1].

    Raises:
        ImportError: If the package `rouge-score` is not installed.

    Examples:
        >>> rouge_l_recall(["she wrote two novels"], ["Jane wrote a novel"])
        [0.5]
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError:
        wrong = "The package 'rouge-score' is not installed"
        raise ImportError(problem(wrong, "it for ROUGE-L", "Run: pip install rouge-score")) from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        float(scorer.score(target=answer, prediction=text)["rougeL"].recall)
        for text, answer in zip(generated, answers, strict=True)
    ]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end an answer: the tokenizer's and those of the model's generation settings."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    candidates = of_model if isinstance(of_model, list | tuple) else [of_model]
    # Special tokens only: a small model may keep its config's default id, which is a word in its own vocabulary.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ends = {tokenizer.eos_token_id, *(end for end in candidates if end in special)}
    return {end for end in ends if isinstance(end, int)}


def _greedy(max_new_tokens: int, ends: list[int], padding: int) -> GenerationConfig:
    from transformers import GenerationConfig

    # Each value is written out, because `generate` fills what is left open from the model's own generation settings,
    # which sample and penalize repetition in many released models.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        return_dict_in_generate=False,
        eos_token_id=ends,
        pad_token_id=padding,
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # Special tokens are filtered before: skip_special_tokens would drop unknown words and turn a wrong answer right.
    return str(tokenizer.decode(ids, skip_special_tokens=False)).strip()
