"""Error: the one kind that data, rows and tokenizers raise."""

from __future__ import annotations


class DataError(ValueError):
    """What is wrong with a data file, a row or a tokenizer, in one line with its place."""
