"""Progress: how a run tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the stage ("attribute" or "unlearn"), how much of it is done, of how much, and a short note."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Tell how far a stage is."""
        ...
