"""Metrics: how well a model knows a set of rows, teacher-forced and by its own generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_simu._checks import problem
from torch_simu.unlearning.data.examples import Template, encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics.generation import TEXT_MEASURES, check_rouge, generate_answers, rouge_l_recall
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.progress import Progress, part_of, renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Scores:
    """The measures of a set of rows, row by row.

    Args:
        values: Measure -> one value per row. "nll" is in nats per token, all others are in [0, 1].
        generations: What the model said to each row's question; empty where nothing was generated.

    Examples:
        >>> Scores({"em": (1.0, 0.5)}).means
        {'em': 0.75}
    """

    values: Mapping[str, Sequence[float]]
    generations: Sequence[str] = ()

    @property
    def means(self) -> dict[str, float]:
        """Measure -> its mean over the rows."""
        return {name: mean(values) for name, values in self.values.items()}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    generate: bool = True,
    rouge: bool = True,
    max_length: int | None = None,
    template: Template = "auto",
    progress: Progress | None = None,
) -> Scores:
    """Measure how well a model knows the answers of rows.

    Teacher-forced, over the answer's tokens and its end token: "probability" `exp(-mean nll)`, "em" (exact
    memorization), "es" (extraction strength) and "nll"; see `torch_simu.unlearning.metrics.scoring`. Of the text that
    the model generates greedily: "qa_exact_match" (it is the answer), "qa_containment" (the answer is in it), both
    after `torch_simu.unlearning.metrics.generation.normalized`, and "rouge_l_recall". Of a row with several answers the
    first is teacher-forced, and the generated text is compared with each: the best counts.

    Args:
        model: A causal language model; its training flags are restored.
        tokenizer: The model's tokenizer.
        rows: What is asked.
        batch_size: Rows per forward pass and per call of `model.generate`.
        max_new_tokens: Largest number of tokens to generate; None: as many as the longest answer of the rows has.
        generate: Whether to generate; else only the teacher-forced measures are there.
        rouge: Whether to measure ROUGE-L, which needs the package `rouge-score` and a few seconds to import it.
        max_length: Largest number of tokens of prompt and answer; see `torch_simu.unlearning.data.examples.encode`.
        template: How a question becomes a prompt; see `torch_simu.unlearning.data.examples.render`.
        progress: Told of the stage "evaluate"; a row counts twice when it is also generated.

    Raises:
        ValueError: If there is no row, or `batch_size` or `max_new_tokens` is not positive.
        DataError: If a row cannot be encoded, or does not fit into the model.
        ImportError: If ROUGE is asked for without the package `rouge-score`.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "Question": 1, ":": 2, "Answer": 3, "Rome": 4, ".": 5}, "?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token=".")
        >>> sizes = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
        >>> "qa_exact_match" in evaluate(model, tokenizer, [Row("Where?", "Rome")], rouge=False).means
        True
    """
    if not rows:
        raise ValueError(problem("There is no row to evaluate", "at least one"))
    if generate and rouge:
        check_rouge()
    examples = encode(rows, tokenizer, max_length=max_length, template=template)
    total = len(rows) * (2 if generate else 1)
    progress = renamed(progress, lambda _: "evaluate")
    values = score_answers(
        model, examples, batch_size=batch_size, pad_id=pad_id(tokenizer, model), progress=part_of(progress, 0, total)
    )
    if not generate:
        return Scores(values)
    generations = generate_answers(
        model,
        tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=part_of(progress, len(rows), total),
    )
    pairs = list(zip(generations, [row.answers for row in rows], strict=True))
    for name, measure in TEXT_MEASURES.items():
        values[name] = [float(max(measure(text, one) for one in answers)) for text, answers in pairs]
    if rouge:
        recalls = iter(rouge_l_recall(*zip(*((text, one) for text, answers in pairs for one in answers), strict=True)))
        values["rouge_l_recall"] = [max(next(recalls) for _ in answers) for _, answers in pairs]
    return Scores(values, tuple(generations))


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean.

    Raises:
        ValueError: If there is no value.

    Examples:
        >>> mean([1.0, 0.0])
        0.5
    """
    if not values:
        raise ValueError(problem("There is no value to average", "at least one"))
    return sum(values) / len(values)


def harmonic_mean(values: Iterable[float]) -> float:
    """Return the harmonic mean of values >= 0; one zero makes it 0.

    Raises:
        ValueError: If there is no value, or one is negative or not a number.

    Examples:
        >>> harmonic_mean([1.0, 0.5])
        0.6666666666666666
    """
    numbers = list(values)
    if not numbers or not all(number >= 0 for number in numbers):
        raise ValueError(problem(f"The values are {numbers}", "at least one, each >= 0"))
    return 0.0 if 0 in numbers else len(numbers) / sum(1 / number for number in numbers)
