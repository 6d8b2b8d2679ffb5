r"""Truth ratio: whether a model prefers the right answer of a question to wrong ones (Maini et al. 2024, TOFU).

With $P(a) = \exp(-\text{mean nll of } a)$, the truth ratio of a question is
$R = \bar P(\text{wrong}) / P(\text{right})$, where *right* is the paraphrased answer if there is one. The mean over the
wrong answers is arithmetic in the paper, but geometric in the code released with it and in open-unlearning, from
where most published figures come. Both are computed here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

from torch_simu._checks import check_choice, problem
from torch_simu.unlearning.metrics.evaluate import mean

Average = Literal["geometric", "arithmetic"]
"""How the probabilities of the wrong answers are averaged."""

AVERAGES: tuple[Average, ...] = ("geometric", "arithmetic")


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
    check_choice("average", average, AVERAGES)
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

    `right_nll` and `wrong_nlls` are mean negative log-likelihoods, in nats per token.

    Examples:
        >>> option_probability(1.0, [1.0, 1.0, 1.0])
        0.25
    """
    return 1 / (1 + sum(math.exp(min(right_nll - nll, 700.0)) for nll in wrong_nlls))


def check_scipy() -> None:
    """Raise if the forget quality cannot be computed, before the work.

    Raises:
        ImportError: If the package `scipy` is not installed.

    Examples:
        >>> check_scipy()
    """
    try:
        import scipy.stats  # type: ignore[import-untyped] # noqa: F401
    except ImportError:
        wrong = "The package 'scipy' is not installed"
        raise ImportError(problem(wrong, "it for the forget quality", "Run: pip install scipy")) from None


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
    check_scipy()
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        # For some sizes the exact distribution overflows, and the asymptotic one is taken.
        warnings.filterwarnings("ignore", message="ks_2samp: Exact calculation", category=RuntimeWarning)
        return float(ks_2samp(log_ratios, reference).pvalue)
