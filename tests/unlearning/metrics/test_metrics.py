"""Every measure equals a loop written from its definition, does not depend on the batch, and leaves the model alone."""

from __future__ import annotations

import logging
import math
import re
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.language import ROWS, memorizing_model, merging_tokenizer, tiny_model, word_tokenizer
from tests.strategies import generator, seeds
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.evaluate import Scores, evaluate, harmonic_mean, mean
from torch_simu.unlearning.metrics.generation import (
    contains_answer,
    equals_answer,
    generate_answers,
    normalized,
    rouge_l_recall,
)
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
words = st.lists(st.sampled_from(["roses", "rose", "running", "ran", "the", "a", "Oslo", "peas"]), max_size=8).map(
    " ".join
)


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


def naive_answer(model, tokenizer, prompt_ids, max_new_tokens):
    """The greedy answer to one prompt, one whole forward for each token."""
    ids, answer = list(prompt_ids), []
    with evaluating(model):
        for _ in range(max_new_tokens):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            answer.append(token)
    kept = [token for token in answer if token in (tokenizer.unk_token_id, *range(3, len(tokenizer)))]
    return tokenizer.decode(kept).strip()


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


# Teacher-forced measures


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


# Generation


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_batch_of_answers_equals_one_greedy_loop_for_each_prompt(family, batch_size):
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer, family, seed=1)
    examples = encode(ROWS, tokenizer)
    answers = generate_answers(model, tokenizer, examples, max_new_tokens=7, batch_size=batch_size)
    assert answers == [naive_answer(model, tokenizer, example.prompt_ids, 7) for example in examples]
    assert len(set(answers)) > 1


def test_generation_is_greedy_whatever_the_model_says_of_itself():
    tokenizer = word_tokenizer()
    model, plain = tiny_model(tokenizer), tiny_model(tokenizer)
    examples = encode(ROWS, tokenizer)
    own = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "num_beams": 3, "min_length": 30}
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    assert generate_answers(model, tokenizer, examples) == generate_answers(plain, tokenizer, examples)
    assert model.generation_config.to_dict() == before


def test_generation_raises_no_warning(caplog):
    tokenizer = word_tokenizer()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        generate_answers(tiny_model(tokenizer), tokenizer, encode(ROWS, tokenizer))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_an_answer_ends_at_the_end_token_of_the_model_too():
    tokenizer = word_tokenizer(bos="<b>")
    model = memorizing_model(tokenizer)
    # The word after "Ada", made a special token, ends the answer; as a plain word it does not.
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("lives")]
    assert generate_answers(model, tokenizer, encode(ROWS[:1], tokenizer)) == ["Ada lives in Rome ."]
    tokenizer.add_special_tokens({"additional_special_tokens": ["lives"]})
    assert generate_answers(model, tokenizer, encode(ROWS[:1], tokenizer)) == ["Ada"]


def test_without_an_end_token_a_text_is_cut_at_the_length_of_its_answer():
    tokenizer = word_tokenizer(eos=None)
    model = memorizing_model(tokenizer)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("Rome")
    assert evaluate(model, tokenizer, ROWS, rouge=False).means["qa_exact_match"] == 1
    longer = generate_answers(model, tokenizer, encode(ROWS, tokenizer), max_new_tokens=12)
    assert all(len(text.split()) > len(row.answer.split()) for text, row in zip(longer, ROWS, strict=True))


def test_an_unknown_word_is_kept_in_the_text():
    rows = [Row("Who ?", "Eve Rome")]
    tokenizer = word_tokenizer()
    model = memorizing_model(tokenizer, rows)
    scores = evaluate(model, tokenizer, rows, rouge=False)
    assert scores.generations == ("<u> Rome",)
    assert scores.means["qa_exact_match"] == 0


# Texts


@given(st.text(max_size=20))
def test_normalizing_is_idempotent_and_blind_to_case_and_space(text):
    assert normalized(normalized(text)) == normalized(text)
    assert normalized(f"  {text}\n") == normalized(text)


@given(words, words.filter(bool), words)
@example("roses", "rose", "")
def test_an_answer_is_contained_where_its_words_stand_together(before, answer, after):
    whole = f"{before} {answer} {after}"
    assert contains_answer(whole, answer)
    assert equals_answer(whole, answer) == (whole.split() == answer.split())
    parts, inner = whole.lower().split(), answer.lower().split()
    assert contains_answer(before, answer) == any(
        before.lower().split()[start : start + len(inner)] == inner for start in range(len(parts) + 1)
    )


def test_texts_without_words_compare_by_their_characters():
    assert equals_answer(" ?! ", "?!")
    assert not equals_answer("?", "!")


@given(words, words)
def test_rouge_is_the_share_of_the_answer_in_the_longest_common_subsequence(text, answer):
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem
    left, right = ([stem(w) if len(w) > 3 else w for w in re.findall("[a-z0-9]+", t.lower())] for t in (text, answer))

    def common(i, j):
        if i == len(left) or j == len(right):
            return 0
        return 1 + common(i + 1, j + 1) if left[i] == right[j] else max(common(i + 1, j), common(i, j + 1))

    expected = common(0, 0) / len(right) if left and right else 0.0
    assert rouge_l_recall([text], [answer]) == pytest.approx([expected])


def test_rouge_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"'rouge-score' is not installed, expected it for ROUGE-L. Run: pip install"):
        rouge_l_recall(["a"], ["a"])


# All together


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
