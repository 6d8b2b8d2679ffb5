"""recommend: the command, and what it shows."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal, cast

import typer
from rich.console import Console

from torch_simu.cli.commands import options
from torch_simu.cli.console import progress_bars, say, show_text, show_tries
from torch_simu.cli.loading import Loading
from torch_simu.cli.recommending import recommend_job
from torch_simu.unlearning.config import MethodName, UnlearnConfig
from torch_simu.unlearning.pilot.words import one_batch_size

_RUN = UnlearnConfig()

_TARGET = cast("float", _RUN.forget_target)

_NOT_REACHED = 3

_Minutes = Annotated[float, typer.Option(help="Time of the tries; loading the model comes before.")]
_OutName = Annotated[str, typer.Option("--out", help="The folder that the printed command names; nothing is written.")]


def recommend(
    model: options.Model,
    forget: options.Forget,
    retain: options.Retain,
    minutes: _Minutes = 10.0,
    out: _OutName = "OUT_DIR",
    method: options.Method = _RUN.method,
    attention: options.Attention = _RUN.attention,
    units: options.Units = _RUN.units,
    layers: options.Layers = None,
    forget_target: options.ForgetTarget = _TARGET,
    batch_size: options.BatchSize = _RUN.forget_batch_size,
    max_length: options.MaxLength = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    load_in: options.LoadIn = None,
    device: options.Device = None,
) -> None:
    """Try several choices on your model for some minutes, and print the call of unlearn that kept most, and why.

    Each try runs to the forget target on a part of the rows, and is measured on retain rows that it did not train on.
    The model stays as it is. Exit status 3 where no try reached the target in time.
    """
    config = UnlearnConfig(
        method=cast("MethodName", method),
        attention=cast("Literal['full', 'frozen']", attention),
        units=units,
        layers=layers,
        forget_target=forget_target,
        seed=seed,
    )
    console = Console()
    with progress_bars(console) as progress:
        found, given = recommend_job(
            model,
            {"forget": forget, "retain": retain},
            one_batch_size(config, batch_size),
            minutes=minutes,
            loading=Loading(dtype, device, load_in),
            max_length=max_length,
            progress=progress,
            show=partial(show_text, console),
        )
    show_tries(console, found)
    say(console, found.reason)
    # Whole, however narrow the terminal is: it is copied.
    say(console, found.command(model, forget, retain, out, options=given), soft_wrap=True)
    if not found.best.reached:
        raise typer.Exit(_NOT_REACHED)
