"""How many path points and queries one forward and backward pass may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")


@dataclass(slots=True)
class Chunks:
    """How many path points and queries go through one pass; halved, points first, where memory runs out.

    Args:
        points: Path points at most.
        queries: Queries at most.

    Examples:
        >>> list(Chunks(2, 5).run(lambda points, queries: (points.start, points.stop), 3, 4))
        [(0, 2), (2, 3)]
    """

    points: int
    queries: int

    def run(self, one: Callable[[slice, slice], Result], num_points: int, num_queries: int) -> Iterator[Result]:
        """Yield what `one` returns for ranges of points and queries that together cover all.

        Raises:
            torch.OutOfMemoryError: If memory runs out with one point and one query.
        """
        blocks = [(slice(0, num_points), slice(0, num_queries))]
        while blocks:
            points, queries = blocks.pop()
            if points.stop - points.start > self.points:
                blocks += [(slice(points.start + self.points, points.stop), queries)]
                blocks += [(slice(points.start, points.start + self.points), queries)]
            elif queries.stop - queries.start > self.queries:
                blocks += [(points, slice(queries.start + self.queries, queries.stop))]
                blocks += [(points, slice(queries.start, queries.start + self.queries))]
            elif (result := self._tried(one, points, queries)) is None:
                blocks.append((points, queries))
            else:
                yield result

    def _tried(self, one: Callable[[slice, slice], Result], points: slice, queries: slice) -> Result | None:
        try:
            return one(points, queries)
        except torch.OutOfMemoryError:
            sizes = points.stop - points.start, queries.stop - queries.start
            if sizes == (1, 1):
                raise
            if sizes[0] > 1:
                self.points = sizes[0] // 2
            else:
                self.queries = sizes[1] // 2
            return None


def chunk_sizes(budget: int, steps: int, queries: int, per_stream: int, per_token: int) -> tuple[int, int]:
    """Return how many path points and queries go through one pass.

    Args:
        budget: Bytes for one pass.
        steps: Path points wanted.
        queries: Queries wanted.
        per_stream: Bytes per path point, whatever the number of queries.
        per_token: Bytes per path point and query.

    Examples:
        >>> chunk_sizes(1000, steps=10, queries=8, per_stream=100, per_token=10)
        (5, 8)
        >>> chunk_sizes(1000, steps=10, queries=80, per_stream=0, per_token=10)
        (10, 10)
        >>> chunk_sizes(1, steps=10, queries=8, per_stream=100, per_token=10)
        (1, 1)
    """
    streams = max(1, min(steps, budget // 2 // max(1, per_stream)))
    streams = max(1, min(streams, budget // max(1, per_token)))
    left = max(budget // 2, budget - streams * per_stream)
    return streams, max(1, min(queries, left // max(1, streams * per_token)))
