"""Console: progress bars, tables and one-line errors for people at a terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from torch_simu.unlearning.attack.result import AttackResult
from torch_simu.unlearning.pilot.recommendation import Recommendation
from torch_simu.unlearning.progress import Progress as ProgressCallback
from torch_simu.unlearning.report.page import plain as plain
from torch_simu.unlearning.report.report import RELEARN, MethodResult, Report

_WIDTH = 80
_NAME = 20
_TRY = 34
_COST = len("20.1 MB")
_MEASURED = "EM   ES   prob"
_COSTS: Mapping[str, str] = MappingProxyType({"changed": "weights\nchanged", "state": "state", "seconds": "s"})
"""Column of `Report.costs` -> its title."""


def say(console: Console, text: object, *, style: str = "", soft_wrap: bool = False) -> None:
    """Print one line as it is, without reading markup in it, and without what a terminal would act on.

    Args:
        console: Where to.
        text: The line.
        style: Its color and weight, as rich names them.
        soft_wrap: Whether the terminal breaks a long line, and not this.
    """
    console.print(Text(plain(text), style=style), soft_wrap=soft_wrap)


_NOTICES: Mapping[str, str] = MappingProxyType(
    {
        "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
        "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    }
)
"""Logger of bitsandbytes -> how its notice begins: of each pass through a layer, and of a kernel it can do without."""


@contextmanager
def quiet_casts() -> Iterator[None]:
    """Silence what bitsandbytes says of every pass in 8 bits, thousands of lines between the bars, and nothing else."""

    def told(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOTICES[record.name])

    loggers = [logging.getLogger(name) for name in _NOTICES]
    for logger in loggers:
        logger.addFilter(told)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(told)


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressCallback]:
    """Yield a progress callback that draws one bar per stage on the console, with its remaining time."""
    columns = (
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        # Beside long names a note goes on below; otherwise the numbers would be cut.
        TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Task] = {}

        def tell(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                for finished in bars.tasks:
                    # A run that stops early is complete, although not all of its steps were needed.
                    bars.update(finished.id, total=finished.completed)
                bars.add_task(stage, total=total, note="")
                tasks[stage] = bars.tasks[-1]
            # Not by `update`, which forgets the speed with each new total: the expected end of a run moves.
            tasks[stage].total = total
            bars.update(tasks[stage].id, completed=done, note=note)

        yield tell


def show_report(console: Console, report: Report) -> None:
    """Print a report's table on the console, at most 80 columns wide, and its notes.

    Per set, EM, ES and prob. stand in one cell. Sets that do not fit beside each other get a table below the first.
    What no method knows has no column.
    """
    sets = list(next(iter(report.methods.values())).sets)
    for count in range(len(sets), 0, -1):
        parts = [sets[start : start + count] for start in range(0, len(sets), count)]
        tables = [_table(report, part, costs=part is parts[-1]) for part in parts]
        if all(console.measure(table).maximum <= _WIDTH for table in tables):
            break
    tables[0].title = Text(plain(report.title))
    for table in tables:
        console.print(table)
    for note in report.notes:
        say(console, note, style="dim")


def show_rows(console: Console, methods: Sequence[str]) -> Callable[[str, MethodResult], None]:
    """Return what prints a report's table line by line, the titles before the first.

    What it returns is called with a method and its result.

    Args:
        console: Where to.
        methods: The names of all methods, so that the columns are wide enough for each.
    """
    begun: list[str] = []

    def show(method: str, result: MethodResult) -> None:
        table = _table(Report("", 0, {method: result}), list(result.sets), costs=True)
        table.show_header = not begun
        table.columns[0].width = min(_NAME, max(map(len, methods)))
        for column in table.columns[1 + len(result.sets) :]:
            # The lines are tables of their own, which do not know of each other.
            column.min_width = _COST
        table.columns[-1].min_width = len("back")
        console.print(table)
        begun.append(method)

    return show


def show_attacks(console: Console, title: str, models: Mapping[str, Mapping[str, AttackResult]]) -> None:
    """Print what each attack came to, a line each: probability and ES of the scored rows, before and after.

    Args:
        console: Where to.
        title: Title of the table.
        models: Name -> what `attack_model` returned.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=Text(plain(title)))
    table.add_column("attack", vertical="bottom")
    for name in models:
        for when in ("before", "after"):
            table.add_column(Text(f"{plain(name)}\n{when}\nprob ES"), vertical="bottom")
    for attack in next(iter(models.values())):
        cells = []
        for results in models.values():
            found = results[attack]
            before = {"probability": found.before.probability, "es": found.before.es}
            after = None if found.skipped else found.worst
            cells += ["skipped" if each is None else _pair(each) for each in (before, after)]
        table.add_row(Text(plain(attack)), *cells)
    console.print(table)


def show_tries(console: Console, found: Recommendation) -> None:
    """Print on the console what a pilot found: a line for each try, the best marked; and what the run will take."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=Text("torch-simu recommend"))
    table.add_column("")
    table.add_column("try", max_width=_TRY, overflow="fold", vertical="bottom")
    for name in ("forget\nprob", "kept", "steps", "s"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("", max_width=_NAME, overflow="fold", vertical="bottom")
    for each in found.tries:
        figures = ["", ""] if each.failed else [_four(each.probability), f"{each.kept:.1%}"]
        note = "the best" if each is found.best else ("failed" if each.failed else each.note)
        mark = "*" if each is found.best else ""
        table.add_row(mark, Text(plain(each.name)), *figures, str(each.steps), f"{each.seconds:.0f}", note)
    console.print(table)
    for each in found.tries:
        if each.failed:
            say(console, f"{each.name} failed: {each.note}", style="dim")


def _pair(measures: Mapping[str, float]) -> str:
    return f"{_four(measures['probability'])} {_four(measures['es'])}"


def _table(report: Report, sets: list[str], *, costs: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", max_width=_NAME, overflow="fold", vertical="bottom")
    for name in sets:
        # A long name goes on below: cut, it could be that of another set.
        table.add_column(Text(f"{plain(name)}\n{_MEASURED}"), width=len(_MEASURED), overflow="fold", vertical="bottom")
    attacked = costs and RELEARN in report.attacks()
    # What comes back stands in place of the seconds: both do not fit beside three sets.
    known = [name for name in _COSTS if costs and name in report.costs() and not (attacked and name == "seconds")]
    for name in known:
        table.add_column(_COSTS[name], justify="right", no_wrap=True, vertical="bottom")
    if attacked:
        table.add_column("back", justify="right", no_wrap=True, vertical="bottom")
    for method, result in report.methods.items():
        cells = [
            " ".join(_four(result.sets[name][key]) for key in ("em", "es", "probability"))
            if name in result.sets
            else ""
            for name in sets
        ]
        found = result.costs()
        if result.seconds is not None:
            found["seconds"] = f"{result.seconds:.0f}"
        back = (result.attack or {}).get(RELEARN)
        ends = [] if not attacked else ["" if back is None else _four(back["probability"])]
        table.add_row(Text(plain(method)), *cells, *(found.get(name, "") for name in known), *ends)
    return table


def show_text(console: Console, text: str) -> None:
    """Print a text of a file on the console as it stands, without markup and colors."""
    console.print(text, markup=False, highlight=False, emoji=False, style="dim")


def _four(value: float) -> str:
    return f"{value:.2f}" if value >= 0.9995 else f"{value:.3f}"[1:]
