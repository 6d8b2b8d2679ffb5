"""Rows load or fail in one line with their place; of an encoded row the answer alone is scored."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.language import CHAT, ROWS, merging_tokenizer, word_tokenizer
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import encode, render
from torch_simu.unlearning.data.rows import Row, check_disjoint, load_rows, rows_from_records

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


def write(folder, content, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Loading


@pytest.mark.parametrize("fields", [("question", "answer"), ("prompt", "response"), ("input", "output")])
def test_each_layout_of_fields_is_read_and_the_other_fields_are_kept(tmp_path, fields):
    record = {fields[0]: "q", fields[1]: "a", "id": 7, "perturbed_answer": ["b", "c"]}
    (row,) = load_rows(write(tmp_path, json.dumps(record)))
    assert (row.question, row.answer) == ("q", "a")
    assert row.extra == {"id": 7, "perturbed_answer": ["b", "c"]}
    assert row.raw == (fields[0] == "input")


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_whatever_text_is_written_is_read_back_with_its_line(tmp_path_factory, pairs, as_list, escaped):
    records = [{"question": question, "answer": answer} for question, answer in pairs]
    lines = [json.dumps(record, ensure_ascii=escaped) for record in records]
    content = "[" + ",\n".join(lines) + "]" if as_list else "\n".join(lines)
    rows = load_rows(write(tmp_path_factory.mktemp("rows"), content))
    assert [(row.question, row.answer) for row in rows] == pairs
    assert [row.line for row in rows] == list(range(1, len(pairs) + 1))


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_keep_their_numbers(tmp_path):
    content = '\ufeff{"question": "q", "answer": "a"}\r\n\r\n{"question": "r", "answer": "b"}\r\n'
    rows = load_rows(str(write(tmp_path, content, "rows.json")))
    assert [row.line for row in rows] == [1, 3]
    assert rows[1].place.endswith("rows.json:3")


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    (row,) = load_rows(write(tmp_path, '{"question": "q\u2028r\x85s", "answer": "a"}'))
    assert row.question == "q\u2028r\x85s"


def test_rows_are_values(tmp_path):
    path = write(tmp_path, '{"question": "q", "answer": "a", "id": 1}')
    assert load_rows(path) == load_rows(path)
    assert len({*load_rows(path), *load_rows(path)}) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"question": "q", "answer": "a"}\n\n{"question": \n',
            r"rows.jsonl:3: broken JSON \(Expecting value at column",
        ),
        ('[{"question": "q", "answer": "a"},\n {"question" 1}]', r"rows.jsonl:2: broken JSON .* one JSON list\.$"),
        ("[" * 100_000, r"rows.jsonl:1: (JSON nested too deeply|broken JSON)"),
        (
            '{"question": "q", "answer": "a"}\n[1, 2]',
            r"rows.jsonl:2: the row is of type list, expected an object with ",
        ),
        ("[3]", r"rows.jsonl:1: the row is of type int"),
        (
            '{"quest": "q", "answer": "a"}',
            r"rows.jsonl:1: the fields are 'quest', 'answer', expected question/answer or p",
        ),
        ("{}", r"rows.jsonl:1: the fields are none, expected question/answer or prompt/response or input/output"),
        ('{"question": "q", "answer": " "}', r"rows.jsonl:1: the answer is empty \(' '\), expected some text"),
        ('{"question": "", "answer": "a"}', r"rows.jsonl:1: the question is empty"),
        ('{"question": "q", "answer": 5}', r"rows.jsonl:1: the answer is 5 of type int, expected text"),
        ("", r"rows.jsonl: the set is empty, expected at least one row"),
        ("[]", r"rows.jsonl: the set is empty"),
        (
            b'{"question": "q", "answer": "a"}\n{"question": "\xe9"}',
            r"rows.jsonl:2: byte 0xe9 is not UTF-8, expected .* iconv",
        ),
    ],
)
def test_a_broken_file_is_refused_in_one_line_with_its_place(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl: the file does not exist, expected a JSON or JSON Lines file"):
        load_rows(str(tmp_path / "no.jsonl"))
    with pytest.raises(DataError, match="the file is a folder"):
        load_rows(str(tmp_path))
    with pytest.raises(DataError, match="rows: the file does not exist"):
        load_rows("rows")


def test_records_that_are_empty_are_refused():
    with pytest.raises(DataError, match="records: the set is empty"):
        rows_from_records([])


@pytest.mark.parametrize(
    ("name", "asked"),
    [("a/b", ("a/b", None, "train")), ("a/b:c", ("a/b", "c", "train")), ("a/b:c:test", ("a/b", "c", "test"))],
)
def test_a_data_set_is_named_with_its_configuration_and_split(monkeypatch, name, asked):
    def load_dataset(path, config, split):
        assert (path, config, split) == asked
        return [{"question": "q", "answer": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (row,) = load_rows(name)
    assert row.place == f"{name}:1"


def test_a_data_set_out_of_reach_is_refused_with_the_reason(monkeypatch):
    def load_dataset(path, config, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError, match=r"a/b: there is no such file, .* \(ConnectionError: no route\), expected"
    ) as caught:
        load_rows("a/b")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="The data set name is 'a::b', expected name, name:config"):
        load_rows("a::b")


def test_a_data_set_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"'datasets' is not installed, .* pip install datasets"):
        load_rows("a/b")


# Overlap


@given(st.lists(st.sampled_from("abcd"), max_size=5), st.lists(st.sampled_from("abcd"), max_size=5))
def test_sets_overlap_exactly_when_a_question_and_answer_are_in_both(forget, retain):
    forget_rows = [Row(f"Who  is {c}?", f"it is {c}", source="f", line=i) for i, c in enumerate(forget, 1)]
    retain_rows = [Row(f"who is {c.upper()}? ", f"It\tis {c}", source="r", line=i) for i, c in enumerate(retain, 1)]
    both = [c for c in forget if c in retain]
    if not both:
        check_disjoint(forget_rows, retain_rows)
        return
    places = f"f:{forget.index(both[0]) + 1} and r:{retain.index(both[0]) + 1} "
    with pytest.raises(DataError, match=rf"^{len(both)} rows? (is|are) in both .* {places}.*Remove each"):
        check_disjoint(forget_rows, retain_rows)


def test_the_same_question_with_another_answer_is_no_overlap():
    check_disjoint([Row("Who?", "Ada")], [Row("Who?", "Bob")])


# Encoding


@pytest.mark.parametrize("make", [word_tokenizer, merging_tokenizer])
def test_the_prompt_is_tokenized_as_if_alone_and_only_the_answer_and_the_end_are_scored(make):
    tokenizer = make()
    for row, example in zip(ROWS, encode(ROWS, tokenizer), strict=True):
        prompt, answer = render(row, tokenizer)
        assert list(example.prompt_ids) == tokenizer(prompt)["input_ids"]
        scored = [label for label in example.labels if label != -100]
        assert scored == list(example.input_ids[-len(scored) :])
        assert len(scored) == example.num_scored
        assert scored[-1] == tokenizer.eos_token_id
        decoded = tokenizer.decode(scored[:-1])
        assert decoded.replace(" ", "") == answer.replace(" ", "")


def test_a_tokenizer_that_merges_across_the_boundary_is_a_real_case():
    tokenizer = merging_tokenizer()
    prompt, answer = render(ROWS[0], tokenizer)
    alone, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    assert whole[: len(alone)] != alone


def test_raw_rows_have_no_template():
    row = Row("Ada lives in ", " Rome", raw=True)
    assert render(row, word_tokenizer(chat_template=CHAT)) == ("Ada lives in", " Rome")
    assert render(Row(" Who? ", "Ada\n"), word_tokenizer()) == ("Question: Who?\nAnswer:", " Ada")
    assert render(Row("Who?", "Ada"), word_tokenizer(), "raw") == ("Who?", " Ada")


def test_a_chat_template_is_used_with_its_space_before_the_answer_and_one_end_token():
    tokenizer = word_tokenizer(chat_template=CHAT, bos="<b>")
    assert render(ROWS[2], tokenizer) == ("<user>What does Ada grow ?<e><assistant>", " roses")
    (example,) = encode([ROWS[2]], tokenizer)
    assert [i for i in example.labels if i != -100] == [
        *tokenizer.convert_tokens_to_ids(["roses"]),
        tokenizer.eos_token_id,
    ]
    # The template writes its own special tokens.
    assert tokenizer.bos_token_id not in example.input_ids


def test_a_chat_template_that_rewrites_the_prompt_or_the_answer_still_gives_both():
    thinking = CHAT.replace("{% if m['role'] == 'assistant' %} {% endif %}", "<think></think>")
    assert render(ROWS[2], word_tokenizer(chat_template=thinking))[1] == "roses"


def test_a_missing_chat_template_or_an_unknown_template_is_refused():
    with pytest.raises(DataError, match=r"no chat template, expected one for template='chat'"):
        render(ROWS[0], word_tokenizer(), "chat")
    with pytest.raises(ValueError, match=r"template is 'chats', expected one of .* Did you mean 'chat'"):
        encode(ROWS, word_tokenizer(), template="chats")


def test_a_beginning_token_is_put_first_if_the_tokenizer_does_so():
    tokenizer = word_tokenizer(bos="<b>")
    for row, example in zip(ROWS, encode(ROWS, tokenizer, template="raw"), strict=True):
        assert tokenizer.decode(example.input_ids) == f"<b> {row.question} {row.answer} <e>"


def test_without_an_end_token_the_answer_alone_is_scored():
    (example,) = encode([ROWS[2]], word_tokenizer(eos=None))
    assert example.num_scored == 1


@given(st.sampled_from(ROWS), st.integers(1, 25), st.booleans())
def test_a_long_prompt_loses_its_beginning_and_the_answer_is_kept_or_refused(row, max_length, with_bos):
    tokenizer = word_tokenizer(bos="<b>" if with_bos else None)
    (full,) = encode([row], tokenizer)
    if full.num_scored + 1 + with_bos > max_length:
        with pytest.raises(
            DataError, match=rf"row:0: the answer takes {full.num_scored} tokens of max_length {max_length}, "
        ):
            encode([row], tokenizer, max_length=max_length)
        return
    (cut,) = encode([row], tokenizer, max_length=max_length)
    assert len(cut.input_ids) == min(max_length, len(full.input_ids))
    assert cut.input_ids[with_bos:] == full.input_ids[with_bos:][-(len(cut.input_ids) - with_bos) :]
    assert cut.input_ids[:with_bos] == full.input_ids[:with_bos]
    assert [label for label in cut.labels if label != -100] == [label for label in full.labels if label != -100]


class AdaTokenizer:
    """A tokenizer that drops all text but a final "Ada"."""

    chat_template = bos_token_id = cls_token_id = eos_token_id = None

    def __call__(self, text, **options):
        ids = [[5] if part.endswith("Ada") else [] for part in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def test_text_without_a_token_is_refused():
    with pytest.raises(DataError, match="row:0: the answer 'Bob' has no token, expected at least one"):
        encode([Row("Who? Ada", "Bob")], AdaTokenizer(), template="raw")
    with pytest.raises(DataError, match="row:0: the prompt 'Who' has no token, expected at least one"):
        encode([Row("Who", "Ada")], AdaTokenizer(), template="raw")


def test_no_rows_give_no_examples():
    assert encode([], word_tokenizer()) == []
