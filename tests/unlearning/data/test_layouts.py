"""Every known layout keeps all that is said in a record; what cannot be kept is refused, with its place."""

from __future__ import annotations

import pytest

from tests.language import word_tokenizer
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import encode, render
from torch_simu.unlearning.data.rows import Row, Turn, check_disjoint, rows_from_records

USER, ASSISTANT = {"role": "user", "content": "Who ?"}, {"role": "assistant", "content": "Bob"}


def only(record):
    (row,) = rows_from_records([record])
    return row


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "Translate.", "input": "cat", "output": "chat"}, "Translate.\n\ncat"),
        ({"instruction": "Name a fruit.", "input": "", "output": "Apple"}, "Name a fruit."),
        ({"instruction": "Name a fruit.", "input": None, "output": "Apple"}, "Name a fruit."),
        ({"instruction": "Name a fruit.", "output": "Apple"}, "Name a fruit."),
        ({"instruction": "Who?", "context": "Bob wrote.", "response": "Bob", "category": "qa"}, "Bob wrote.\n\nWho?"),
        ({"question": "Who?", "context": "Bob wrote.", "answer": "Bob"}, "Bob wrote.\n\nWho?"),
        ({"prompt": " Who? ", "context": " ", "response": "Bob"}, " Who? "),
    ],
)
def test_the_parts_of_a_prompt_are_joined(record, question):
    row = only(record)
    assert row.question == question and not row.raw
    assert set(row.extra) == set(record) & {"category"}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_is_a_turn_before_the_question(name):
    row = only({name: "Be brief.", "question": "Who?", "answer": "Bob"})
    assert row.turns == (Turn("system", "Be brief."),)
    assert render(row, word_tokenizer(), "question")[0] == "Be brief.\n\nQuestion: Who?\nAnswer:"
    assert render(row, word_tokenizer(), "raw")[0] == "Be brief.\n\nWho?"


def test_the_last_answer_of_a_conversation_is_scored_and_the_turns_before_are_its_prompt():
    turns = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Ada"}]
    row = only({"messages": [*turns, {"role": "user", "content": "And who else ?"}, ASSISTANT], "id": 3})
    assert (row.question, row.answer, row.extra) == ("And who else ?", "Bob", {"id": 3})
    assert [tuple(turn) for turn in row.turns] == [(turn["role"], turn["content"]) for turn in turns]
    expected = "Be brief.\n\nQuestion: Who ?\nAnswer: Ada\n\nQuestion: And who else ?\nAnswer:"
    assert render(row, word_tokenizer()) == (expected, " Bob")


def test_a_message_in_parts_is_their_text():
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "?"}]
    assert only({"messages": [{"role": "user", "content": parts}, ASSISTANT]}).question == "Who ?"


def test_a_text_is_scored_throughout():
    row = only({"text": "Ada lives in Rome", "url": "x"})
    assert row.is_text and row.extra == {"url": "x"}
    tokenizer = word_tokenizer()
    for template in ("auto", "question", "raw", "chat"):
        (example,) = encode([row], tokenizer, template=template)
        assert list(example.input_ids) == tokenizer("Ada lives in Rome")["input_ids"]
        # The first token cannot be predicted from anything.
        assert example.labels == (-100, *example.input_ids[1:])
    tokenizer = word_tokenizer(bos="<b>")
    (example,) = encode([row], tokenizer, max_length=5)
    assert list(example.input_ids) == tokenizer("Ada lives in Rome")["input_ids"]
    assert example.labels == (-100, *example.input_ids[1:]) and example.num_scored == 4
    with pytest.raises(DataError, match=r"the answer takes 4 tokens of max_length 4, .* Split the text"):
        encode([row], tokenizer, max_length=4)
    with pytest.raises(DataError, match="the text 'Ada' has one token, expected at least two"):
        encode([only({"text": "Ada"})], word_tokenizer())


