"""Commands: what each of them takes, and what it shows."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import typer
from rich.console import Console

from torch_simu.cli.commands import options
from torch_simu.cli.console import progress_bars, say, show_report, show_text
from torch_simu.cli.jobs import attribute_job, evaluate_job, unlearn_job
from torch_simu.cli.loading import Loading
from torch_simu.cli.measuring import Measuring
from torch_simu.cli.saving import exactness
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import MethodName, Rule, UnlearnConfig

_RUN = UnlearnConfig()
_PUBLISHED = UnlearnConfig(method="simu_graddiff")
# The defaults of a run stand there, once.

_TARGET = cast("float", _RUN.forget_target)

_NOT_REACHED = 3
"""Exit status of a run that ended above its forget target."""


def _attack(asked: bool, batch_size: int, seed: int = 0) -> AttackConfig | None:
    return AttackConfig(batch_size=batch_size, eval_batch_size=batch_size, seed=seed) if asked else None


def unlearn(
    model: options.Model,
    forget: options.Forget,
    retain: options.Retain,
    out: options.Out,
    world: options.World = None,
    unseen: options.Unseen = None,
    reference: options.Reference = None,
    method: options.Method = _RUN.method,
    objective: options.Objective = None,
    lr: options.Lr = None,
    paced: options.Paced = None,
    betas: options.Betas = None,
    rho: options.Rho = _RUN.rho,
    clip: options.Clip = _RUN.clip,
    weight_decay: options.WeightDecay = _RUN.weight_decay,
    hessian_interval: options.HessianInterval = None,
    curvature: options.Curvature = None,
    damping: options.Damping = _RUN.damping,
    covariance_of: options.CovarianceSets = None,
    retain_weight: options.RetainWeight = _RUN.retain_weight,
    retain_term: options.RetainTerm = _RUN.retain_term,
    rehearsal: options.Rehearsal = _RUN.rehearsal,
    balance: options.Balance = None,
    adversary_lr: options.AdversaryLr = None,
    adversary_scope: options.AdversaryScope = _RUN.adversary_scope,
    adversary_interval: options.AdversaryInterval = _RUN.adversary_interval,
    rule: options.Rule = _RUN.rule,
    fraction: options.OwnFraction = None,
    threshold: options.Threshold = _RUN.threshold,
    scope: options.Scope = _RUN.scope,
    attention: options.Attention = _RUN.attention,
    units: options.Units = _RUN.units,
    layers: options.Layers = None,
    attribution_steps: options.PathSteps = _RUN.attribution_steps,
    attribution_budget: options.Budget = None,
    attribution_rows: options.ContrastRows = _RUN.attribution_rows,
    max_completeness_error: options.Incompleteness = _RUN.max_completeness_error,
    forget_target: options.ForgetTarget = _TARGET,
    max_steps: options.MaxSteps = _RUN.max_steps,
    checkpoint_interval: options.CheckpointInterval = _RUN.checkpoint_interval,
    batch_size: options.BatchSize = _RUN.forget_batch_size,
    max_length: options.MaxLength = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    load_in: options.LoadIn = None,
    save_as: options.SaveAs = "loaded",
    device: options.Device = None,
    attack: options.Attack = False,
    row_key: options.RowKey = None,
    force: options.Force = False,
) -> None:
    """Make a model forget: attribute, select, unlearn, evaluate, save. A killed run goes on when called again."""
    own = {
        "objective": objective,
        "balance": balance,
        "curvature": curvature,
        "covariance_of": covariance_of,
        "fraction": fraction,
        "lr": lr,
        "paced": paced,
        "betas": None if betas is None else tuple(betas),
        "hessian_interval": hessian_interval,
    }
    config = UnlearnConfig(
        method=cast("MethodName", method),
        **cast("dict[str, Any]", own),
        rho=rho,
        clip=clip,
        weight_decay=weight_decay,
        retain_weight=retain_weight,
        rule=cast("Rule", rule),
        damping=damping,
        retain_term=cast("Literal['nll', 'kl']", retain_term),
        rehearsal=rehearsal,
        adversary_lr=None if adversary_lr is None else adversary_lr.value,
        adversary_scope=cast("Literal['trained', 'all']", adversary_scope),
        adversary_interval=adversary_interval,
        threshold=threshold,
        scope=cast("Literal['layer', 'global']", scope),
        attention=cast("Literal['frozen', 'full']", attention),
        units=units,
        layers=layers,
        attribution_steps=attribution_steps,
        attribution_budget=attribution_budget,
        attribution_rows=attribution_rows,
        max_completeness_error=max_completeness_error,
        forget_target=forget_target,
        max_steps=max_steps,
        checkpoint_interval=checkpoint_interval,
        forget_batch_size=batch_size,
        retain_batch_size=batch_size,
        hessian_batch_size=batch_size,
        eval_batch_size=batch_size,
        seed=seed,
    )
    console = Console()
    sets = {"forget": forget, "retain": retain}
    sets |= {name: source for name, source in {"world": world, "unseen": unseen}.items() if source is not None}
    with progress_bars(console) as progress:
        report = unlearn_job(
            model,
            sets,
            out,
            config,
            loading=Loading(dtype, device, load_in),
            measuring=Measuring(batch_size, max_length),
            attack=_attack(attack, batch_size, seed),
            reference=reference,
            row_key=row_key,
            save_as=save_as,
            force=force,
            progress=progress,
            show=partial(show_text, console),
        )
    show_report(console, report)
    say(console, f"Model, selection, step log and report (report.html): {out}")
    say(console, f"Key of the report's hashes, to be kept apart from it: {row_key or f'{out}.key'}")
    if report.reached is False:
        raise typer.Exit(_NOT_REACHED)


def evaluate(
    model: options.Model,
    forget: options.Forget,
    retain: options.Retain,
    reference: options.Reference = None,
    suite: options.Suite = None,
    attack: options.Attack = False,
    real_authors: options.TofuRows = None,
    world_facts: options.TofuRows = None,
    unseen: options.MuseRows = None,
    out: options.OutFile = None,
    batch_size: options.BatchSize = _RUN.forget_batch_size,
    max_length: options.MaxLength = None,
    max_new_tokens: options.MaxNewTokens = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Measure what a model knows of both sets, beside a reference model, and as TOFU, LUME or MUSE do."""
    console = Console()
    sets = {"forget": forget, "retain": retain}
    extra = {"real_authors": real_authors, "world_facts": world_facts, "unseen": unseen}
    sets |= {name: source for name, source in extra.items() if source is not None}
    with progress_bars(console) as progress:
        report, figures = evaluate_job(
            model,
            sets,
            reference=reference,
            suite=suite,
            out=out,
            loading=Loading(dtype, device),
            measuring=Measuring(batch_size, max_length, max_new_tokens),
            attack=_attack(attack, batch_size),
            force=force,
            progress=progress,
            show=partial(show_text, console),
        )
    show_report(console, report)
    for name, value in figures.items():
        say(console, f"{name}: {value:.4g}")


