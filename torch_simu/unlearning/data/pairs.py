"""Pairs: a forget row beside a retain row, as one item of a dataset, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor
from torch.utils.data import Dataset

from torch_simu._checks import check_count, problem
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example, collate


class Pair(NamedTuple):
    """One item of `ForgetRetainPairs`."""

    forget: Example
    retain: Example


class ForgetRetainPairs(Dataset[Pair]):
    """A dataset of one forget row and one retain row per item, which depends on the seed and the index alone.

    Taken in order, the forget rows (and likewise the retain rows) are one shuffled pass over their set after another:
    the streams that `torch_simu.unlearning.driver.unlearn` draws from with the same seed. So a batch of items has as
    many forget rows as retain rows, and any sampler and any number of workers or processes may read it.

    Args:
        forget: Encoded rows to forget. At least one.
        retain: Encoded rows to keep. At least one.
        seed: What the order depends on.
        num_pairs: How many items there are; None: as many as the larger set has rows, so that none is left out.

    Raises:
        ValueError: If a set is empty, or `num_pairs` is not positive.

    Examples:
        >>> forget, retain = ([Example((5, i), (-100, i)) for i in ids] for ids in ([1, 2], [3, 4, 5, 6]))
        >>> pairs = ForgetRetainPairs(forget, retain)
        >>> sorted(pair.forget.labels[1] for pair in pairs), sorted(pair.retain.labels[1] for pair in pairs)
        ([1, 1, 2, 2], [3, 4, 5, 6])
    """

    def __init__(
        self, forget: Sequence[Example], retain: Sequence[Example], *, seed: int = 0, num_pairs: int | None = None
    ) -> None:
        for name, examples in (("forget", forget), ("retain", retain)):
            if not examples:
                raise ValueError(problem(f"The {name} set is empty", "at least one example"))
        longest = max(len(forget), len(retain))
        self._length = longest if num_pairs is None else check_count("num_pairs", num_pairs)
        # Batches of one row are the stream itself.
        self._forget, self._retain = Batches(forget, 1, 3 * seed), Batches(retain, 1, 3 * seed + 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        """Return item `index`, counted from 0.

        Raises:
            IndexError: If there is no such item.
        """
        if not 0 <= index < self._length:
            raise IndexError(problem(f"index is {index}", f"0 <= index < {self._length}"))
        return Pair(*(rows.examples[rows.indices(index)[0]] for rows in (self._forget, self._retain)))


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Make batches of pairs, or of plain examples (for an evaluation).

    Args:
        pad_id: The token id to pad with.

    Examples:
        >>> batch = PairCollator()([Pair(Example((5, 6), (-100, 6)), Example((7, 8, 9), (-100, 8, 9)))])
        >>> batch["forget"]["input_ids"].shape, batch["retain"]["input_ids"].shape
        (torch.Size([1, 2]), torch.Size([1, 3]))
    """

    pad_id: int = 0

    def __call__(self, rows: Sequence[Pair] | Sequence[Example]) -> dict[str, dict[str, Tensor]] | dict[str, Tensor]:
        """Return the batches under "forget" and "retain"; for plain examples, their batch as `collate` makes it.

        Raises:
            TypeError: If a row is neither a `Pair` nor an `Example`.
        """
        kinds = {type(row) for row in rows}
        if kinds == {Pair}:
            pairs = cast("Sequence[Pair]", rows)
            return {name: collate([getattr(pair, name) for pair in pairs], self.pad_id) for name in Pair._fields}
        if kinds == {Example}:
            return collate(cast("Sequence[Example]", rows), self.pad_id)
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise TypeError(problem(f"The batch holds {found}", "Pair or Example", "Take rows of a ForgetRetainPairs."))
