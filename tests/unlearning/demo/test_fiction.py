"""Fiction is the same for the same seed, its sets are disjoint, and no single token tells whom to forget."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.strategies import seeds
from torch_simu.unlearning.demo.fiction import make_corpus, make_tokenizer


@given(seeds)
def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(seed):
    assert make_corpus(seed) == make_corpus(seed)
    assert make_corpus(seed) != make_corpus(seed + 1)


@given(seeds)
def test_sizes_are_those_promised_and_questions_are_unique(seed):
    corpus = make_corpus(seed)
    questions = [row["question"] for part in (corpus.forget, corpus.retain, corpus.world) for row in part]
    assert len(set(questions)) == len(questions) == 80 + 240 + 108


@given(seeds)
def test_every_word_of_a_forget_question_is_in_a_retain_question(seed):
    corpus = make_corpus(seed)
    forget, retain = (
        {word for row in part for word in row["question"].split()} for part in (corpus.forget, corpus.retain)
    )
    assert forget <= retain


@given(seeds)
def test_forget_people_have_a_topic_of_their_own_unless_the_share_is_a_half(seed):
    def share_of_retain_words(topic_share):
        corpus = make_corpus(seed, topic_share=topic_share)
        forget, retain = (
            {word for row in part for word in row["answer"].split()} for part in (corpus.forget, corpus.retain)
        )
        return len(forget & retain) / len(forget | retain)

    # Little more than the words of the frame; some words of the other region; most words.
    assert (
        share_of_retain_words(1.0) < 0.1 < 0.25 < share_of_retain_words(0.95) < 0.5 < 0.65 < share_of_retain_words(0.5)
    )


@given(seeds)
def test_the_tokenizer_knows_every_word_and_decodes_what_it_encodes(seed):
    corpus = make_corpus(seed, num_forget=4, num_places=3)
    texts = [text for part in (corpus.forget, corpus.retain, corpus.world) for row in part for text in row.values()]
    tokenizer = make_tokenizer(texts)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_forget": 33}, "num_forget is 33, expected at most 32"),
        ({"num_forget": 3, "retain_per_forget": 3}, "retain_per_forget is 3, expected less than 3"),
        ({"num_forget": 4, "num_places": 33}, "num_places is 33, expected at most 32"),
        ({"num_places": 0}, "num_places is 0"),
        ({"topic_share": 1.5}, "topic_share is 1.5"),
    ],
)
def test_sizes_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_corpus(0, **options)


def test_a_tokenizer_of_no_text_is_refused():
    with pytest.raises(ValueError, match="texts holds no word"):
        make_tokenizer(["", " "])
