"""Options: what the attack takes, beside what it shares with the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torch_simu._checks import problem
from torch_simu.unlearning.attack.config import ATTACKS


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


Retain = Annotated[str | None, typer.Option(help="Rows to keep, for the attack fine_tune.")]
Text = Annotated[str | None, typer.Option(help="Rows of plain text, for the attack fine_tune_text.")]
Reference = Annotated[str | None, typer.Option(help="A model that never saw the forget set: the floor.")]
Attacks = Annotated[
    Names | None,
    typer.Option(
        parser=read_names, metavar="<name>,...", help=f"Among {', '.join(ATTACKS)}; all that there are rows for."
    ),
]
AttackRates = Annotated[
    Rates, typer.Option("--rates", parser=read_rates, metavar="<float>,...", help="Learning rates; the worst counts.")
]
Steps = Annotated[int, typer.Option(help="Steps at each rate.")]
Interval = Annotated[int, typer.Option(help="Steps between two measurements.")]
OutFile = Annotated[Path | None, typer.Option(help="File for the figures and every measurement, as JSON.")]
