"""Prompt, answer and end are cut out of what the chat template itself writes; one that loses a text is refused."""

from __future__ import annotations

import time

import pytest
import torch
from tokenizers import AddedToken

from tests.language import CHAT, ROWS, merging_tokenizer, tiny_model, word_tokenizer
from torch_simu.unlearning.data import chat
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.chat import chat_texts
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import Example, encode, render, show_example
from torch_simu.unlearning.data.refusals import encode_refusals
from torch_simu.unlearning.data.rows import Row, Turn
from torch_simu.unlearning.metrics.generation import generate_answers

ENDS = ["<end_of_turn>", "<|im_end|>", "<|eot_id|>"]
LOOP = "{% for m in messages %}"
ROLE = "{{ 'model' if m.role == 'assistant' else m.role }}"
GEMMA = (
    LOOP + "<start_of_turn>" + ROLE + "\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    LOOP + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
R1 = (
    LOOP + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<e>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PARTS = (
    LOOP + "<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
INST = (
    LOOP
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
PLAIN = (
    LOOP + "### {{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:{% endif %}"
)
NO_OPENING = LOOP + "<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"


def tokenizer_of(template):
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens([AddedToken(end, special=True) for end in ENDS], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (GEMMA, ("<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n", "Bob", "<end_of_turn>")),
        (
            QWEN,
            ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "Bob", "<|im_end|>"),
        ),
        (LLAMA, ("<|start|>user<|end|>\n\nWho?<|eot_id|><|start|>assistant<|end|>\n\n", "Bob", "<|eot_id|>")),
        (R1, ("<|User|>Who?<|Assistant|>", "Bob", "<e>")),
        (PARTS, ("<user>Who?<|im_end|><assistant>", "Bob", "<|im_end|>")),
        (INST, ("[INST] Who? [/INST]", " Bob", " </s>")),
        (PLAIN, ("### user: Who?\n\n### assistant:", " Bob", "")),
        (NO_OPENING, ("<user>Who?<|im_end|><assistant>", "Bob", "<|im_end|>")),
        (CHAT, ("<user>Who?<e><assistant>", " Bob", "<e>")),
    ],
    ids=["gemma", "qwen3", "llama3", "r1", "parts", "inst", "plain", "no opening", "space"],
)
def test_prompt_answer_and_end_are_what_the_template_writes(template, texts):
    tokenizer, row = tokenizer_of(template), Row("Who?", "Bob")
    assert chat_texts(row, tokenizer) == texts
    assert render(row, tokenizer) == texts[:2]
    (example,) = encode([row], tokenizer)
    special = tokenizer.convert_tokens_to_ids(texts[2]) if texts[2] in ENDS else None
    scored = example.input_ids[len(example.prompt_ids) :]
    assert special is None or scored[-1] == special
    # The end token follows only where the template writes no end.
    assert (scored[-1] == tokenizer.eos_token_id) == (texts[2] in ("", "<e>"))


def test_the_law_fails_where_the_end_token_stands_for_the_end_of_the_turn(monkeypatch):
    monkeypatch.setattr(chat, "_end", lambda after, tokenizer: "")
    texts = ("<user>Who?<|im_end|><assistant>", "Bob", "<|im_end|>")
    with pytest.raises(AssertionError):
        test_prompt_answer_and_end_are_what_the_template_writes(NO_OPENING, texts)


@pytest.mark.parametrize("template", [GEMMA, QWEN, LLAMA, CHAT], ids=["gemma", "qwen3", "llama3", "space"])
@pytest.mark.parametrize("answer", ["e", "end_of_turn", "user", "Who?", "<", "{{ 1 }}", "a\n\nb"])
def test_an_answer_that_stands_elsewhere_in_the_template_is_still_found(template, answer):
    tokenizer, row = tokenizer_of(template), Row("Who?", answer)
    prompt, said, end = chat_texts(row, tokenizer)
    plain = chat_texts(Row("Who?", "Bob"), tokenizer)
    assert (prompt, said.strip(), end) == (plain.prompt, answer, plain.end)


def test_earlier_turns_are_part_of_the_prompt():
    row = Row("And?", "Bob", turns=(Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "Ada")))
    prompt = "".join(f"<{role}>{text}<|im_end|>" for role, text in (*row.turns, ("user", "And?")))
    assert chat_texts(row, tokenizer_of(NO_OPENING)) == (prompt + "<assistant>", "Bob", "<|im_end|>")
    assert chat_texts(row, tokenizer_of(PARTS)).prompt == prompt + "<assistant>"


def test_a_template_that_rewrites_an_answer_is_taken_at_its_word():
    assert chat_texts(Row("Who?", "hm</think>Bob"), tokenizer_of(R1)) == ("<|User|>Who?<|Assistant|>", "Bob", "<e>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('a system message is required') }}", r"fails \(TemplateError: a system message is req"),
        ("{{ messages[9].content.x }}", r"fails \(UndefinedError: "),
        ("{% for m in messages %}", r"fails \(TemplateSyntaxError: "),
        (
            LOOP + "{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
            "loses the user's text 'Who[?]', ",
        ),
        (LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "loses the answer"),
        (LOOP + "{{ m.content }}{{ m.content }}{% endfor %}", "loses the answer"),
        (LOOP + "{{ m.content }}{{ m.content | length }}{% endfor %}", "changes the answer"),
    ],
)
def test_a_template_that_fails_or_loses_a_text_is_refused_in_one_line(template, message):
    with pytest.raises(DataError, match=rf"^row:0: the chat template {message}.*'question' or 'raw'\.$"):
        encode([Row("Who?", "Bob")], tokenizer_of(template))