def test_the_first_of_several_answers_is_scored_and_all_are_right():
    row = only({"question": "Who?", "answer": ["Bob", "Robert"]})
    assert (row.answer, row.alternatives, row.answers) == ("Bob", ("Robert",), ("Bob", "Robert"))
    assert only({"question": "Who?", "answer": ["Bob"]}).answers == ("Bob",)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "answer": "a", "instruction": "i"}, "the field 'instruction' stands beside ['question', 'a"),
        ({"question": "q", "answer": "a", "input": "i"}, "the field 'input' stands beside"),
        ({"question": "q", "answer": "a", "history": [["q", "a"]]}, "the field 'history' stands beside"),
        ({"question": "q", "answer": "a", "Context": "c"}, "the field 'Context' stands beside"),
        ({"question": "q", "answer": "a", "prompt": "p", "response": "r"}, "the field 'prompt' stands beside"),
        ({"text": "t", "system": "s"}, "the field 'system' stands beside ['text']"),
        ({"messages": [USER, ASSISTANT], "system": "s"}, "the field 'system' stands beside ['messages']"),
        ({"question": "q", "answer": "a", "context": 3}, "the context is 3 of type int, expected text"),
        ({"question": "q", "answer": []}, "the answer is [] of type list, expected text"),
        ({"question": "q", "answer": ["a", 3]}, "the other answer is 3 of type int, expected text"),
        ({"input": "", "output": "a"}, "the question is empty ('')"),
        ({"instruction": " ", "input": "x", "output": "a"}, "the instruction is empty (' ')"),
        ({"text": " "}, "the answer is empty"),
        ({"question": "Who is \ud83d?", "answer": "a"}, "the question has half a character, '\\ud83d', at 7, expected"),
        ({"question": "q", "answer": "\udc00"}, "the answer has half a character, '\\udc00', at 0"),
        ({"messages": "Who?"}, "messages is of type str, expected a list"),
        ({"messages": []}, "the messages end with [], expected a 'user' and then an 'assistant'"),
        ({"messages": [USER]}, "the messages end with ['user']"),
        ({"messages": [ASSISTANT, USER]}, "the messages end with ['assistant', 'user']"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "message 2 has role 'tool'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 is {'role': 'assistant'}, expected an object with"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, "message 2 has tool_calls, expected text alone"),
        ({"messages": [USER, {**ASSISTANT, "content": [{"type": "image"}]}]}, "message 2 has parts that are no text"),
        ({"messages": [USER, {**ASSISTANT, "content": None}]}, "the answer is None of type NoneType"),
        ({"messages": [USER, {**ASSISTANT, "content": " "}]}, "the answer is empty"),
    ],
)
def test_what_would_be_lost_is_refused_with_its_place(record, message):
    with pytest.raises(DataError) as caught:
        rows_from_records([{"question": "q", "answer": "a"}, record], "books.jsonl")
    assert str(caught.value).startswith("books.jsonl:2: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_field_of_a_prompt_loses_nothing():
    assert only({"question": "q", "answer": "a", "system": "", "instruction": None}).turns == ()


def test_rows_that_differ_in_their_context_or_turns_are_disjoint():
    one, other = ({"context": c, "question": "Who?", "answer": "Bob"} for c in ("Bob wrote.", "Ada wrote."))
    check_disjoint([only(one)], [only(other)])
    check_disjoint([Row("Who?", "Bob", turns=(Turn("system", "Be brief."),))], [Row("Who?", "Bob")])
    with pytest.raises(DataError, match=r"1 row is in both .* \('Ada lives in Rome'\)"):
        check_disjoint([only({"text": "Ada lives in Rome"})], [only({"text": "Ada lives  in rome"})])


def test_rows_that_share_one_of_several_answers_are_not_disjoint():
    one, other = (only({"question": "Who?", "answer": answers}) for answers in (["Bob", "Robert"], ["Rob", "robert"]))
    with pytest.raises(DataError, match="1 row is in both"):
        check_disjoint([one], [only({"question": "Who?", "answer": "Ada"}), other])
