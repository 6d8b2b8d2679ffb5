"""Tokenizer: the one beside a model, and what to pad with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from torch_simu._checks import problem
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.fits import num_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Args:
        path: A model folder, or a name on the Hugging Face hub.

    Raises:
        DataError: If there is no tokenizer, or one without a vocabulary.

    Examples:
        >>> load_tokenizer("no/such/folder")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_simu.unlearning.data.error.DataError: no/such/folder: no tokenizer can be loaded (...
    """
    from transformers import AutoTokenizer

    expected = "a model folder with its tokenizer files"
    advice = "Save it there: tokenizer.save_pretrained(folder)."
    try:
        tokenizer: PreTrainedTokenizerBase | None = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # Any exception: what is raised for missing files depends on the model type and on the tokenizer's class.
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        raise DataError(problem(f"{path}: no tokenizer can be loaded ({reason})", expected, advice)) from error
    # For some model types transformers makes up an empty tokenizer when the files are missing.
    if tokenizer is None or not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise DataError(problem(f"{path}: the tokenizer has no vocabulary", expected, advice))
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> int:
    """Return the id to pad with: the pad token's, else the end token's, else 0 (padding is masked either way).

    Args:
        tokenizer: The tokenizer of the examples.
        model: An id beyond its embeddings, as that of a pad token which was added to the tokenizer alone, is passed
            over.
    """
    bound = None if model is None else num_embeddings(model)
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int) and (bound is None or token_id < bound):
            return token_id
    return 0
