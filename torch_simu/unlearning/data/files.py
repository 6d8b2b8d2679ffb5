"""Files: numbered records from JSON, gzip and Parquet files, or from Hugging Face data sets."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from torch_simu._checks import problem
from torch_simu.unlearning.data.error import DataError

_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv", ".txt")
_EXPECTED = "a JSON or JSON Lines file (plain or gzip), a Parquet file, or a data set as name:config:split"
_ARCHIVES = ((b"PK\x03\x04", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


def read_records(source: str | Path) -> Iterable[tuple[int, object]]:
    r"""Return the numbered records of a file, or of a data set where no file has that name.

    Args:
        source: As in `torch_simu.unlearning.data.rows.load_rows`.

    Returns:
        Pairs of a number and a record: the line in a JSON Lines file, else the place in the list, counted from one.

    Raises:
        DataError: If the source cannot be read or holds something else; the message has the file and the line.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "rows.jsonl")
        ...     _ = path.write_text('{"text": "one"}\n\n{"text": "two"}')
        ...     list(read_records(path))
        [(1, {'text': 'one'}), (3, {'text': 'two'})]
    """
    path, name = Path(source), str(source)
    if path.is_file():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(problem(f"{name}: the file cannot be read ({error.strerror})", _EXPECTED)) from None
        return _parquet(path) if data[:4] == b"PAR1" else _json(_unpacked(data, name), name)
    looks_like_file = isinstance(source, Path) or path.is_dir() or name.endswith(_SUFFIXES)
    if looks_like_file or not ("/" in name or ":" in name):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(problem(f"{name}: the file {what}", _EXPECTED))
    return enumerate(_download(name), start=1)


def _unpacked(data: bytes, name: str) -> bytes:
    for magic, kind in _ARCHIVES:
        if data.startswith(magic):
            raise DataError(problem(f"{name}: the file is a {kind} archive", _EXPECTED, "Unpack it first."))
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(problem(f"{name}: the gzip file is damaged ({error})", "a whole one")) from None


def _parquet(path: Path) -> Iterable[tuple[int, object]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        wrong = f"{path}: the file is Parquet, and the package 'pyarrow' is not installed"
        advice = "Run: pip install pyarrow, or save the rows as JSON Lines."
        raise DataError(problem(wrong, "it, or JSON Lines", advice)) from None
    try:
        records = parquet.read_table(path).to_pylist()
    # Any exception: what a damaged file raises depends on where the damage is.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(problem(f"{path}: the Parquet file is damaged ({reason})", "a whole one")) from None
    return enumerate(records, start=1)


def _json(data: bytes, name: str) -> list[tuple[int, object]]:
    """Return the (number, record) pairs of JSON Lines or of a JSON list."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        wrong = f"{name}:{line}: byte {data[error.start]:#04x} is not UTF-8"
        advice = "Convert the file, for instance with iconv; rows in a binary format go through JSON Lines."
        raise DataError(problem(wrong, "UTF-8 text", advice)) from None
    if text.lstrip().startswith("["):
        return list(enumerate(cast("list[object]", _parse(text, name, 1)), start=1))
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse(line, name, number)) for number, line in lines if line.strip()]


def _parse(text: str, source: str, line: int) -> object:
    expected = "one JSON object a line, or one JSON list"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source}:{line + error.lineno - 1}"
        advice = "Save a table as JSON Lines: pandas.read_csv(path).to_json(new, orient='records', lines=True)."
        tables = source.lower().endswith((".csv", ".tsv"))
        wrong = f"{where}: broken JSON ({error.msg} at column {error.colno})"
        raise DataError(problem(wrong, expected, advice if tables else "")) from None
    except ValueError:
        raise DataError(problem(f"{source}:{line}: a number with too many digits", expected)) from None
    except RecursionError:
        raise DataError(problem(f"{source}:{line}: JSON nested too deeply", "one flat JSON object a line")) from None


def _download(name: str) -> Iterable[Mapping[str, object]]:
    """Load the records of the Hugging Face data set `name:config:split`."""
    parts = name.split(":")
    if len(parts) > 3 or not all(parts):
        raise DataError(problem(f"The data set name is {name!r}", "name, name:config or name:config:split"))
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        wrong = f"{name}: there is no such file, and the package 'datasets' is not installed"
        raise DataError(problem(wrong, "a file or a data set", "Run: pip install datasets")) from None
    config, split = (*parts[1:], None, None)[:2]
    try:
        return cast("Iterable[Mapping[str, object]]", datasets.load_dataset(parts[0], config, split=split or "train"))
    # Any exception: the network, the hub client and the data set's own files each raise classes of their own.
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        wrong = f"{name}: there is no such file, and the data set cannot be loaded ({reason})"
        raise DataError(problem(wrong, "a file or a data set within reach")) from error
