r"""TOFU: truth ratio, model utility and forget quality (Maini et al. 2024, arXiv 2401.06121).

With $P(a) = \exp(-\text{mean nll of } a)$, the truth ratio of a question is
$R = \bar P(\text{wrong}) / P(\text{right})$, where *right* is the paraphrased answer if there is one. The mean over the
wrong answers is arithmetic in the paper, but geometric in the code released with it and in open-unlearning, from
where most published figures come. Both are computed here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch_simu._checks import check_choice, problem
from torch_simu.unlearning.data.examples import Template, encode
from torch_simu.unlearning.data.rows import DataError, Row
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics.evaluate import evaluate, harmonic_mean, mean
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.progress import Progress, part_of, renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Average = Literal["geometric", "arithmetic"]
"""How the probabilities of the wrong answers are averaged."""

_AVERAGES: tuple[Average, ...] = ("geometric", "arithmetic")
_UTILITY_SETS = ("retain", "real_authors", "world_facts")
_OPTION_SETS = ("real_authors", "world_facts")


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


def log_truth_ratio(right_nll: float, wrong_nlls: Sequence[float], average: Average = "geometric") -> float:
    r"""Return $\log R$ of one question: 0 when both are equally likely, negative when the right answer is the likelier.

    Args:
        right_nll: Mean negative log-likelihood per token of the right answer, in nats.
        wrong_nlls: The same of each wrong answer.
        average: How the probabilities of the wrong answers are averaged.

    Raises:
        ValueError: If there is no wrong answer or `average` is unknown.

    Examples:
        >>> log_truth_ratio(2.0, [1.0, 3.0])
        0.0
        >>> round(log_truth_ratio(2.0, [1.0, 3.0], "arithmetic"), 4)
        0.4338
    """
    check_choice("average", average, _AVERAGES)
    if not wrong_nlls:
        raise ValueError(problem("There is no wrong answer", "at least one"))
    if average == "geometric":
        return right_nll - mean(wrong_nlls)
    # Factored by the likeliest wrong answer, so that no probability underflows to 0.
    least = min(wrong_nlls)
    return right_nll - least + math.log(mean([math.exp(least - nll) for nll in wrong_nlls]))


def truth_ratio_score(log_ratios: Sequence[float], *, forget: bool) -> float:
    r"""Return the mean of $\min(R, 1/R)$ for the forget set, else of $\max(0, 1 - R)$; in [0, 1], higher is better.

    Args:
        log_ratios: $\log R$ of each question.
        forget: Whether the questions are the forgotten ones, whose right answers should not stand out either way.

    Examples:
        >>> truth_ratio_score([math.log(4), -math.log(4)], forget=True)
        0.25
        >>> truth_ratio_score([math.log(4), -math.log(4)], forget=False)
        0.375
    """
    if forget:
        return mean([math.exp(-abs(ratio)) for ratio in log_ratios])
    return mean([max(0.0, -math.expm1(min(ratio, 0.0))) for ratio in log_ratios])


def option_probability(right_nll: float, wrong_nlls: Sequence[float]) -> float:
    """Return the probability of the right answer over the sum over all options, each per token; in [0, 1].

    Examples:
        >>> option_probability(1.0, [1.0, 1.0, 1.0])
        0.25
    """
    return 1 / (1 + sum(math.exp(min(right_nll - nll, 700.0)) for nll in wrong_nlls))


def forget_quality(log_ratios: Sequence[float], reference: Sequence[float]) -> float:
    """Return how likely two sets of truth ratios come from one distribution: the p-value of a two-sample KS test.

    The test depends on the order of the values alone, so logarithms serve as well as the ratios.

    Args:
        log_ratios: Of the unlearned model on the forget set.
        reference: Of a model that was trained on the retain set only, on the same questions.

    Raises:
        ValueError: If one of them is empty.
        ImportError: If the package `scipy` is not installed.

    Examples:
        >>> forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
        1.0
    """
    if not log_ratios or not reference:
        wrong = f"There are {len(log_ratios)} truth ratios and {len(reference)} of the reference"
        raise ValueError(problem(wrong, "at least one of each"))
    try:
        from scipy.stats import ks_2samp  # type: ignore[import-untyped]
    except ImportError:
        wrong = "The package 'scipy' is not installed"
        raise ImportError(problem(wrong, "it for the forget quality", "Run: pip install scipy")) from None
    with warnings.catch_warnings():
        # For some sizes the exact distribution overflows, and the asymptotic one is taken.
        warnings.filterwarnings("ignore", message="ks_2samp: Exact calculation", category=RuntimeWarning)
        return float(ks_2samp(log_ratios, reference).pvalue)


def tofu_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    *,
    reference: Mapping[str, Sequence[float]] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 200,
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
    known = {"forget", *_UTILITY_SETS}
    if set(sets) != known or not all(sets.values()):
        sizes = {name: len(rows) for name, rows in sets.items()}
        raise ValueError(problem(f"The sets have {sizes} rows", f"some in each of {sorted(known)}"))
    work = {name: 3 * len(rows) + sum(len(wrong_answers(row)) for row in rows) for name, rows in sets.items()}
    total, done = sum(work.values()), 0
    results: dict[str, dict[str, object]] = {}
    terms: dict[Average, list[float]] = {average: [] for average in _AVERAGES}
    forget_ratios: dict[Average, list[float]] = {}
    for name, rows in sets.items():
        part = part_of(renamed(progress, lambda _: "tofu"), done, total)
        scores = evaluate(
            model,
            tokenizer,
            rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            template=template,
            progress=part_of(part, 0, total),
        )
        right_nlls, wrong_nlls = _option_nlls(
            model, tokenizer, rows, batch_size, template, part_of(part, 2 * len(rows), total)
        )
        done += work[name]
        ratios: dict[Average, list[float]] = {
            average: [log_truth_ratio(*nlls, average) for nlls in zip(right_nlls, wrong_nlls, strict=True)]
            for average in _AVERAGES
        }
        truth = {average: truth_ratio_score(values, forget=name == "forget") for average, values in ratios.items()}
        means = scores.means
        options = [option_probability(*nlls) for nlls in zip(scores.values["nll"], wrong_nlls, strict=True)]
        utility_probability = mean(options) if name in _OPTION_SETS else means["probability"]
        results[name] = {**means, "truth_ratio": truth, "utility_probability": utility_probability}
        if name == "forget":
            forget_ratios = ratios
        else:
            for average in _AVERAGES:
                terms[average] += [utility_probability, means["rouge_l_recall"], truth[average]]
    return {
        "model_utility": {average: harmonic_mean(values) for average, values in terms.items()},
        "forget_quality": None
        if reference is None
        else {average: forget_quality(forget_ratios[average], reference[average]) for average in _AVERAGES},
        "log_truth_ratios": forget_ratios,
        "sets": results,
    }


def _option_nlls(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    template: Template,
    progress: Progress | None,
) -> tuple[list[float], list[list[float]]]:
    """Return the mean nll of each row's right (paraphrased) answer, and of each of its wrong ones."""
    right = [replace(row, answer=str(row.extra.get("paraphrased_answer") or row.answer)) for row in rows]
    wrong = [[replace(row, answer=text) for text in wrong_answers(row)] for row in rows]
    examples = encode([*right, *(option for options in wrong for option in options)], tokenizer, template=template)
    nlls = score_answers(model, examples, batch_size=batch_size, pad_id=pad_id(tokenizer), progress=progress)["nll"]
    remaining = iter(nlls[len(rows) :])
    return nlls[: len(rows)], [[next(remaining) for _ in options] for options in wrong]
