"""TOFU: truth ratio, model utility and forget quality (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch_simu._checks import problem
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import Example, Template, encode
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics.evaluate import evaluate, harmonic_mean, mean
from torch_simu.unlearning.metrics.generation import check_rouge
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.metrics.truth_ratio import (
    AVERAGES,
    Average,
    check_scipy,
    forget_quality,
    log_truth_ratio,
    option_probability,
    truth_ratio_score,
)
from torch_simu.unlearning.progress import Progress, part_of, renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UTILITY_SETS = ("retain", "real_authors", "world_facts")
_OPTION_SETS = ("real_authors", "world_facts")


@dataclass(frozen=True, slots=True)
class TofuValues:
    """What `tofu_figures` needs of a set, row by row.

    Args:
        scores: Measure -> one value per row, as in `torch_simu.unlearning.metrics.evaluate.Scores`: at least "nll",
            "probability" and "rouge_l_recall". The means of all of them are in the result.
        right_nlls: Mean negative log-likelihood per token of each row's right (paraphrased) answer, in nats.
        wrong_nlls: The same of each of its wrong answers.
    """

    scores: Mapping[str, Sequence[float]]
    right_nlls: Sequence[float]
    wrong_nlls: Sequence[Sequence[float]]

    def check(self, name: str) -> None:
        """Check that no measure is missing, and that each has one value for each row.

        Args:
            name: The set, for the error.

        Raises:
            ValueError: If it is not so.
        """
        counts = {measure: len(values) for measure, values in self.scores.items()}
        counts |= {"right_nlls": len(self.right_nlls), "wrong_nlls": len(self.wrong_nlls)}
        missing = {"nll", "probability", "rouge_l_recall"} - counts.keys()
        if missing or len(set(counts.values())) != 1:
            wrong = f"The set {name!r} has values {counts}"
            raise ValueError(problem(wrong, "nll, probability and rouge_l_recall, and one value for each row"))


def wrong_answers(row: Row) -> list[str]:
    """Return the wrong answers of a TOFU row: `perturbed_answer`, or the wrong ones of `option1`, `option2` and so on.

    Raises:
        DataError: If there is none, or the right answer is not among the options.

    Examples:
        >>> wrong_answers(Row("Capital of Egypt?", "Cairo", {"option1": "Giza", "option2": "Cairo"}))
        ['Giza']
    """
    perturbed = row.extra.get("perturbed_answer")
    if perturbed is not None:
        texts = [perturbed] if isinstance(perturbed, str) else perturbed
        if isinstance(texts, Sequence) and texts and all(isinstance(text, str) for text in texts):
            return [str(text) for text in texts]
        raise DataError(problem(f"{row.place}: perturbed_answer is {perturbed!r}", "a list of texts"))
    options = [str(value) for name, value in row.extra.items() if name.startswith("option")]
    wrong = [option for option in options if option != row.answer]
    if not wrong or len(wrong) == len(options):
        found = f"the options are {options}" if options else f"the fields are {['question', 'answer', *row.extra]}"
        raise DataError(problem(f"{row.place}: {found}", "perturbed_answer, or options with the answer among them"))
    return wrong


def tofu_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    *,
    reference: Mapping[str, Sequence[float]] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 200,
    max_length: int | None = None,
    template: Template = "auto",
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a model as the TOFU benchmark does.

    Args:
        model: A causal language model; its training flags are restored.
        tokenizer: The model's tokenizer.
        sets: Rows of "forget", "retain", "real_authors" and "world_facts", each with wrong answers (`wrong_answers`).
        reference: The "log_truth_ratios" of this function's result for a model trained on the retain set only.
        batch_size: Rows per forward pass.
        max_new_tokens: Largest number of tokens to generate.
        max_length: Largest number of tokens of prompt and answer; see `torch_simu.unlearning.data.examples.encode`.
        template: How a question becomes a prompt; see `torch_simu.unlearning.data.examples.render`.
        progress: Told of the stage "tofu", in rows.

    Returns:
        A JSON-able dict with, for "geometric" and "arithmetic" truth ratios each, "model_utility" (harmonic mean of
        probability, ROUGE-L recall and truth ratio on retain, real_authors and world_facts; on the last two the
        probability is `option_probability`), "forget_quality" (None without reference) and "log_truth_ratios" (of the
        forget set); and with "sets": the means of each set, "truth_ratio" (again two) and "utility_probability".

    Raises:
        ValueError: If a set is missing, unknown or empty.
        DataError: If a row has no wrong answers or cannot be encoded.
        ImportError: If the package `rouge-score`, or `scipy` with a reference, is not installed.
    """
    check_tofu(sets, quality=reference is not None)
    # All sets are encoded before the first is measured, which takes long.
    options = {name: _option_examples(tokenizer, rows, max_length, template) for name, rows in sets.items()}
    for examples in options.values():
        check_fits(model, examples)
    work = {name: 3 * len(rows) + sum(len(wrong_answers(row)) for row in rows) for name, rows in sets.items()}
    total, done = sum(work.values()), 0
    values: dict[str, TofuValues] = {}
    for name, rows in sets.items():
        part = part_of(renamed(progress, lambda _: "tofu"), done, total)
        scores = evaluate(
            model,
            tokenizer,
            rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            template=template,
            progress=part_of(part, 0, total),
        )
        nlls = _option_nlls(model, tokenizer, rows, options[name], batch_size, part_of(part, 2 * len(rows), total))
        values[name] = TofuValues(scores.values, *nlls)
        done += work[name]
    return tofu_figures(values, reference=reference)


