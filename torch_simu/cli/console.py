"""Console: progress bars, tables and one-line errors for people at a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from torch_simu.unlearning.progress import Progress as ProgressCallback
from torch_simu.unlearning.report.report import Report, readable_bytes


def plain(text: object) -> str:
    r"""Return text with all that a terminal would act on as escapes: it may come from a file that others wrote.

    Examples:
        >>> print(plain("a\x1b[2J\u202eb\n"))
        a\x1b[2J\u202eb\n
    """
    shown = (each if each.isprintable() or unicodedata.category(each) == "Zs" else _escaped(each) for each in str(text))
    return "".join(shown)


def say(console: Console, text: object, *, style: str = "", soft_wrap: bool = False) -> None:
    """Print one line as it is, without reading markup in it, and without what a terminal would act on."""
    console.print(Text(plain(text), style=style), soft_wrap=soft_wrap)


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressCallback]:
    """Yield a progress callback that draws one bar per stage with its remaining time."""
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                for finished in bars.tasks:
                    # A run that stops early is complete, although not all of its steps were needed.
                    bars.update(finished.id, total=finished.completed)
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield tell


def show_report(console: Console, report: Report) -> None:
    """Print a report's table, 80 columns wide, and its notes; per set, EM, ES and probability stand in one cell."""
    table = Table(title=report.title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    sets = list(next(iter(report.methods.values())).sets)
    table.add_column("\nmethod", no_wrap=True)
    for name in sets:
        table.add_column(Text(f"{plain(name)}\nEM   ES   prob"), no_wrap=True)
    for title in ("weights\nchanged", "state\n", "\ns"):
        table.add_column(title, justify="right", no_wrap=True)
    for method, result in report.methods.items():
        cells = [" ".join(_four(result.sets[name][key]) for key in ("em", "es", "probability")) for name in sets]
        changed, state = f"{100 * result.changed_share:.3g} %", readable_bytes(result.optimizer_bytes)
        table.add_row(Text(plain(method)), *cells, changed, state, f"{result.seconds:.0f}")
    console.print(table)
    for note in report.notes:
        say(console, note, style="dim")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def show_text(console: Console, text: str) -> None:
    """Print a text of a file as it stands, without markup and colors."""
    console.print(text, markup=False, highlight=False, emoji=False, style="dim")


def _four(value: float) -> str:
    return f"{value:.2f}" if value >= 0.9995 else f"{value:.3f}"[1:]