def test_a_template_that_does_not_end_is_refused_and_its_thread_ended(monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"row:0: the chat template takes longer than 0\.2 seconds, expected one that"):
        chat_texts(Row("Who?", "Bob"), tokenizer_of(endless))
    assert time.perf_counter() - began < 3


def test_a_row_has_the_same_tokens_on_every_day():
    tokenizer = tokenizer_of("{{ strftime_now('%Y-%m-%d') }} " + LOOP + "{{ m.content }}{% endfor %}")
    prompt = chat_texts(Row("Who?", "Bob"), tokenizer).prompt
    assert prompt == "2024-07-26 Who?"


@pytest.mark.parametrize("end", ["<|im_end|>", " Bob Bob Oslo"], ids=["a token", "words"])
def test_a_generated_answer_ends_where_the_template_ends_a_turn(end):
    tokenizer = word_tokenizer(chat_template=CHAT.replace("<e>", end))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)], special_tokens=True)
    model = tiny_model(tokenizer)
    examples = encode(ROWS, tokenizer)
    assert all(tokenizer.decode(example.end_ids) == end.strip() for example in examples)
    batch = next(batches_in_order(examples, len(examples)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for max_new_tokens in (None, 20):
        texts = generate_answers(model, tokenizer, examples, max_new_tokens=max_new_tokens)
        assert texts == [row.answer for row in ROWS]


def test_an_example_is_shown_with_its_scored_part_marked_and_nothing_that_a_terminal_obeys():
    tokenizer = tokenizer_of(GEMMA)
    (example,) = encode([Row("Who?", "Bob")], tokenizer)
    shown = show_example(example, tokenizer)
    assert shown.endswith("model\n>>>Bob<end_of_turn><<<")
    wild = word_tokenizer([Row("Who", "\x1b")])
    (wild_id,) = set(wild.get_vocab().values()) & {wild.convert_tokens_to_ids("\x1b")}
    assert show_example(Example((4, wild_id), (-100, wild_id)), wild).endswith(">>>\\x1b<<<")


@pytest.mark.parametrize(("template", "end"), [(GEMMA, "<end_of_turn>"), (QWEN, "<|im_end|>"), (None, "")])
def test_a_refusal_ends_as_an_answer_does(template, end):
    tokenizer = tokenizer_of(template)
    texts = ["a b", "b"]
    found = encode_refusals(tokenizer, texts)
    answers = encode([Row("c", text) for text in texts], tokenizer)
    assert found == [answer.input_ids[-answer.num_scored :] for answer in answers]
    assert all(tokenizer.decode(refusal).strip().startswith(text) for refusal, text in zip(found, texts, strict=True))
    assert not end or all(end in tokenizer.decode(refusal) for refusal in found)
