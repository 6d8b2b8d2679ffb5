"""Truth ratio and forget quality equal their definitions, and hopeless answers do not overflow."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from tests.language import ROWS
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.tofu import wrong_answers
from torch_simu.unlearning.metrics.truth_ratio import (
    forget_quality,
    log_truth_ratio,
    option_probability,
    truth_ratio_score,
)

nlls = st.floats(0.0, 20.0)
wrongs = st.lists(nlls, min_size=1, max_size=5)
log_ratios = st.lists(st.floats(-20.0, 20.0), min_size=1, max_size=8)


@given(nlls, wrongs)
def test_the_truth_ratio_equals_its_definition(right, wrong):
    geometric = math.prod(math.exp(-nll) for nll in wrong) ** (1 / len(wrong)) / math.exp(-right)
    arithmetic = sum(math.exp(-nll) for nll in wrong) / len(wrong) / math.exp(-right)
    assert log_truth_ratio(right, wrong) == pytest.approx(math.log(geometric), abs=1e-6)
    assert log_truth_ratio(right, wrong, "arithmetic") == pytest.approx(math.log(arithmetic), abs=1e-6)
    assert log_truth_ratio(right, wrong) <= log_truth_ratio(right, wrong, "arithmetic") + 1e-9


@given(nlls, nlls, st.sampled_from(["geometric", "arithmetic"]))
def test_swapping_right_and_wrong_inverts_the_truth_ratio(right, wrong, average):
    there, back = log_truth_ratio(right, [wrong], average), log_truth_ratio(wrong, [right], average)
    assert there == pytest.approx(-back)


def test_the_truth_ratio_of_hopeless_answers_does_not_overflow():
    assert log_truth_ratio(1e4, [0.0, 2e4], "arithmetic") == pytest.approx(1e4 - math.log(2))
    assert truth_ratio_score([1e4, -1e4], forget=True) == 0
    assert truth_ratio_score([1e4, -1e4], forget=False) == 0.5
    assert option_probability(1e4, [0.0]) == pytest.approx(0, abs=1e-300)


@given(log_ratios)
def test_the_scores_of_truth_ratios_equal_their_definitions(logs):
    ratios = [math.exp(log) for log in logs]
    forget = sum(min(ratio, 1 / ratio) for ratio in ratios) / len(ratios)
    retain = sum(max(0.0, 1 - ratio) for ratio in ratios) / len(ratios)
    assert truth_ratio_score(logs, forget=True) == pytest.approx(forget)
    assert truth_ratio_score(logs, forget=False) == pytest.approx(retain, abs=1e-9)
    assert 0 <= truth_ratio_score(logs, forget=False) <= 1
    assert truth_ratio_score([-log for log in logs], forget=True) == pytest.approx(forget)


@given(nlls, wrongs)
def test_the_option_probability_is_a_share_of_all_options(right, wrong):
    probabilities = [math.exp(-nll) for nll in (right, *wrong)]
    assert option_probability(right, wrong) == pytest.approx(probabilities[0] / sum(probabilities))
    assert option_probability(right, [right] * len(wrong)) == pytest.approx(1 / (1 + len(wrong)))


@pytest.mark.filterwarnings("ignore:ks_2samp. Exact calculation unsuccessful:RuntimeWarning")
@given(log_ratios, log_ratios)
def test_the_forget_quality_is_the_same_for_ratios_and_their_logarithms(one, other):
    quality = forget_quality(one, other)
    assert 0 <= quality <= 1
    assert forget_quality(one, one) == 1
    assert quality == pytest.approx(forget_quality(other, one))
    exact = [round(log * 8) / 8 for log in one], [round(log * 8) / 8 for log in other]
    assert forget_quality(*exact) == pytest.approx(
        ks_2samp(*([math.exp(log) for log in logs] for logs in exact)).pvalue
    )


def test_different_truth_ratios_have_a_low_forget_quality():
    assert forget_quality([i / 50 for i in range(50)], [2 + i / 50 for i in range(50)]) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: log_truth_ratio(1.0, []), ValueError, "There is no wrong answer, expected at least one"),
        (
            lambda: log_truth_ratio(1.0, [1.0], "harmonic"),
            ValueError,
            "average is 'harmonic', expected one of 'geometric'",
        ),
        (lambda: forget_quality([], [1.0]), ValueError, "There are 0 truth ratios and 1 of the reference, expected at"),
        (
            lambda: wrong_answers(ROWS[0]),
            DataError,
            r"row:0: the fields are \['question', 'answer'\], expected perturbed",
        ),
        (
            lambda: wrong_answers(Row("q", "a", {"option1": "b"}, "f", 3)),
            DataError,
            r"f:3: the options are \['b'\], expected .* options with the answer among them",
        ),
        (
            lambda: wrong_answers(Row("q", "a", {"perturbed_answer": 3}, "f", 3)),
            DataError,
            "f:3: perturbed_answer is 3, expected a list of texts",
        ),
    ],
)
def test_what_has_no_truth_ratio_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_forget_quality_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"'scipy' is not installed, expected it for the forget quality. Run: pip"):
        forget_quality([1.0], [1.0])
