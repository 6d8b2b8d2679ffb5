"""demo: the command, and what it shows while it works."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from torch_simu.cli.bars import staged
from torch_simu.cli.commands import options
from torch_simu.cli.console import say, show_rows
from torch_simu.unlearning.report.folder import check_writable, locked, whole_folder
from torch_simu.unlearning.report.plots import check_plots
from torch_simu.unlearning.report.report import MethodResult
from torch_simu.unlearning.report.runs import RESULTS, finished_models

_WHOLE = "models"


def demo(out: options.Out = Path("simu-demo"), seed: options.Seed = 0, force: options.Force = False) -> None:
    """Train a small model on fictional people, make it forget some of them by every method, and compare.

    It takes some minutes, and says at its beginning how many. A demo that was stopped goes on after the models that are
    finished when it is called again.
    """
    from torch_simu.unlearning.demo.checkpoint import DemoCheckpoint
    from torch_simu.unlearning.demo.demo import empty_report, run_demo
    from torch_simu.unlearning.demo.plan import DemoPlan, about, duration

    console = Console()
    check_writable(out, force=force)
    check_plots()
    with locked(out, resumable=True) as run:
        DemoCheckpoint.check(run, empty_report(seed).to_json())
        say(console, about())
        plan, before = DemoPlan.make(), finished_models(run)
        names, shown, left = list(plan.costs), list[str](), duration(plan.seconds(before))
        there = f"{len(before)} of {len(names)} models are finished; the others take" if before else "That takes"
        say(
            console,
            f"{there} {left} here. Report and plots will be in {out}; until then each finished row is in "
            f"{out}.run/{RESULTS}, and the same command goes on from there if it is stopped.",
        )
        show, started = show_rows(console, names), time.monotonic()
        with staged(console, _WHOLE) as progress:

            def done(name: str, result: MethodResult) -> None:
                show(name, result)
                shown.append(name)
                seconds = plan.left(shown, before, time.monotonic() - started)
                note = "" if len(shown) == len(names) else f"{duration(seconds)} left"
                progress(_WHOLE, len(shown), len(names), note)

            progress(_WHOLE, 0, len(names), f"{left} left")
            result = run_demo(seed, checkpoint=run, progress=progress, finished=done)
            progress("report", 0, 1)
            with whole_folder(out, force=force, run=run) as folder:
                result.save(folder)
            progress("report", 1, 1)
    for note in result.report.notes:
        say(console, note, style="dim")
    say(console, f"Report (report.html, report.md), plots and step logs: {out}")
