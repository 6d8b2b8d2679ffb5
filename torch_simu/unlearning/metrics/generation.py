"""Generation: what a model says by itself, and how that compares with the answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from torch_simu._checks import check_count, problem
from torch_simu.unlearning.data.batches import batches_of_similar_length
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.fits import check_fits, num_positions
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics.scoring import evaluating
from torch_simu.unlearning.progress import Progress

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
    before the first end token: the tokenizer's, one of `model.generation_config`, or the one that ends the scored
    answers. Where a model's positions are bounded, a text ends with them at the latest.

    Args:
        model: A causal language model; its training flags are restored.
        tokenizer: The tokenizer that the examples were encoded with.
        examples: Encoded rows; of each, only the prompt is shown to the model.
        max_new_tokens: Largest number of tokens to generate. None: as many as the longest scored answer has, the least
            that tells whether answers are right. A tokenizer without an end token cannot tell where an answer ends;
            then None cuts each row's text at the length of its own answer.
        batch_size: Prompts per call of `model.generate`.
        progress: Told of the stage "generate" after each batch, in rows.

    Returns:
        One text per example, in order, without special tokens (but with the unknown token) and outer white space.

    Raises:
        ValueError: If there is no example or `max_new_tokens` is not positive.
        DataError: If an example does not fit into the model.
    """
    if not examples:
        raise ValueError(problem("There is no example to answer", "at least one"))
    check_fits(model, examples)
    longest = max(example.num_scored for example in examples)
    limit = longest if max_new_tokens is None else check_count("max_new_tokens", max_new_tokens)
    ends = _end_ids(model, tokenizer)
    ends |= {example.end_ids[0] for example in examples if example.num_end == 1}
    hidden = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | ends
    padding = pad_id(tokenizer, model)
    texts = [""] * len(examples)
    device = next(model.parameters()).device
    generate = cast("Callable[..., Tensor]", model.generate)
    done = 0
    with evaluating(model), _without_own_settings(model):
        for new_tokens, indices in _batches(model, examples, limit, batch_size):
            prompts = [examples[index].prompt_ids for index in indices]
            width = max(map(len, prompts))
            input_ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            # The positions follow from the mask: `generate` counts its ones.
            output = generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=_greedy(new_tokens, ends, padding),
            )
            for index, ids in zip(indices, output[:, width:].tolist(), strict=True):
                stop = _stop(ids, ends, examples[index].end_ids)
                if max_new_tokens is None and not ends:
                    stop = examples[index].num_scored
                texts[index] = _text(tokenizer, [token for token in ids[:stop] if token not in hidden])
            done += len(indices)
            if progress is not None:
                progress("generate", done, len(examples))
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


def check_rouge() -> None:
    """Raise if ROUGE cannot be measured, before the work whose texts it would measure.

    Raises:
        ImportError: If the package `rouge-score` is not installed.

    Examples:
        >>> check_rouge()
    """
    try:
        import rouge_score.rouge_scorer  # type: ignore[import-untyped] # noqa: F401
    except ImportError:
        wrong = "The package 'rouge-score' is not installed"
        raise ImportError(problem(wrong, "it for ROUGE-L", "Run: pip install rouge-score")) from None


def rouge_l_recall(generated: Iterable[str], answers: Iterable[str]) -> list[float]:
    """Return, pair by pair, the share of the answer's stemmed words that the generated text shares, in [0, 1].

    What they share is their longest common subsequence (Lin 2004, ROUGE-L).

    Raises:
        ImportError: If the package `rouge-score` is not installed.

    Examples:
        >>> rouge_l_recall(["she wrote two novels"], ["Jane wrote a novel"])
        [0.5]
    """
    return [float(score.recall) for score in _rouge_l(generated, answers, stemmed=True)]


def rouge_l_f1(generated: Iterable[str], answers: Iterable[str]) -> list[float]:
    """Return, pair by pair, the harmonic mean of the shares of words that generated text and answer have in common.

    They have their longest common subsequence in common (Lin 2004, ROUGE-L), of whole words: nothing is stemmed, as in
    MUSE. Each is in [0, 1].

    Raises:
        ImportError: If the package `rouge-score` is not installed.

    Examples:
        >>> rouge_l_f1(["she wrote two long novels"], ["Jane wrote novels"])
        [0.5]
    """
    return [float(score.fmeasure) for score in _rouge_l(generated, answers, stemmed=False)]


def _rouge_l(generated: Iterable[str], answers: Iterable[str], *, stemmed: bool) -> Iterator[Any]:
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=stemmed)
    for text, answer in zip(generated, answers, strict=True):
        yield scorer.score(target=answer, prediction=text)["rougeL"]


def _batches(
    model: PreTrainedModel, examples: Sequence[Example], limit: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of new tokens and the indices of each batch.

    Rows of one batch have the same number, so that no row's text depends on the rows beside it: `limit`, or less where
    fewer positions are left behind the prompt.
    """
    positions = num_positions(model)
    rooms = [limit if positions is None else min(limit, positions - len(one.prompt_ids)) for one in examples]
    for room in sorted(set(rooms)):
        of_room = [index for index, other in enumerate(rooms) if other == room]
        for batch in batches_of_similar_length([len(examples[index].prompt_ids) for index in of_room], batch_size):
            yield room, [of_room[place] for place in batch]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end an answer: the tokenizer's and those of the model's settings."""
    candidates: list[object] = []
    for settings in (model.generation_config, model.config.get_text_config()):
        of_model = getattr(settings, "eos_token_id", None)
        candidates += list(of_model) if isinstance(of_model, list | tuple) else [of_model]
    # Special tokens only: a small model may keep its config's default id, which is a word in its own vocabulary.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ends = {tokenizer.eos_token_id, *(end for end in candidates if end in special)}
    return {end for end in ends if isinstance(end, int)}


def _stop(ids: Sequence[int], ends: Collection[int], end_ids: tuple[int, ...]) -> int:
    """Return where a text ends: at the first end token, or where a template's end of several tokens begins."""
    length = len(end_ids)
    for place, token in enumerate(ids):
        if token in ends or (length and tuple(ids[place : place + length]) == end_ids):
            return place
    return len(ids)


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    # `generate` fills what a call leaves open from the model's own settings, which sample, penalize repetition, force
    # or forbid tokens in many released models.
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _greedy(max_new_tokens: int, ends: Collection[int], padding: int) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # Special tokens are filtered before: skip_special_tokens would drop unknown words and turn a wrong answer right.
    return str(tokenizer.decode(ids, skip_special_tokens=False)).strip()
