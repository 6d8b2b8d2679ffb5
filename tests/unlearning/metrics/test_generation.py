"""A generated text equals a greedy loop over one prompt, whatever stands beside it; texts compare by their words."""

from __future__ import annotations

import logging
import re
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.language import ROWS, memorizing_model, tiny_model, word_tokenizer
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.evaluate import evaluate
from torch_simu.unlearning.metrics.generation import (
    contains_answer,
    equals_answer,
    generate_answers,
    normalized,
    rouge_l_recall,
)
from torch_simu.unlearning.metrics.scoring import (
    evaluating,
)

FAMILIES = ["llama", "gpt2", "opt"]
words = st.lists(st.sampled_from(["roses", "rose", "running", "ran", "the", "a", "Oslo", "peas"]), max_size=8).map(
    " ".join
)


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
    word = tokenizer.convert_tokens_to_ids("roses")
    own = {
        **{"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "num_beams": 3, "min_length": 30},
        **{"forced_eos_token_id": word, "suppress_tokens": list(range(3, 12)), "begin_suppress_tokens": [4, 5]},
        **{"bad_words_ids": [[word]], "sequence_bias": [[[word], 50.0]], "stop_strings": ["roses"], "max_time": 1e-9},
        **{"guidance_scale": 3.0, "no_repeat_ngram_size": 1, "typical_p": 0.1, "encoder_repetition_penalty": 3.0},
        **{"penalty_alpha": 0.9, "num_return_sequences": 2, "use_cache": False, "return_dict_in_generate": True},
    }
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
