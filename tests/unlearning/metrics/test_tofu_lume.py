"""TOFU and LUME: the files load, the measures equal loops made from their definitions, and the suites add them up."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.language import ROWS, memorizing_model, tiny_model, word_tokenizer
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row, check_disjoint, load_rows
from torch_simu.unlearning.metrics.evaluate import evaluate, harmonic_mean
from torch_simu.unlearning.metrics.lume import knows, lume_suite, row_kind, task_aggregate
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.metrics.tofu import tofu_suite, wrong_answers
from torch_simu.unlearning.metrics.truth_ratio import (
    log_truth_ratio,
    option_probability,
    truth_ratio_score,
)

DATA = Path(os.environ.get("TORCH_SIMU_DATA", Path(__file__).parents[4] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the TOFU and LUME files; set TORCH_SIMU_DATA")

SETS = {
    "forget": [
        replace(row, extra={"perturbed_answer": ["roses", "Bob"], "paraphrased_answer": "Rome"}) for row in ROWS[:2]
    ],
    "retain": [replace(row, extra={"perturbed_answer": ["Oslo", "Ada", "peas"]}) for row in ROWS[2:]],
    "real_authors": [Row("Who is older ?", "Ada", {"option1": "Ada", "option2": "Bob", "option3": "roses"})],
    "world_facts": [Row("Where is the town ?", "Oslo", {"perturbed_answer": "Rome"})],
}
LUME = {
    "forget": [
        Row("Ada lives in", "Rome in the old town", {"id": '"x"sc1', "task": "Task1"}, raw=True),
        Row("What does Ada grow ?", "roses", {"id": '"x"qa0', "task": "Task1"}, raw=True),
        Row("What does Bob grow ?", "peas", {"id": "yqa4", "task": "Task2"}, raw=True),
    ],
    "retain": [
        Row("Bob lives in", "Oslo", {"id": "zsc1", "task": "Task1"}, raw=True),
        Row("Who is older ?", "Ada", {"id": "zqa1", "task": "Task1"}, raw=True),
        Row("Who is the mayor ?", "Bob", {"id": "zqa1", "task": "Task2"}, raw=True),
    ],
}


# Files


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "num_wrong"),
    [
        ("full", 4000, None),
        ("forget10_perturbed", 400, None),
        ("retain_perturbed", 400, None),
        ("real_authors", 100, 3),
        ("real_authors_perturbed", 100, 3),
        ("world_facts", 117, 3),
        ("world_facts_perturbed", 117, 3),
    ],
)
def test_the_files_of_tofu_load_with_their_wrong_answers(name, count, num_wrong):
    rows = load_rows(DATA / "tofu" / f"{name}.jsonl")
    assert len(rows) == count
    if name.startswith(("real", "world")):
        assert all(len(wrong_answers(row)) == num_wrong for row in rows)
    elif name.endswith("perturbed"):
        assert all(wrong_answers(row) and row.extra["paraphrased_answer"] for row in rows)


@needs_data
def test_the_forget_and_retain_sets_of_both_benchmarks_are_disjoint():
    full = load_rows(DATA / "tofu" / "full.jsonl")
    forget10 = load_rows(DATA / "tofu" / "forget10_perturbed.jsonl")
    check_disjoint(full[3600:], full[:3600])
    with pytest.raises(DataError, match=r"^400 rows are in both the forget and the retain set"):
        check_disjoint(forget10, full)


@needs_data
@pytest.mark.parametrize(("name", "count"), [("forget", 1616), ("retain", 1600)])
def test_the_files_of_lume_load_as_raw_rows_with_a_kind(name, count):
    rows = load_rows(DATA / "lume" / f"{name}.jsonl")
    assert len(rows) == count
    assert all(row.raw for row in rows)
    assert {(row.extra["task"], row_kind(row)) for row in rows} == {
        (task, kind) for task in ("Task1", "Task2") for kind in ("regurgitation", "knowledge")
    }


@needs_data
def test_the_rows_of_both_benchmarks_are_encoded_with_their_whole_answers():
    rows = load_rows(DATA / "tofu" / "full.jsonl")[::100] + load_rows(DATA / "lume" / "forget.jsonl")[::50]
    tokenizer = word_tokenizer(rows)
    for row, example in zip(rows, encode(rows, tokenizer), strict=True):
        # Tokens that `split` did not make are unknown to this tokenizer, so the count alone is compared.
        assert example.num_scored == len(tokenizer(row.answer)["input_ids"]) + 1


# The TOFU suite


def test_the_tofu_suite_equals_a_loop_over_rows():
    tokenizer = word_tokenizer()
    model = memorizing_model(tokenizer, steps=20)
    result = tofu_suite(model, tokenizer, SETS, batch_size=3, max_new_tokens=8)

    def nll(row, answer):
        return score_answers(model, encode([replace(row, answer=answer)], tokenizer))["nll"][0]

    terms = {"geometric": [], "arithmetic": []}
    for name, rows in SETS.items():
        means = evaluate(model, tokenizer, rows, max_new_tokens=8).means
        wrong = [[nll(row, text) for text in wrong_answers(row)] for row in rows]
        right = [nll(row, row.extra.get("paraphrased_answer", row.answer)) for row in rows]
        for average, of_set in terms.items():
            logs = [log_truth_ratio(one, others, average) for one, others in zip(right, wrong, strict=True)]
            truth = truth_ratio_score(logs, forget=name == "forget")
            assert result["sets"][name]["truth_ratio"][average] == pytest.approx(truth, abs=1e-5)
            if name == "forget":
                assert result["log_truth_ratios"][average] == pytest.approx(logs, abs=1e-4)
                continue
            sure = means["probability"]
            if name != "retain":
                shares = [option_probability(nll(row, row.answer), w) for row, w in zip(rows, wrong, strict=True)]
                sure = sum(shares) / len(shares)
            assert result["sets"][name]["utility_probability"] == pytest.approx(sure, abs=1e-5)
            of_set += [sure, means["rouge_l_recall"], truth]
    for average, values in terms.items():
        assert len(values) == 9
        assert result["model_utility"][average] == pytest.approx(harmonic_mean(values), abs=1e-4)
    assert result["forget_quality"] is None


def test_the_tofu_suite_goes_through_json_and_serves_as_its_own_reference():
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer)
    calls = []
    first = tofu_suite(model, tokenizer, SETS, max_new_tokens=2, progress=lambda *call: calls.append(call))
    reference = json.loads(json.dumps(first))["log_truth_ratios"]
    again = tofu_suite(model, tokenizer, SETS, max_new_tokens=2, reference=reference)
    assert again["forget_quality"] == {"geometric": 1.0, "arithmetic": 1.0}
    stages, dones, totals, _ = zip(*calls, strict=True)
    assert set(stages) == {"tofu"}
    assert list(dones) == sorted(set(dones))
    assert set(totals) == {dones[-1]}


@pytest.mark.parametrize("change", [{"retain": []}, {"more": ROWS}])
def test_the_tofu_suite_wants_its_four_sets(change):
    tokenizer = word_tokenizer()
    with pytest.raises(
        ValueError, match=r"The sets have \{'forget': 2, .*\} rows, expected some in each of \['forget', "
    ):
        tofu_suite(tiny_model(tokenizer), tokenizer, {**SETS, **change})


# LUME


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_the_task_aggregate_is_the_harmonic_mean_of_what_is_gone_and_what_is_kept(pairs):
    forget = {str(i): gone for i, (gone, _) in enumerate(pairs)}
    retain = {str(i): kept for i, (_, kept) in enumerate(pairs)}
    terms = [1 - gone for gone, _ in pairs] + [kept for _, kept in pairs]
    total = 0.0 if min(terms) == 0 else len(terms) / sum(1 / term for term in terms)
    assert task_aggregate(forget, retain) == pytest.approx(total)
    assert task_aggregate({**forget, "x": 1.0}, {**retain, "x": 1.0}) == 0


def test_the_lume_suite_equals_a_loop_over_rows():
    tokenizer = word_tokenizer()
    # It says more than the answer to one question, which ROUGE-L recall would forgive and knowledge does not.
    more = replace(LUME["forget"][1], answer="tall roses")
    model = memorizing_model(tokenizer, [*LUME["retain"], LUME["forget"][0], more])
    result = lume_suite(model, tokenizer, LUME, max_new_tokens=6, batch_size=2)
    assert result["retain"] == {"knowledge Task1": 1.0, "knowledge Task2": 1.0, "regurgitation Task1": 1.0}
    assert result["forget"]["knowledge Task1"] == 0
    assert result["num_terms"] == 6
    means = {name: {} for name in LUME}
    for name, rows in LUME.items():
        for row in rows:
            scores = evaluate(model, tokenizer, [row], max_new_tokens=6)
            measure = (
                scores.means["rouge_l_recall"] if "sc" in row.extra["id"] else knows(scores.generations[0], row.answer)
            )
            means[name].setdefault(f"{row_kind(row)} {row.extra['task']}", []).append(float(measure))
    for name, terms in means.items():
        assert result[name] == {key: sum(values) / len(values) for key, values in sorted(terms.items())}
    assert result["task_aggregate"] == 0  # The forget document is known by heart, so one term is zero.
    json.dumps(result)


def test_the_lume_suite_counts_its_rows():
    tokenizer = word_tokenizer()
    calls = []
    lume_suite(
        tiny_model(tokenizer),
        tokenizer,
        LUME,
        max_new_tokens=1,
        batch_size=2,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("lume", done, 6, "") for done in (2, 3, 5, 6)]


def test_the_lume_suite_refuses_sets_that_test_different_things_before_it_generates():
    tokenizer = word_tokenizer()
    model = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"The forget terms are \['knowledge Task1', .*the same tasks and kinds of rows"
    ):
        lume_suite(model, tokenizer, {**LUME, "retain": LUME["retain"][:2]})
    with pytest.raises(
        ValueError, match=r"The sets have \{'forget': 3\} rows, expected some in each of 'forget', 'retain'"
    ):
        lume_suite(model, tokenizer, {"forget": LUME["forget"]})
    with pytest.raises(ValueError, match="The forget terms"):
        task_aggregate({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize("extra", [{}, {"id": "xqa1"}, {"id": "x", "task": "Task1"}])
def test_rows_of_another_kind_are_refused(extra):
    with pytest.raises(
        DataError, match=r"f:3: the row has \{'id': .*, expected a task and an id that ends in sc or qa"
    ):
        row_kind(Row("q", "a", extra, "f", 3))
