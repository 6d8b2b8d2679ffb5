"""Progress: how a job tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with a stage ("unlearn", say), how much of it is done, of how much, and a short note."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Tell how far a stage is."""
        ...


def part_of(
    progress: Progress | None, stage: str | None = None, before: int = 0, total: int | None = None
) -> Progress | None:
    """Return what a part of a longer job tells, told as that job.

    Args:
        progress: Whom the job tells.
        stage: The job's stage, in place of the part's own; None: that.
        before: How much of the job is done when the part starts.
        total: How much there is in the job, in place of the part's own; None: that.

    Examples:
        >>> def tell(stage, done, total, note=""):
        ...     print(f"{stage}: {done}/{total}")
        >>> part_of(tell, "evaluate", before=10, total=30)("score", 5, 20)
        evaluate: 15/30
    """
    if progress is None:
        return None
    name, whole = stage, total

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        progress(name or stage, before + done, total if whole is None else whole, note)

    return tell
