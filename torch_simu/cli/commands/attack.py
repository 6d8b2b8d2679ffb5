"""attack: the command, what it takes beside what it shares with the others, and what it shows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from torch_simu._checks import problem
from torch_simu.cli.attack.job import attack_job
from torch_simu.cli.commands import options
from torch_simu.cli.console import progress_bars, say, show_attacks, show_text
from torch_simu.cli.loading import Loading
from torch_simu.unlearning.attack.config import ATTACKS, AttackConfig

_USUAL = AttackConfig()


class Rates(tuple[float, ...]):
    """Learning rates. A class of its own: of a plain tuple typer would make an option that takes several words."""

    __slots__ = ()


class Names(tuple[str, ...]):
    """Names of attacks, likewise."""

    __slots__ = ()


def read_rates(text: str | Rates) -> Rates:
    """Read numbers with commas between them.

    Examples:
        >>> read_rates("1e-5, 1e-4")
        (1e-05, 0.0001)

    Raises:
        typer.BadParameter: If one of them is no number.
    """
    if isinstance(text, Rates):
        return text
    try:
        return Rates(map(float, text.split(",")))
    except ValueError:
        raise typer.BadParameter(problem(f"rates is {text!r}", "numbers, 1e-5,1e-4 say")) from None


def read_names(text: str | Names) -> Names:
    """Read names with commas between them.

    Examples:
        >>> read_names("relearn, few_shots")
        ('relearn', 'few_shots')
    """
    return text if isinstance(text, Names) else Names(name.strip() for name in text.split(","))


_Retain = Annotated[str | None, typer.Option(help="Rows to keep, for the attack fine_tune.")]
_Text = Annotated[str | None, typer.Option(help="Rows of plain text, for the attack fine_tune_text.")]
_Reference = Annotated[str | None, typer.Option(help="A model that never saw the forget set: the floor.")]
_Attacks = Annotated[
    Names | None,
    typer.Option(
        parser=read_names, metavar="<name>,...", help=f"Among {', '.join(ATTACKS)}; all that there are rows for."
    ),
]
_AttackRates = Annotated[
    Rates, typer.Option("--rates", parser=read_rates, metavar="<float>,...", help="Learning rates; the worst counts.")
]
_Steps = Annotated[int, typer.Option(help="Steps at each rate.")]
_Interval = Annotated[int, typer.Option(help="Steps between two measurements.")]
_OutFile = Annotated[Path | None, typer.Option(help="File for the figures and every measurement, as JSON.")]


def attack(
    model: options.Model,
    forget: options.Forget,
    retain: _Retain = None,
    text: _Text = None,
    reference: _Reference = None,
    attacks: _Attacks = None,
    rates: _AttackRates = Rates(_USUAL.rates),  # noqa: B008
    steps: _Steps = _USUAL.steps,
    interval: _Interval = _USUAL.interval,
    out: _OutFile = None,
    batch_size: options.BatchSize = _USUAL.batch_size,
    max_length: options.MaxLength = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Attack a model that forgot: relearn a third of the forget rows, fine-tune, round, prompt; what comes back?

    A copy is attacked, the model stays as it is. Every third forget row is the attacker's, the others are scored. Small
    figures are no guarantee against stronger attacks; those of a model that never saw the rows are the floor.
    """
    config = AttackConfig(
        rates=tuple(rates),
        steps=steps,
        interval=interval,
        batch_size=batch_size,
        eval_batch_size=batch_size,
        seed=seed,
    )
    console = Console()
    given = {"forget": forget, "retain": retain, "text": text}
    with progress_bars(console) as progress:
        report, found = attack_job(
            model,
            {name: source for name, source in given.items() if source is not None},
            reference=reference,
            attacks=attacks,
            config=config,
            out=out,
            loading=Loading(dtype, device),
            max_length=max_length,
            force=force,
            progress=progress,
            show=partial(show_text, console),
        )
    show_attacks(console, report.title, found)
    for note in report.notes:
        say(console, note)
