"""Every teacher-forced measure equals a loop written from its definition and does not depend on the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.language import ROWS, tiny_model, word_tokenizer
from tests.strategies import generator, seeds
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.metrics.scoring import (
    evaluating,
    exact_memorization,
    extraction_strength,
    mean_nll,
    probability,
    score_answers,
    score_tokens,
)

FAMILIES = ["llama", "gpt2", "opt"]


def naive_scores(logits, labels):
    """The measures of one row from its definition: `logits` (length, vocabulary), `labels` a list of ids or -100."""
    log_probabilities, right = [], []
    for position in range(1, len(labels)):
        if labels[position] != -100:
            before = logits[position - 1].double()
            log_probabilities.append(float(before[labels[position]] - before.logsumexp(0)))
            right.append(int(before.argmax()) == labels[position])
    total = len(right)
    prefix = next(k for k in range(total + 1) if all(right[k:]))
    return {
        "nll": -sum(log_probabilities) / total,
        "probability": math.exp(sum(log_probabilities) / total),
        "em": sum(right) / total,
        "es": 1 - prefix / total,
    }


@st.composite
def logits_and_labels(draw):
    """Logits of a few tokens, so that some are right by chance, and labels with at least one scored in each row."""
    batch, length, vocabulary = draw(st.integers(1, 3)), draw(st.integers(2, 7)), draw(st.integers(1, 3))
    draws = generator(draw(seeds))
    logits = torch.randn(batch, length, vocabulary, generator=draws)
    labels = torch.randint(vocabulary, (batch, length), generator=draws)
    hidden = torch.rand(batch, length, generator=draws) < 0.4
    hidden[torch.arange(batch), torch.randint(1, length, (batch,), generator=draws)] = False
    return logits, labels.masked_fill(hidden, -100)


@given(logits_and_labels())
def test_the_teacher_forced_measures_equal_their_definitions(drawn):
    logits, labels = drawn
    tokens = score_tokens(logits, labels)
    measured = {
        "nll": mean_nll(tokens),
        "probability": probability(tokens),
        "em": exact_memorization(tokens),
        "es": extraction_strength(tokens),
    }
    for row in range(len(labels)):
        for name, value in naive_scores(logits[row], labels[row].tolist()).items():
            assert float(measured[name][row]) == pytest.approx(value, abs=1e-5), name


@given(logits_and_labels())
def test_measures_are_shares_and_extraction_never_exceeds_memorization(drawn):
    tokens = score_tokens(*drawn)
    em, es, sure = exact_memorization(tokens), extraction_strength(tokens), probability(tokens)
    assert all(bool(((share >= 0) & (share <= 1)).all()) for share in (em, es, sure))
    assert bool((es <= em).all())
    assert torch.equal(em == 1, es == 1)


@given(logits_and_labels())
def test_a_right_answer_scores_one_and_a_wrong_last_token_extracts_nothing(drawn):
    logits, labels = drawn
    vocabulary = logits.shape[-1]
    known = torch.nn.functional.one_hot(labels.roll(-1, 1).clamp(min=0), vocabulary) * 50.0
    tokens = score_tokens(known, labels)
    assert bool((exact_memorization(tokens) == 1).all() and (extraction_strength(tokens) == 1).all())
    if vocabulary > 1:
        last = [int((row != -100).nonzero().max()) for row in labels]
        for row, place in enumerate(last):
            known[row, place - 1] = known[row, place - 1].roll(1)
        assert bool((extraction_strength(score_tokens(known, labels)) == 0).all())


@given(logits_and_labels(), st.integers(1, 3))
def test_padding_changes_no_measure(drawn, extra):
    logits, labels = drawn
    padded_logits = torch.cat([logits, torch.zeros(len(logits), extra, logits.shape[-1])], 1)
    padded = score_tokens(padded_logits, torch.cat([labels, torch.full((len(labels), extra), -100)], 1))
    plain = score_tokens(logits, labels)
    for measure in (mean_nll, exact_memorization, extraction_strength):
        torch.testing.assert_close(measure(padded), measure(plain), rtol=0, atol=1e-6)


def test_half_precision_logits_are_scored_in_single_precision():
    logits = torch.tensor([[[0.0, 9.0], [9.0, 0.0]]], dtype=torch.bfloat16)
    assert mean_nll(score_tokens(logits, torch.tensor([[-100, 1]]))).item() == pytest.approx(
        math.log1p(math.exp(-9)), rel=1e-3
    )


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((2, 3, 4), [[-100, 1, 1], [1, -100, -100]], r"Rows \[1\] of the batch have no scored label, expected a label"),
        ((2, 4, 4), [[-100, 1, 1]], r"logits have shape \(2, 4, 4\) and labels \(1, 3\), expected"),
        ((2, 3), [[1, 1, 1]], r"logits have shape \(2, 3\)"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        score_tokens(torch.zeros(logits), torch.tensor(labels))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scores_of_a_batch_equal_those_of_each_row_alone(family, batch_size):
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer, family)
    examples = encode(ROWS, tokenizer)
    values = score_answers(model, examples, batch_size=batch_size, pad_id=0)
    for index, encoded in enumerate(examples):
        with evaluating(model):
            logits = model(torch.tensor([encoded.input_ids])).logits[0]
        for name, value in naive_scores(logits, list(encoded.labels)).items():
            assert values[name][index] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_only_logits_before_a_label_are_made(family):
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer, family)
    examples = encode(ROWS, tokenizer)
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: widths.append(logits.shape[1]))
    score_answers(model, examples, batch_size=1, pad_id=0)
    assert sorted(widths) == sorted(row.num_scored for row in examples)


def test_a_wrapper_that_does_not_say_what_it_passes_on_is_scored_the_same():
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer, "llama")
    examples = encode(ROWS, tokenizer)
    plain = score_answers(model, examples, batch_size=3, pad_id=0)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, *args, **kwargs):
            assert "logits_to_keep" not in kwargs
            return self.model(*args, **kwargs)

    wrapped = score_answers(Wrapper(), examples, batch_size=3, pad_id=0)
    assert wrapped == {name: pytest.approx(values, abs=1e-6) for name, values in plain.items()}
