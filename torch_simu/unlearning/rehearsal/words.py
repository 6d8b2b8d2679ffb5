"""Words of prompts: which of them tell what is asked about, and which runs of them only some rows have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from torch_simu._checks import check_number
from torch_simu.unlearning.data.examples import Example

Ids = tuple[int, ...]


def common_ids(prompts: Sequence[Ids], *, share: float = 0.2) -> frozenset[int]:
    """Return the token ids that are in more than a share of the prompts: they say how is asked, not about what.

    Args:
        prompts: Token ids.
        share: In [0, 1].

    Examples:
        >>> sorted(common_ids([(1, 7, 2), (1, 8, 2), (1, 9)], share=0.5))
        [1, 2]
    """
    check_number("share", share, high=1.0)
    counts = Counter(token for prompt in prompts for token in set(prompt))
    return frozenset(token for token, count in counts.items() if count > share * len(prompts))


def runs(rows: Iterable[Example], length: int) -> frozenset[Ids]:
    """Return every run of so many tokens that a row has, prompt and answer together.

    Args:
        rows: Encoded rows.
        length: Tokens of a run.

    Examples:
        >>> sorted(runs([Example((1, 2, 3), (-100, 2, 3))], 2))
        [(1, 2), (2, 3)]
    """
    return frozenset(
        row.input_ids[start : start + length] for row in rows for start in range(len(row.input_ids) - length + 1)
    )


def cut_behind(ids: Sequence[int], ends: Collection[Ids]) -> int:
    """Return how many tokens there are up to the first end and with it; all of them where none ends.

    Args:
        ids: Token ids of a text.
        ends: What ends a text: one or several token ids each.

    Examples:
        >>> cut_behind([5, 6, 0, 7], {(0,)})
        3
    """
    for stop in range(1, len(ids) + 1):
        if any(tuple(ids[max(0, stop - len(end)) : stop]) == end for end in ends):
            return stop
    return len(ids)
