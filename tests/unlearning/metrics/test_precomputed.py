"""The figures of the suites follow from the values of rows, whoever measured them; what lacks is said before."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.language import ROWS, memorizing_model, tiny_model, word_tokenizer
from tests.unlearning.metrics.test_tofu_lume import LUME, SETS
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.evaluate import evaluate
from torch_simu.unlearning.metrics.generation import generate_answers
from torch_simu.unlearning.metrics.lume import check_lume, lume_figures, lume_suite
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.metrics.tofu import TofuValues, check_tofu, tofu_figures, tofu_suite, wrong_answers

SCORES = {"nll": [0.5], "probability": [0.6], "rouge_l_recall": [1.0]}
VALUES = TofuValues(SCORES, [0.5], [[2.5, 3.5]])
NAMES = ("forget", "retain", "real_authors", "world_facts")


def test_values_that_another_program_measured_give_the_figures_of_the_tofu_suite():
    tokenizer = word_tokenizer()
    model = memorizing_model(tokenizer, steps=20)
    reference = {"geometric": [0.1, 0.2], "arithmetic": [0.3, 0.1]}

    def nll(row, answer):
        return score_answers(model, encode([replace(row, answer=answer)], tokenizer))["nll"][0]

    values = {}
    for name, rows in SETS.items():
        right = [nll(row, row.extra.get("paraphrased_answer", row.answer)) for row in rows]
        wrong = [[nll(row, text) for text in wrong_answers(row)] for row in rows]
        values[name] = TofuValues(evaluate(model, tokenizer, rows, max_new_tokens=8).values, right, wrong)
    suite = tofu_suite(model, tokenizer, SETS, max_new_tokens=8, reference=reference)
    figures = tofu_figures(values, reference=reference)
    assert figures["forget_quality"] == suite["forget_quality"]
    for average in ("geometric", "arithmetic"):
        assert figures["model_utility"][average] == pytest.approx(suite["model_utility"][average], abs=1e-4)
        assert figures["log_truth_ratios"][average] == pytest.approx(suite["log_truth_ratios"][average], abs=1e-4)
    for name in NAMES:
        assert figures["sets"][name].keys() == suite["sets"][name].keys()


def test_texts_that_another_program_generated_give_the_figures_of_the_lume_suite():
    tokenizer = word_tokenizer()
    model = memorizing_model(tokenizer, LUME["retain"])
    texts = {
        name: generate_answers(model, tokenizer, encode(rows, tokenizer, template="raw"), max_new_tokens=6)
        for name, rows in LUME.items()
    }
    assert lume_figures(LUME, texts) == lume_suite(model, tokenizer, LUME, max_new_tokens=6)


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=5))
def test_the_order_of_rows_changes_no_utility(nlls):
    def figures(order):
        scores = {"nll": order, "probability": order, "rouge_l_recall": order}
        values = TofuValues(scores, order, [[nll + 1] for nll in order])
        return tofu_figures({name: values for name in NAMES})["model_utility"]

    forward, backward = figures(nlls), figures(nlls[::-1])
    assert forward == pytest.approx(backward)


def test_any_of_several_answers_counts_as_known():
    row = Row("Who ?", "Bob", {"id": "xqa1", "task": "Task1"}, alternatives=("Robert",))
    figures = lume_figures({"forget": [row], "retain": [row]}, {"forget": ["Ada"], "retain": [" robert"]})
    assert figures["task_aggregate"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"forget": VALUES}, r"The sets have \{'forget': 1\} rows, expected some in each of"),
        (dict.fromkeys(NAMES, replace(VALUES, right_nlls=[])), r"The sets have .*'forget': 0"),
        (dict.fromkeys(NAMES, replace(VALUES, wrong_nlls=[])), r"The set 'forget' has values .*'wrong_nlls': 0\}, exp"),
        (dict.fromkeys(NAMES, replace(VALUES, scores={"nll": [1.0]})), "expected nll, probability and rouge_l_recall"),
        ({**dict.fromkeys(NAMES, VALUES), "retain": replace(VALUES, right_nlls=[1.0, 2.0])}, "The set 'retain' has"),
        (dict.fromkeys(NAMES, replace(VALUES, wrong_nlls=[[]])), "There is no wrong answer"),
    ],
)
def test_values_that_are_not_one_for_each_row_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        tofu_figures(values)


def test_texts_that_are_not_one_for_each_row_are_refused():
    with pytest.raises(
        ValueError, match=r"\(rows, texts\) of the sets are .*'retain': \(3, 0\)\}, expected a text for"
    ):
        lume_figures(LUME, {"forget": ["a", "b", "c"]})


@pytest.mark.parametrize("package", ["rouge_score.rouge_scorer", "scipy.stats"])
def test_a_missing_package_is_found_before_the_work(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    tokenizer, calls = word_tokenizer(), []
    model = tiny_model(tokenizer)
    model.register_forward_pre_hook(lambda *call: calls.append(call))
    works = [lambda: tofu_suite(model, tokenizer, SETS, reference={}), lambda: check_tofu(SETS, quality=True)]
    if "rouge" in package:
        works += [lambda: lume_suite(model, tokenizer, LUME), lambda: evaluate(model, tokenizer, ROWS)]
        works += [lambda: check_lume(LUME), lambda: check_tofu(SETS)]
    for work in works:
        with pytest.raises(ImportError, match=r"is not installed, expected it for .* Run: pip install"):
            work()
    assert not calls
    evaluate(model, tokenizer, ROWS, rouge=False, max_new_tokens=1)


def test_rows_without_wrong_answers_are_found_before_the_work():
    with pytest.raises(DataError, match=r"the fields are \['question', 'answer'\]"):
        check_tofu({**SETS, "retain": ROWS})
    with pytest.raises(ValueError, match="some in each of 'forget', 'retain'"):
        check_lume({"forget": LUME["forget"]})


def test_generation_ends_at_each_of_several_end_tokens_and_restores_the_settings():
    tokenizer = word_tokenizer()
    model = memorizing_model(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["lives", "older"]})
    ends = tokenizer.convert_tokens_to_ids(["lives", "older"])
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = [tokenizer.eos_token_id, *ends]
    own = model.generation_config
    texts = generate_answers(model, tokenizer, encode(ROWS, tokenizer), max_new_tokens=9)
    assert texts[0] == "Ada" and texts[4] == "Ada is" and texts[2] == "roses"
    assert model.generation_config is own


def test_long_prompts_are_cut_for_a_model_of_few_positions():
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer, "gpt2")
    long = {name: [replace(row, question="Who ? " * 40 + row.question) for row in rows] for name, rows in SETS.items()}
    calls = []
    hook = model.register_forward_pre_hook(lambda *call: calls.append(call))
    with pytest.raises(DataError, match=r"has 64 positions, .* max_length=64"):
        tofu_suite(model, tokenizer, {**SETS, "world_facts": long["world_facts"]}, max_new_tokens=3)
    assert not calls
    hook.remove()
    assert tofu_suite(model, tokenizer, long, max_new_tokens=3, max_length=64)["sets"]
    lume = {name: [replace(row, question="Who ? " * 40 + row.question) for row in rows] for name, rows in LUME.items()}
    assert lume_suite(model, tokenizer, lume, max_new_tokens=3, max_length=64)["num_terms"] == 6
