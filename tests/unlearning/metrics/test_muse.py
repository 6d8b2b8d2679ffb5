"""MUSE: each measure equals a loop made from its definition, and the suite adds them up on rows of one's own."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.language import ROWS, memorizing_model, tiny_model, word_tokenizer
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.generation import rouge_l_f1
from torch_simu.unlearning.metrics.membership import membership_auc
from torch_simu.unlearning.metrics.muse import answer_part, muse_suite, privacy_leakage
from torch_simu.unlearning.metrics.scoring import mean_nll, min_k_log_probability, score_answers, score_tokens

TEXTS = [
    Row("", "Ada lives in Rome and grows tall green beans", raw=True),
    Row("Bob lives in", "the old town of Oslo", raw=True),
]
SETS = {
    "forget": [*TEXTS, *ROWS[:2]],
    "retain": ROWS[2:4],
    "unseen": [Row("", "the mayor is older and lives in Oslo", raw=True), ROWS[4], ROWS[5]],
}


def tokens_of(seed: int):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 8, 5, generator=draw)
    labels = torch.randint(0, 5, (3, 8), generator=draw)
    labels[torch.rand(3, 8, generator=draw) < 0.4] = -100
    labels[:, 5] = 1
    return logits, labels


# Min-K%


@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_min_k_is_the_mean_of_the_least_probable_labels(seed, share):
    logits, labels = tokens_of(seed)
    found = min_k_log_probability(score_tokens(logits, labels), share)
    for row, value in enumerate(found.tolist()):
        places = [place for place in range(1, 8) if labels[row, place] != -100]
        logs = sorted(logits[row, place - 1].log_softmax(-1)[labels[row, place]].item() for place in places)
        # One exact product of the two numbers that the measure multiplies, in the same precision.
        count = max(1, int(torch.tensor(len(logs)) * share))
        assert value == pytest.approx(sum(logs[:count]) / count, abs=1e-5)


@given(st.integers(0, 2**31))
def test_of_all_labels_min_k_is_the_mean(seed):
    tokens = score_tokens(*tokens_of(seed))
    torch.testing.assert_close(min_k_log_probability(tokens, 1.0), -mean_nll(tokens))


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_out_of_bounds_is_refused(share):
    with pytest.raises(ValueError, match="share is "):
        min_k_log_probability(score_tokens(*tokens_of(0)), share)


def test_a_measure_of_ones_own_is_scored_row_by_row():
    tokenizer = word_tokenizer()
    model, examples = tiny_model(tokenizer), encode(ROWS, tokenizer)
    found = score_answers(model, examples, batch_size=2, measures={"own": lambda tokens: 2 * mean_nll(tokens)})
    assert found == {"own": pytest.approx([2 * value for value in score_answers(model, examples)["nll"]], rel=1e-5)}


# ROUGE-L F1 and PrivLeak


@pytest.mark.parametrize(
    ("said", "answer", "expected"),
    [
        # Three of four words are shared, three of six: 2 * (3/4 * 3/6) / (3/4 + 3/6).
        ("the cat sat down", "the old cat sat over there", 0.6),
        ("roses", "roses", 1.0),
        # Not stemmed, so that two forms of a word are two words.
        ("novels", "novel", 0.0),
        ("", "novel", 0.0),
    ],
)
def test_rouge_l_f1_by_hand(said, answer, expected):
    assert rouge_l_f1([said], [answer]) == [pytest.approx(expected)]
    assert rouge_l_f1([answer], [said]) == [pytest.approx(expected)]


def test_the_leakage_is_below_zero_where_forget_rows_stand_out_as_learned():
    learned, unlearned, unseen = [-0.1, -0.2], [-9.0, -8.0], [-3.0, -4.0]
    retrained = membership_auc(unseen, [-2.5, -3.5])
    assert retrained == 0.25
    assert privacy_leakage(membership_auc(unseen, learned), retrained) == -1.0
    assert privacy_leakage(membership_auc(unseen, unlearned), retrained) == 3.0
    assert privacy_leakage(0.5, 0.0) is None


def test_an_answer_ends_where_another_question_begins():
    assert answer_part("in Rome Question: Who?\n\nNobody") == "in Rome "
    assert answer_part("in Rome\nand Oslo") == "in Rome\nand Oslo"


# The suite


def test_a_model_that_knows_all_by_heart_leaks_all_and_says_all():
    tokenizer = word_tokenizer([*ROWS, *TEXTS])
    model = memorizing_model(tokenizer, [*SETS["forget"], *SETS["retain"]])
    found = muse_suite(model, tokenizer, SETS, reference=0.5, batch_size=3)
    assert found == {"verbmem": 1.0, "knowmem_forget": 1.0, "knowmem_retain": 1.0, "min_k_auc": 0.0, "privleak": -1.0}


def test_the_suite_equals_a_loop_over_rows():
    tokenizer = word_tokenizer([*ROWS, *TEXTS])
    model = memorizing_model(tokenizer, SETS["forget"], steps=15)
    found = json.loads(json.dumps(muse_suite(model, tokenizer, SETS, batch_size=2, max_new_tokens=6)))

    def said(ids, limit):
        ids, start = list(ids), len(ids)
        while len(ids) < start + limit:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        return tokenizer.decode(ids[start:], skip_special_tokens=True)

    model.eval()
    with torch.no_grad():
        whole = tokenizer(TEXTS[0].answer)["input_ids"]
        prompt = tokenizer(TEXTS[1].question)["input_ids"]
        # No more than the text itself has left.
        texts = [(said(whole[:4], 5), tokenizer.decode(whole[4:])), (said(prompt, 5), TEXTS[1].answer)]
        questions = {
            name: [
                (said(example.prompt_ids, 6), row.answer)
                for row, example in zip(SETS[name], encode(SETS[name], tokenizer), strict=True)
                if not row.raw
            ]
            for name in ("forget", "retain")
        }
    for name, pairs in {"verbmem": texts, **{f"knowmem_{name}": each for name, each in questions.items()}}.items():
        values = rouge_l_f1(*zip(*pairs, strict=True))
        assert found[name] == pytest.approx(sum(values) / len(values))
    likely = {
        name: score_answers(model, encode(SETS[name], tokenizer), measures={"it": min_k_log_probability})["it"]
        for name in ("forget", "unseen")
    }
    assert found["min_k_auc"] == pytest.approx(membership_auc(likely["unseen"], likely["forget"]))
    assert found["verbmem"] > 0 and found["privleak"] is None


def test_what_there_are_no_rows_for_is_none_and_all_rows_are_counted():
    tokenizer, calls = word_tokenizer(), []
    sets = {"forget": ROWS[:2], "retain": ROWS[2:4], "unseen": ROWS[4:]}
    model = tiny_model(tokenizer)
    found = muse_suite(
        model, tokenizer, sets, max_new_tokens=1, batch_size=4, progress=lambda *call: calls.append(call)
    )
    assert found["verbmem"] is None and found["knowmem_forget"] is not None
    assert calls == [("muse", done, 8, "") for done in (4, 6, 8)]


def test_the_suite_wants_its_three_sets():
    with pytest.raises(ValueError, match=r"The sets have .* rows, expected some in each of \['forget', 'retain', 'un"):
        muse_suite(torch.nn.Identity(), word_tokenizer(), {name: SETS[name] for name in ("forget", "retain")})
