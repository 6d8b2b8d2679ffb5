"""Bars: how far a job of many stages is, as two bars on a terminal, and as lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from torch_simu.cli.console import say
from torch_simu.unlearning.progress import Progress as ProgressCallback

_SECONDS = 10.0
"""Between two lines of one stage."""


class _StageTime(TimeRemainingColumn):
    """The time that a stage has left; that of the whole, whose parts differ, is in its note."""

    def render(self, task: Task) -> Text:
        return Text("") if task.fields["whole"] else super().render(task)


@contextmanager
def staged(console: Console, whole: str) -> Iterator[ProgressCallback]:
    """Yield a progress callback that shows one stage at a time, below the bar of the whole.

    On a terminal these are bars, which go when the block ends; where standard error is none, it gets a line for each
    stage that is complete, and one every ten seconds of a longer one.

    Args:
        console: Where results are printed; the bars are there too, if it is a terminal.
        whole: The stage that is the whole job. It has a bar of its own, and no line.
    """
    errors = Console(stderr=True)
    if not _draws(errors):
        yield _lines(errors, whole)
        return
    columns = (
        # It moves where nothing else does.
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        _StageTime(compact=True, table_column=Column(no_wrap=True)),
        # Beside long names a note goes on below; otherwise the numbers would be cut.
        TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
    )
    with Progress(*columns, console=console if _draws(console) else errors, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                for old in [name for name in tasks if name != whole and stage != whole]:
                    bars.remove_task(tasks.pop(old))
                tasks[stage] = bars.add_task(stage, total=total, note=note, whole=stage == whole)
            (task,) = (each for each in bars.tasks if each.id == tasks[stage])
            # Not by `update`, which forgets the speed with each new total: the expected end of a run moves.
            task.total = total
            bars.update(tasks[stage], completed=done, note=note)

        yield tell


def _draws(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _lines(console: Console, whole: str) -> ProgressCallback:
    last = ""
    complete = False
    when = time.monotonic()

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal last, complete, when
        now, again = time.monotonic(), stage == last
        if not again:
            last, complete, when = stage, False, now
        if stage == whole or complete or (done < total and now - when < _SECONDS):
            return
        complete, when = done >= total, now
        say(console, f"{stage}: {done} of {total}{note and f', {note}'}", soft_wrap=True)

    return tell
