"""Budget: how long a pilot and each of its tries may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch_simu.unlearning.pilot.tries import Try

_FIRST_SHARE = 0.5
_PATIENCE = 2.0


class Budget:
    """Seconds of wall time, of which each try gets a share.

    Args:
        seconds: Of the whole pilot.
        clock: Tells the time in seconds.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - self._clock()

    def share(self, tries: Sequence[Try], *, open_tries: int) -> float:
        """Return how many seconds the next try gets: at least twice what the shortest took that reached the target.

        Half of what is left while none has.

        Args:
            tries: Those that were made.
            open_tries: How many may follow, the next one among them.
        """
        reached = [each.seconds for each in tries if each.reached]
        if not reached:
            return _FIRST_SHARE * self.left
        return min(self.left, max(_PATIENCE * min(reached), self.left / open_tries))

    def allows(self, tries: Sequence[Try]) -> bool:
        """Say whether another try behind these tries can be expected to end in time; the first is always made.

        It can where the shortest that reached the target would fit, or, while none did, one as long as the last.
        """
        if not tries:
            return True
        reached = [each.seconds for each in tries if each.reached]
        return self.left >= (min(reached) if reached else tries[-1].seconds)


def goes_on(elapsed: float, *, share: float, limit: float, expected: float | None) -> bool:
    """Say whether a try goes on: within its share always, beyond it where it will soon be at the target.

    Args:
        elapsed: Seconds since it began.
        share: Seconds that it gets.
        limit: Seconds that it must not take.
        expected: Seconds to the target, by how fast is forgotten; None: not known.

    Examples:
        >>> goes_on(50.0, share=40.0, limit=80.0, expected=20.0)
        True
        >>> goes_on(50.0, share=40.0, limit=80.0, expected=200.0)
        False
    """
    if elapsed >= limit:
        return False
    return elapsed < share or (expected is not None and elapsed + expected <= limit)
