"""Rows of TOFU and of LUME in sets: to forget, to keep, in no batch, and those that no model is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from torch_simu.unlearning.data.rows import Row, load_rows
from torch_simu.unlearning.metrics.lume import row_kind

Sets = Mapping[str, Sequence[Row]]
TAUGHT = ("forget", "retain", "near", "world")
"""The sets that a model has memorized; the others are only asked for."""


def tofu_rows(data: Path) -> Sets:
    """60 rows of three authors to forget, 140 to keep, 117 world facts, and 60 of authors that nobody teaches.

    The rows to forget are asked for in other words, too ("otherwise"), and have wrong answers beside the right one.
    """
    folder = data / "tofu" if (data / "tofu").exists() else data
    full = load_rows(folder / "full.jsonl")
    perturbed = load_rows(folder / "forget10_perturbed.jsonl")[:60]
    return {
        "forget": full[3600:3660],
        "retain": full[:140],
        "world": load_rows(folder / "world_facts.jsonl"),
        "otherwise": [replace(row, question=str(row.extra["paraphrased_question"])) for row in perturbed],
        "unseen": full[140:200],
        "options": perturbed,
    }


def lume_rows(data: Path) -> Sets:
    """The documents of LUME with the shortest answers, each a text to complete and questions about it.

    48 rows to forget, 96 to keep, 24 near ones in no batch, and 24 that nobody teaches, of stories (Task 1) and of
    invented people (Task 2) in each; and every second of TOFU's world facts.
    """
    theirs, ours = (documents(load_rows(data / "lume" / f"{name}.jsonl")) for name in ("forget", "retain"))
    found = {
        "forget": side_by_side([*islice(theirs["Task2"], 6), *islice(theirs["Task1"], 6)]),
        "unseen": side_by_side([*islice(theirs["Task2"], 3), *islice(theirs["Task1"], 3)]),
        "retain": side_by_side([*islice(ours["Task2"], 12), *islice(ours["Task1"], 12)]),
        "near": side_by_side([*islice(ours["Task2"], 3), *islice(ours["Task1"], 3)]),
    }
    return {**found, "world": load_rows(data / "tofu" / "world_facts.jsonl")[::2]}


ROWS: Mapping[str, Callable[[Path], Sets]] = {"tofu": tofu_rows, "lume": lume_rows}
"""Target -> its sets, from a folder that holds `tofu` and `lume`."""


def documents(rows: Sequence[Row]) -> dict[str, islice[Sequence[Row]]]:
    """Task -> its documents, those with short answers first, each drawn once: the rows whose ids begin alike."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        row_kind(row)
        found.setdefault(str(row.extra["task"]), {}).setdefault(str(row.extra["id"])[:-3], []).append(row)
    return {
        task: islice(sorted(of_task.values(), key=lambda each: max(len(row.answer) for row in each)), None)
        for task, of_task in found.items()
    }


def side_by_side(found: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of documents, three documents at a time: each third row is of every third document.

    So an attacker who is shown each third row is shown no fact of the documents that are scored.
    """
    threes = (found[start : start + 3] for start in range(0, len(found), 3))
    return [row for three in threes for rows in zip(*three, strict=True) for row in rows]


def tokenizer_of(sets: Sets) -> PreTrainedTokenizerFast:
    """Byte-level pairs (BPE) learned from what a model is taught."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"{row.question} {row.answer}" for name in TAUGHT for row in sets.get(name, ())]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
