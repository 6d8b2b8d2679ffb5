"""ScoredSequence: one sequence without padding, and its scored positions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_simu._checks import problem
from torch_simu.curvature import IGNORED


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSequence:
    """One sequence and its samples; tokens after the last sample's prefix are left out.

    Attributes:
        ids: Token ids. Shape: `(length,)`.
        queries: Last position of each sample's prefix, ascending; the last one is `length - 1`.
            Shape: `(num_samples,)`.
        targets: The token that each prefix should be followed by. Shape: `(num_samples,)`.
    """

    ids: Tensor
    queries: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def num_samples(self) -> int:
        """How many samples the sequence has."""
        return self.queries.numel()


def collect_sequences(batches: Iterable[Mapping[str, Tensor]]) -> list[ScoredSequence]:
    """Read the sequences of all batches, drop padding and sequences without a sample, sort by length.

    Raises:
        ValueError: If there is no batch or no scored position, or a batch is malformed.
        TypeError: If a batch is not a mapping of whole-number tensors.
        KeyError: If `input_ids` or `labels` is missing.
    """
    sequences: list[ScoredSequence] = []
    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007 (the number of batches is read below)
        sequences.extend(_sequences_of(batch))
    if count == 0:
        raise ValueError(problem("There are 0 batches", "at least one", "Is `batches` an iterator that is used up?"))
    if not sequences:
        wrong = f"None of the labels in {count} batches is scored"
        raise ValueError(problem(wrong, "at least one label other than -100 after a row's first token"))
    return sorted(sequences, key=len)


def data_hash(sequences: Iterable[ScoredSequence]) -> str:
    """Return the sha256 of all samples; the same for any batching, padding side and amount of padding."""
    digests = []
    for sequence in sequences:
        digest = hashlib.sha256()
        for part in (sequence.ids, sequence.queries, sequence.targets):
            digest.update(f"{part.numel()}:".encode())
            digest.update(part.numpy().tobytes())
        digests.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _sequences_of(batch: Mapping[str, Tensor]) -> Iterable[ScoredSequence]:
    ids, labels, mask = _checked(batch)
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        kept = row_mask.nonzero()[:, 0]
        if kept.numel() == 0:
            continue
        if kept[-1] - kept[0] + 1 != kept.numel():
            raise ValueError(problem(f"attention_mask has a hole in {row_mask.tolist()}", "padding on one side only"))
        targets = row_labels[kept]
        # The first token has no prefix, so its label is never scored (as in transformers).
        scored = (targets[1:] != IGNORED).nonzero()[:, 0]
        if scored.numel():
            yield ScoredSequence(row_ids[kept][: int(scored[-1]) + 1], scored, targets[1:][scored])


def _checked(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(batch, Mapping):
        expected = "a mapping with input_ids, labels and perhaps attention_mask"
        raise TypeError(problem(f"A batch is of type {type(batch).__name__}", expected))
    parts: dict[str, Tensor] = {}
    for name in ("input_ids", "labels", "attention_mask"):
        part = batch.get(name)
        if part is None:
            if name != "attention_mask":
                raise KeyError(problem(f"A batch has no {name!r}, only {list(batch)}", "input_ids and labels"))
            part = torch.ones_like(parts["input_ids"])
        if not isinstance(part, Tensor) or part.is_floating_point() or part.is_complex():
            kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(problem(f"{name} is of type {kind}", "a tensor of whole numbers"))
        parts[name] = part.detach().to("cpu", torch.int64)
    ids, labels, mask = parts["input_ids"], parts["labels"], parts["attention_mask"]
    if ids.dim() != 2 or labels.shape != ids.shape or mask.shape != ids.shape:
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
        raise ValueError(problem(f"The shapes are {shapes}", "the same (batch, length) for all"))
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(problem(f"attention_mask holds {sorted(set(mask.flatten().tolist()))}", "0 and 1 only"))
    if (wrong := labels[(labels < 0) & (labels != IGNORED)]).numel():
        raise ValueError(problem(f"labels hold {int(wrong[0])}", "token ids, or -100 where nothing is scored"))
    if ((labels != IGNORED) & (mask == 0)).any():
        raise ValueError(problem("labels score padding", "-100 wherever attention_mask is 0"))
    return ids, labels, mask
