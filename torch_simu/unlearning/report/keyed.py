"""Keyed hash: which rows a report means, for who has the rows and the key, and for nobody else."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from torch_simu._checks import problem
from torch_simu._files import flush_to_disk
from torch_simu._temporary import temporary_beside
from torch_simu.unlearning.data.rows import Row

_DIGITS = 64


def keyed_hash(rows: Iterable[Row], key: str) -> str:
    """Return the HMAC-SHA256 of rows: the same for the same rows in any order, in a file of any format and name.

    Who has the hash alone can test no guess of the rows, as they could with a plain hash of few possible texts.

    Args:
        rows: What was asked to be forgotten, or kept. A row that is there twice counts twice.
        key: From `new_key` or `read_key`.

    Examples:
        >>> rows = [Row("Who wrote Emma?", "Jane Austen"), Row("Who wrote Faust?", "Goethe")]
        >>> keyed_hash(rows, "ab" * 32) == keyed_hash(rows[::-1], "ab" * 32) != keyed_hash(rows, "cd" * 32)
        True
    """
    lines = sorted(
        json.dumps([row.raw, [list(turn) for turn in row.turns], row.question, list(row.answers)]) for row in rows
    )
    return hmac.new(bytes.fromhex(key), "\n".join(lines).encode(), hashlib.sha256).hexdigest()


def new_key() -> str:
    """Return a random key: 64 hexadecimal digits."""
    return secrets.token_hex(_DIGITS // 2)


def read_key(path: str | Path) -> str:
    """Return the key in a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        text = ""
    if not re.fullmatch(rf"[0-9a-f]{{{_DIGITS}}}", text):
        wrong = f"File {str(path)!r} holds no key"
        raise ValueError(problem(wrong, f"{_DIGITS} hexadecimal digits", "Give another file; a new one gets a key."))
    return text


def write_key(path: str | Path, key: str) -> None:
    """Write a key to a file that only its owner may read, whole or not at all."""
    path = Path(path)
    with temporary_beside(path) as temporary:
        temporary.write_text(f"{key}\n", encoding="ascii")
        flush_to_disk(temporary)
        temporary.replace(path)
    flush_to_disk(path.parent)