def check_tofu(sets: Mapping[str, Sequence[Row]], *, quality: bool = False) -> None:
    """Raise if the suite could not be computed from these rows, before anything is generated, which takes long.

    Args:
        sets: As in `tofu_suite`.
        quality: Whether the forget quality is asked for.

    Raises:
        ValueError: If a set is missing, unknown or empty.
        DataError: If a row has no wrong answers.
        ImportError: If the package `rouge-score`, or `scipy` for the forget quality, is not installed.
    """
    _check_sets({name: len(rows) for name, rows in sets.items()})
    for rows in sets.values():
        for row in rows:
            wrong_answers(row)
    check_rouge()
    if quality:
        check_scipy()


def tofu_figures(
    values: Mapping[str, TofuValues], *, reference: Mapping[str, Sequence[float]] | None = None
) -> dict[str, object]:
    """Return the result of `tofu_suite` from values that were measured before, by whatever program.

    Args:
        values: Those of "forget", "retain", "real_authors" and "world_facts".
        reference: As in `tofu_suite`.

    Raises:
        ValueError: If a set is missing, unknown or empty, or the values of a set are not one for each row.
        ImportError: If the package `scipy` is not installed, with a reference.

    Examples:
        >>> scores = {"nll": [0.5], "probability": [0.6], "rouge_l_recall": [1.0]}
        >>> values = TofuValues(scores, right_nlls=[0.5], wrong_nlls=[[2.5, 3.5]])
        >>> sets = ("forget", "retain", "real_authors", "world_facts")
        >>> round(tofu_figures({name: values for name in sets})["model_utility"]["geometric"], 4)
        0.8733
    """
    _check_sets({name: len(part.right_nlls) for name, part in values.items()})
    results: dict[str, dict[str, object]] = {}
    terms: dict[Average, list[float]] = {average: [] for average in AVERAGES}
    forget_ratios: dict[Average, list[float]] = {}
    for name, part in values.items():
        part.check(name)
        ratios: dict[Average, list[float]] = {
            average: [log_truth_ratio(*nlls, average) for nlls in zip(part.right_nlls, part.wrong_nlls, strict=True)]
            for average in AVERAGES
        }
        truth = {average: truth_ratio_score(logs, forget=name == "forget") for average, logs in ratios.items()}
        means = {measure: mean(of_rows) for measure, of_rows in part.scores.items()}
        options = [option_probability(*nlls) for nlls in zip(part.scores["nll"], part.wrong_nlls, strict=True)]
        utility_probability = mean(options) if name in _OPTION_SETS else means["probability"]
        results[name] = {**means, "truth_ratio": truth, "utility_probability": utility_probability}
        if name == "forget":
            forget_ratios = ratios
        else:
            for average in AVERAGES:
                terms[average] += [utility_probability, means["rouge_l_recall"], truth[average]]
    return {
        "model_utility": {average: harmonic_mean(of_sets) for average, of_sets in terms.items()},
        "forget_quality": None
        if reference is None
        else {average: forget_quality(forget_ratios[average], reference[average]) for average in AVERAGES},
        "log_truth_ratios": forget_ratios,
        "sets": results,
    }


def _check_sets(sizes: Mapping[str, int]) -> None:
    known = {"forget", *_UTILITY_SETS}
    if set(sizes) != known or not all(sizes.values()):
        raise ValueError(problem(f"The sets have {dict(sizes)} rows", f"some in each of {sorted(known)}"))


def _option_examples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int | None, template: Template
) -> list[Example]:
    """Encode each row's right (paraphrased) answer, and then each of its wrong ones."""
    right = [replace(row, answer=str(row.extra.get("paraphrased_answer") or row.answer)) for row in rows]
    wrong = [replace(row, answer=text) for row in rows for text in wrong_answers(row)]
    return encode([*right, *wrong], tokenizer, max_length=max_length, template=template)


def _option_nlls(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    examples: Sequence[Example],
    batch_size: int,
    progress: Progress | None,
) -> tuple[list[float], list[list[float]]]:
    """Return the mean nll of each row's right answer, and of each of its wrong ones."""
    padding = pad_id(tokenizer, model)
    nlls = score_answers(model, examples, batch_size=batch_size, pad_id=padding, progress=progress)["nll"]
    remaining = iter(nlls[len(rows) :])
    return nlls[: len(rows)], [[next(remaining) for _ in wrong_answers(row)] for row in rows]
