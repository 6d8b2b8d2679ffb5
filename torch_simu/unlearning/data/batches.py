"""Batches: shuffled streams that any step can be resumed from, and single passes in order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from torch_simu._checks import check_count, problem
from torch_simu.unlearning.data.examples import Example, collate


@dataclass(frozen=True, slots=True)
class Batches:
    """An endless stream of shuffled batches in which batch `i` depends on the seed and `i` alone.

    So a run resumes bit-exactly at any step, without a state to save. The stream is one permutation of the examples
    after another, cut into batches of equal size; a batch may reach into the next permutation, and no example is
    left out.

    Args:
        examples: What is drawn. At least one.
        batch_size: Examples per batch; may exceed their number.
        seed: What the permutations depend on.
        pad_id: The token id to pad with.

    Raises:
        ValueError: If there is no example or `batch_size` is not positive.

    Examples:
        >>> examples = [Example((5, i), (-100, i)) for i in range(3)]
        >>> batches = Batches(examples, batch_size=2, seed=0)
        >>> sorted(batches.indices(0) + batches.indices(1) + batches.indices(2))
        [0, 0, 1, 1, 2, 2]
        >>> batches.batch(7)["input_ids"].shape
        torch.Size([2, 2])
    """

    examples: Sequence[Example]
    batch_size: int
    seed: int = 0
    pad_id: int = 0

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        if not self.examples:
            raise ValueError(problem("There is no example to draw", "at least one"))

    @property
    def steps_per_epoch(self) -> int:
        """How many batches it takes until each example was drawn at least once."""
        return -(-len(self.examples) // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """Return the places in `examples` of those in batch `step`, counted from 0."""
        check_count("step", step, low=0)
        count = len(self.examples)
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        first, last = start // count, (stop - 1) // count
        drawn: list[int] = []
        for epoch in range(first, last + 1):
            begun = epoch * count
            drawn += _permutation(count, self.seed, epoch)[max(start - begun, 0) : stop - begun]
        return drawn

    def rows(self, step: int) -> list[Example]:
        """Return the examples of batch `step`, counted from 0."""
        return [self.examples[index] for index in self.indices(step)]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return batch `step`, counted from 0, as `collate` does."""
        return collate(self.rows(step), self.pad_id)


def batches_in_order(examples: Sequence[Example], batch_size: int, pad_id: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield each example once, in order, in batches as `collate` pads them with `pad_id`.

    Each has `batch_size` rows, but the last may be smaller.

    Examples:
        >>> examples = [Example((5, i), (-100, i)) for i in range(3)]
        >>> [len(batch["labels"]) for batch in batches_in_order(examples, 2)]
        [2, 1]
    """
    check_count("batch_size", batch_size)
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], pad_id)


def evenly(examples: Sequence[Example], most: int) -> Sequence[Example]:
    """Return at most so many examples, evenly spread over all of them.

    Examples:
        >>> evenly(range(10), 4)
        [0, 2, 5, 7]
        >>> evenly([7, 8], 4)
        [7, 8]
    """
    check_count("most", most)
    count = len(examples)
    return examples if count <= most else [examples[place * count // most] for place in range(most)]


def batches_of_similar_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group indices into batches of `batch_size` with little padding, the longest first: lack of memory shows at once.

    Examples:
        >>> batches_of_similar_length([1, 9, 2, 8], 2)
        [[1, 3], [2, 0]]
    """
    check_count("batch_size", batch_size)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# A step asks for three streams, each of which may be at the border of two permutations. The stream stays a value: what
# is kept here follows from the arguments alone.
@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Seeded with text, which Python hashes with SHA-512: neighboring seeds and epochs share nothing.
    return tuple(random.Random(f"{seed} {epoch}").sample(range(count), count))