def attribute(
    model: options.Model,
    forget: options.Forget,
    out: options.Out,
    retain: options.Contrast = None,
    rule: options.Rule = "top",
    fraction: options.Fraction = _PUBLISHED.fraction,
    threshold: options.Threshold = _RUN.threshold,
    scope: options.Scope = _RUN.scope,
    steps: options.PathSteps = _RUN.attribution_steps,
    budget: options.Budget = None,
    rows: options.ContrastRows = _RUN.attribution_rows,
    max_completeness_error: options.Incompleteness = _RUN.max_completeness_error,
    layers: options.Layers = None,
    max_length: options.MaxLength = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Score every neuron on the forget set, and save scores, selection and a heat map."""
    config = UnlearnConfig(
        rule=cast("Rule", rule),
        fraction=fraction,
        threshold=threshold,
        scope=cast("Literal['layer', 'global']", scope),
        attribution_rows=rows,
        attribution_steps=steps,
        attribution_budget=budget,
        max_completeness_error=max_completeness_error,
        layers=layers,
    )
    console = Console()
    with progress_bars(console) as progress:
        selection, attribution = attribute_job(
            model,
            forget,
            retain,
            out,
            config,
            loading=Loading(dtype, device),
            max_length=max_length,
            force=force,
            progress=progress,
            show=partial(show_text, console),
        )
    say(console, selection)
    say(console, exactness(attribution, fraction))
    say(console, f"Scores, selection and heat map: {out}")
