"""PaddedSequences: sequences of similar length side by side, for methods that scale all positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from torch_simu.attribution.methods.budget import Chunks
from torch_simu.attribution.methods.call import device_of
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence


@dataclass(frozen=True, slots=True, eq=False)
class PaddedSequences:
    """Sequences padded on the right, which a causal model's earlier positions never see.

    Attributes:
        ids: Token ids, 0 at padding. Shape: `(num_sequences, length)`.
        row: Row of each sample. Shape: `(num_samples,)`.
        query: Last position of each sample's prefix. Shape: `(num_samples,)`.
        targets: Shape: `(num_samples,)`.
        chunks: How many path points fit into one pass.
    """

    ids: Tensor
    row: Tensor
    query: Tensor
    targets: Tensor
    chunks: Chunks

    def values(self, model: nn.Module, streams: int, path: Path) -> Tensor:
        """Return F of each stream and sample. Shape: `(streams, num_samples)`."""
        logits = model(input_ids=self.ids.repeat(streams, 1), use_cache=False).logits
        return path.values(logits.reshape(streams, *self.ids.shape, -1)[:, self.row, self.query], self.targets)


def padded_sequences(
    model: nn.Module, sequences: Sequence[ScoredSequence], steps: int, memory: Memory
) -> Iterator[PaddedSequences]:
    """Yield the sequences in groups that fit into one pass with as many path points as possible."""
    device = device_of(model)
    tokens = memory.tokens
    longest = max(map(len, sequences))
    size = max(1, tokens // (steps * longest))
    for start in range(0, len(sequences), size):
        group = sequences[start : start + size]
        index = torch.arange(len(group)).repeat_interleave(torch.tensor([sequence.num_samples for sequence in group]))
        yield PaddedSequences(
            pad_sequence([sequence.ids for sequence in group], batch_first=True).to(device),
            index.to(device),
            torch.cat([sequence.queries for sequence in group]).to(device),
            torch.cat([sequence.targets for sequence in group]).to(device),
            Chunks(max(1, min(steps + 2, tokens // (len(group) * longest))), 1),
        )
