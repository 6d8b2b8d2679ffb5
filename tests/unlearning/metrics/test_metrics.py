"""All measures of a set together: a model that knows its rows scores one, and is left as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.language import ROWS, memorizing_model, merging_tokenizer, tiny_model, word_tokenizer
from torch_simu.unlearning.metrics.evaluate import Scores, evaluate, harmonic_mean, mean
from torch_simu.unlearning.metrics.generation import (
    generate_answers,
)
from torch_simu.unlearning.metrics.scoring import (
    score_answers,
)


@pytest.mark.parametrize("make", [word_tokenizer, merging_tokenizer])
def test_a_model_that_knows_its_rows_scores_one_and_a_random_one_does_not(make):
    tokenizer = make()
    known = evaluate(memorizing_model(tokenizer), tokenizer, ROWS, batch_size=4).means
    random = evaluate(tiny_model(tokenizer), tokenizer, ROWS).means
    for name in ("em", "es", "qa_exact_match", "qa_containment", "rouge_l_recall"):
        assert known[name] == 1, name
        assert random[name] < 0.7, name
    assert known["probability"] > 0.8 > random["probability"]


def test_scores_have_one_value_for_each_row_and_their_means():
    tokenizer = word_tokenizer()
    scores = evaluate(tiny_model(tokenizer), tokenizer, ROWS)
    expected = {"nll", "probability", "em", "es", "qa_exact_match", "qa_containment", "rouge_l_recall"}
    assert set(scores.values) == set(scores.means) == expected
    assert {len(values) for values in scores.values.values()} == {len(ROWS), len(scores.generations)}
    assert scores.means["em"] == pytest.approx(sum(scores.values["em"]) / len(ROWS))


def test_without_generation_only_the_teacher_forced_measures_are_there():
    tokenizer = word_tokenizer()
    scores = evaluate(tiny_model(tokenizer), tokenizer, ROWS, generate=False)
    assert set(scores.values) == {"nll", "probability", "em", "es"}
    assert scores.generations == ()


def test_progress_counts_every_row_up_to_the_total():
    tokenizer = word_tokenizer()
    calls = []
    evaluate(
        tiny_model(tokenizer), tokenizer, ROWS, batch_size=4, rouge=False, progress=lambda *call: calls.append(call)
    )
    assert calls == [("evaluate", done, 12, "") for done in (4, 6, 10, 12)]


def test_the_model_is_left_as_it_was_even_after_an_exception():
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer, "gpt2")
    model.transformer.h[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def failing(stage, done, total, note=""):
        raise KeyboardInterrupt

    evaluate(model, tokenizer, ROWS, rouge=False)
    for generate in (True, False):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, ROWS, generate=generate, progress=failing)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(param.grad is None and param.requires_grad for param in model.parameters())
    assert torch.is_grad_enabled()


def test_measures_are_the_same_on_every_device(device):
    tokenizer = word_tokenizer()
    model = memorizing_model(tokenizer)
    on_cpu = evaluate(model, tokenizer, ROWS, rouge=False).means
    assert evaluate(model.to(device), tokenizer, ROWS, rouge=False).means == pytest.approx(on_cpu, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: evaluate(m, t, []), "There is no row to evaluate, expected at least one"),
        (lambda m, t: score_answers(m, []), "There is no example to score"),
        (lambda m, t: generate_answers(m, t, []), "There is no example to answer"),
        (lambda m, t: evaluate(m, t, ROWS, batch_size=0), "batch_size is 0, expected a whole number >= 1"),
        (lambda m, t: evaluate(m, t, ROWS, max_new_tokens=0), "max_new_tokens is 0"),
    ],
)
def test_empty_sets_and_sizes_below_one_are_refused(call, message):
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=message):
        call(tiny_model(tokenizer), tokenizer)


# Means


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8))
def test_the_harmonic_mean_lies_between_the_least_and_the_arithmetic_mean(values):
    slack = 1e-9
    assert min(values) - slack <= harmonic_mean(values) <= mean(values) + slack
    assert harmonic_mean([*values, 0.0]) == 0
    assert harmonic_mean(values[:1] * 3) == pytest.approx(values[0])


@pytest.mark.parametrize("values", [[], [0.5, -0.1], [float("nan")]])
def test_the_harmonic_mean_of_anything_else_is_refused(values):
    with pytest.raises(ValueError, match=r"The values are \[.*\], expected at least one, each >= 0"):
        harmonic_mean(values)


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no value to average, expected at least one"):
        Scores({"em": ()}).means  # noqa: B018
