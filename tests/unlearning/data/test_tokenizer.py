"""A tokenizer is what lies beside its model, and padding takes a token that it has."""

from __future__ import annotations

import pytest

from tests.language import ROWS, tiny_model, word_tokenizer
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.tokenizer import load_tokenizer, pad_id


def test_a_saved_tokenizer_is_loaded_from_the_model_folder(tmp_path):
    tokenizer = word_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert encode(ROWS, load_tokenizer(tmp_path)) == encode(ROWS, tokenizer)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_model_without_a_tokenizer_is_refused(tmp_path, family):
    tiny_model(word_tokenizer(), family).save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match=r"tokenizer .*, expected a model folder .* tokenizer\.save_pretrained"
    ) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_padding_uses_the_pad_token_then_the_end_token_then_zero():
    tokenizer = word_tokenizer()
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0
