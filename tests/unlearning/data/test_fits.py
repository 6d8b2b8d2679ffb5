"""A row that the model cannot read is named before the work begins; rows that fit never exceed it together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.data.fits import check_fits, num_embeddings, num_positions
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics import generation
from torch_simu.unlearning.metrics.evaluate import evaluate
from torch_simu.unlearning.metrics.generation import generate_answers
from torch_simu.unlearning.metrics.scoring import score_answers


def learned(family, positions):
    """A model with few learned positions."""
    from transformers import AutoModelForCausalLM

    config = tiny_model(word_tokenizer(), family).config
    config.max_position_embeddings = positions
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config)


def test_learned_positions_end_and_computed_ones_do_not():
    assert num_positions(tiny_model(word_tokenizer(), "gpt2")) == 64
    assert num_positions(learned("opt", 20)) == 20
    assert num_positions(tiny_model(word_tokenizer())) is None
    assert num_positions(torch.nn.Linear(2, 2)) is None
    assert num_embeddings(torch.nn.Linear(2, 2)) is None
    assert num_embeddings(tiny_model(word_tokenizer())) == len(word_tokenizer())


def test_a_table_of_fixed_positions_ends_too():
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {"vocab_size": 9, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1, "rotary_dim": 4}
    model = GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=0, eos_token_id=0))
    assert num_positions(model) == 16
    with pytest.raises(DataError, match="example 0: the row takes 17 tokens and the model has 16 positions"):
        check_fits(model, [Example((1,) * 17, (-100,) + (1,) * 16)])


def test_a_model_that_reads_on_is_not_bounded():
    from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    falcon = FalconForCausalLM(FalconConfig(**sizes, **ends, alibi=True, max_position_embeddings=4))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2, **ends))
    for model in (falcon, bloom, tiny_model(word_tokenizer())):
        assert num_positions(model) is None
        assert len(score_answers(model, [Example((1,) * 30, (-100,) + (1,) * 29)])["nll"]) == 1


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=2, max_size=5), st.integers(1, 3))
def test_rows_that_fit_are_answered_and_none_depends_on_the_others(family, sizes, batch_size):
    tokenizer = word_tokenizer()
    model = learned(family, 20)
    made = [Example((5,) * p + (6,) * (a - 1) + (2,), (-100,) * p + (6,) * (a - 1) + (2,)) for p, a in sizes]
    fits = [example for example in made if len(example.input_ids) <= 20]
    if len(fits) < len(made):
        with pytest.raises(DataError, match=r"example \d: the row takes \d+ tokens and the model has 20 positions"):
            check_fits(model, made)
    if not fits:
        return
    longest = max(example.num_scored for example in fits)
    together = generate_answers(model, tokenizer, fits, batch_size=batch_size)
    alone = [generate_answers(model, tokenizer, [one], max_new_tokens=longest)[0] for one in fits]
    assert together == alone
    assert len(score_answers(model, fits, batch_size=batch_size)["nll"]) == len(fits)
    generate_answers(model, tokenizer, fits, batch_size=batch_size, max_new_tokens=50)


def test_the_law_fails_for_a_batch_that_generates_as_much_for_every_row(monkeypatch):
    pair = [Example((5,) * p + (6,) * a, (-100,) * p + (6,) * a) for p, a in ((18, 1), (1, 18))]
    assert len(generate_answers(learned("gpt2", 20), word_tokenizer(eos=None), pair)) == 2
    monkeypatch.setattr(generation, "num_positions", lambda model: None)
    with pytest.raises(IndexError):
        generate_answers(learned("gpt2", 20), word_tokenizer(eos=None), pair)


@pytest.mark.parametrize("work", [score_answers, lambda m, e: generate_answers(m, word_tokenizer(), e)])
def test_a_row_beyond_the_positions_is_named_with_its_line_and_the_cure(work):
    rows = [replace(ROWS[0], source="f.jsonl", line=1), Row("Who ? " * 40, "Bob", source="f.jsonl", line=2)]
    examples = encode(rows, word_tokenizer())
    with pytest.raises(DataError, match=r"^f\.jsonl:2: the row takes \d+ tokens .* 64 positions, .*max_length=64\.$"):
        work(tiny_model(word_tokenizer(), "gpt2"), examples)
    work(tiny_model(word_tokenizer(), "gpt2"), encode(rows, word_tokenizer(), max_length=64))


def test_an_id_beyond_the_embeddings_is_named_with_its_line_and_the_cure():
    model = tiny_model(word_tokenizer())
    beyond = Example((1, 999), (-100, 999), "f.jsonl:3")
    with pytest.raises(DataError, match=r"f\.jsonl:3: token id 999 is beyond the model's \d+ emb.*resize_token_embedd"):
        check_fits(model, [Example((1, 2), (-100, 2)), beyond])


def test_a_pad_token_beyond_the_embeddings_is_not_padded_with():
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer)
    plain = evaluate(model, tokenizer, ROWS, rouge=False)
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_id(tokenizer) >= num_embeddings(model) > pad_id(tokenizer, model)
    padded = evaluate(model, tokenizer, ROWS, rouge=False)
    for name in ("nll", "em", "es"):
        assert padded.values[name] == pytest.approx(plain.values[name], abs=1e-5)


def test_any_of_several_answers_is_right():
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer)
    rows = [Row(row.question, row.answer) for row in ROWS]
    said = evaluate(model, tokenizer, rows, max_new_tokens=9).generations
    several = [replace(row, alternatives=("nothing", text)) for row, text in zip(rows, said, strict=True) if text]
    scores = evaluate(model, tokenizer, several, max_new_tokens=9)
    assert scores.means["qa_exact_match"] == scores.means["qa_containment"] == scores.means["rouge_l_recall"] == 1
    first = evaluate(model, tokenizer, [replace(row, alternatives=()) for row in several], max_new_tokens=9)
    assert first.values["nll"] == scores.values["nll"] and first.means["qa_exact_match"] < 1
