"""attack: the command, what it takes and what it shows."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from torch_simu.cli import options as shared
from torch_simu.cli.attack import options
from torch_simu.cli.attack.job import attack_job
from torch_simu.cli.console import progress_bars, say, show_attacks, show_text
from torch_simu.cli.loading import Loading
from torch_simu.unlearning.attack.config import AttackConfig

_USUAL = AttackConfig()


def attack(
    model: shared.Model,
    forget: shared.Forget,
    retain: options.Retain = None,
    text: options.Text = None,
    reference: options.Reference = None,
    attacks: options.Attacks = None,
    rates: options.AttackRates = options.Rates(_USUAL.rates),  # noqa: B008
    steps: options.Steps = _USUAL.steps,
    interval: options.Interval = _USUAL.interval,
    out: options.OutFile = None,
    batch_size: shared.BatchSize = _USUAL.batch_size,
    max_length: shared.MaxLength = None,
    seed: shared.Seed = 0,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    force: shared.Force = False,
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
