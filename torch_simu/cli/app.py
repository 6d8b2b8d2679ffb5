"""torch-simu: the command line."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise ImportError(
        "The command line needs typer and rich: pip install 'torch-simu[cli,transformers,plots]'"
    ) from error

from torch_simu.cli.console import plain, progress_bars, say, show_report, show_text
from torch_simu.cli.interrupts import Interrupt, how_to_go_on, interruptible
from torch_simu.cli.jobs import attribute_job, evaluate_job, missed, unlearn_job
from torch_simu.cli.loading import Loading
from torch_simu.cli.measuring import Measuring
from torch_simu.cli.patch import app as patch_app
from torch_simu.unlearning.config import METHODS, RULES, MethodName, Rule, UnlearnConfig
from torch_simu.unlearning.metrics.suites import SUITES
from torch_simu.unlearning.objectives import OBJECTIVES
from torch_simu.unlearning.report.folder import check_writable, locked, whole_folder
from torch_simu.unlearning.report.plots import check_plots

# The base of all usage errors: typer names only this one of its kind, and brings its own copy of click.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _application() -> typer.Typer:
    found = typer.Typer(
        add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    found.add_typer(patch_app, name="patch")
    return found


app = _application()

_RUN = UnlearnConfig()
# The defaults of a run stand there, once.

_NOT_REACHED = 3
"""Exit status of a run that ended above its forget target."""

_Data = (
    "JSON Lines with question/answer, prompt/response, instruction/output, input/output, messages or text; or a "
    "Hugging Face data set, NAME:CONFIG:SPLIT"
)
Model = Annotated[str, typer.Option(help="Folder of the model and its tokenizer.")]
Forget = Annotated[str, typer.Option(help=f"Rows to forget: {_Data}.")]
Retain = Annotated[str, typer.Option(help="Rows to keep, in the same formats.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; it must not exist yet.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str | None, typer.Option(help="Where to run, cuda:0 say; the GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="Weights: auto (as saved), float32, bfloat16 or float16.")]
MaxLength = Annotated[int | None, typer.Option(help="Cut prompts so that a row has at most this many tokens.")]
BatchSize = Annotated[int, typer.Option(help="Rows per batch.")]
Incompleteness = Annotated[
    float | None, typer.Option(help="Refuse scores that miss a larger share of the change that they explain.")
]
Layers = Annotated[str | None, typer.Option(help="Regular expression for the MLP down projections of unknown models.")]


@app.callback()
def _about() -> None:
    """Make a language model forget chosen data and keep the rest."""


@app.command()
def demo(
    out: Out = Path("simu-demo"),
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Train a small model on fictional people, make it forget some of them by every method, and compare."""
    from torch_simu.unlearning.demo.demo import run_demo

    console = Console()
    check_writable(out, force=force)
    check_plots()
    with locked(out):
        with progress_bars(console) as progress:
            result = run_demo(seed, progress=progress)
        with whole_folder(out, force=force) as folder:
            result.save(folder)
    show_report(console, result.report)
    say(console, f"Report, plots and step logs: {out}")


@app.command()
def unlearn(
    model: Model,
    forget: Forget,
    retain: Retain,
    out: Out,
    world: Annotated[str | None, typer.Option(help="Rows that are measured only, in no batch.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = _RUN.method,
    objective: Annotated[str, typer.Option(help=f"One of {', '.join(OBJECTIVES)}.")] = _RUN.objective,
    lr: Annotated[float, typer.Option(help="Step size: the largest change of one weight per step.")] = _RUN.lr,
    retain_weight: Annotated[float, typer.Option(help="Weight of the retain loss.")] = _RUN.retain_weight,
    rule: Annotated[str, typer.Option(help=f"Choice of neurons: {', '.join(RULES)}.")] = _RUN.rule,
    fraction: Annotated[float, typer.Option(help="Share of neurons to train.")] = _RUN.fraction,
    threshold: Annotated[
        float, typer.Option(help="Share of the largest score, for --rule threshold.")
    ] = _RUN.threshold,
    attention: Annotated[
        str, typer.Option(help="Attention projections: frozen or full (the paper's form).")
    ] = _RUN.attention,
    layers: Layers = None,
    forget_target: Annotated[float, typer.Option(help="Stop at this mean forget probability.")] = cast(
        "float", _RUN.forget_target
    ),
    max_completeness_error: Incompleteness = _RUN.max_completeness_error,
    max_steps: Annotated[int, typer.Option(help="Steps at most.")] = _RUN.max_steps,
    batch_size: BatchSize = _RUN.forget_batch_size,
    max_length: MaxLength = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    load_in: Annotated[str | None, typer.Option(help="Quantize the model first: 8bit or 4bit.")] = None,
    save_as: Annotated[
        str, typer.Option(help="loaded, or float: one plain model for any loader, also of a quantized one.")
    ] = "loaded",
    device: Device = None,
    force: Force = False,
) -> None:
    """Make a model forget: attribute, select, unlearn, evaluate, save. A killed run goes on when called again."""
    config = UnlearnConfig(
        method=cast("MethodName", method),
        objective=objective,
        lr=lr,
        retain_weight=retain_weight,
        rule=cast("Rule", rule),
        fraction=fraction,
        threshold=threshold,
        attention=cast("Literal['frozen', 'full']", attention),
        layers=layers,
        max_completeness_error=max_completeness_error,
        forget_target=forget_target,
        max_steps=max_steps,
        forget_batch_size=batch_size,
        retain_batch_size=batch_size,
        hessian_batch_size=batch_size,
        eval_batch_size=batch_size,
        seed=seed,
    )
    console = Console()
    sets = {"forget": forget, "retain": retain} | ({} if world is None else {"world": world})
    with progress_bars(console) as progress:
        report = unlearn_job(
            model,
            sets,
            out,
            config,
            loading=Loading(dtype, device, load_in),
            measuring=Measuring(batch_size, max_length),
            save_as=save_as,
            force=force,
            progress=progress,
            show=partial(show_text, console),
        )
    show_report(console, report)
    say(console, f"Model, selection, step log and report: {out}")
    if report.reached is False:
        raise typer.Exit(_NOT_REACHED)


@app.command()
def evaluate(
    model: Model,
    forget: Forget,
    retain: Retain,
    reference: Annotated[str | None, typer.Option(help="A model that never saw the forget set.")] = None,
    suite: Annotated[str | None, typer.Option(help=f"Also measure as a benchmark does: {', '.join(SUITES)}.")] = None,
    real_authors: Annotated[str | None, typer.Option(help="Rows for --suite tofu.")] = None,
    world_facts: Annotated[str | None, typer.Option(help="Rows for --suite tofu.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the numbers, as JSON.")] = None,
    batch_size: BatchSize = _RUN.forget_batch_size,
    max_length: MaxLength = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest generation.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    force: Force = False,
) -> None:
    """Measure what a model knows of both sets, beside a reference model, and as TOFU or LUME do."""
    console = Console()
    sets = {"forget": forget, "retain": retain}
    extra = {"real_authors": real_authors, "world_facts": world_facts}
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
            force=force,
            progress=progress,
            show=partial(show_text, console),
        )
    show_report(console, report)
    for name, value in figures.items():
        say(console, f"{name}: {value:.4g}")


@app.command()
def attribute(
    model: Model,
    forget: Forget,
    out: Out,
    retain: Annotated[str | None, typer.Option(help="Rows to contrast with.")] = None,
    rule: Annotated[str, typer.Option(help=f"Choice of neurons: {', '.join(RULES)}; contrast needs --retain.")] = "top",
    fraction: Annotated[float, typer.Option(help="Share of neurons to select.")] = _RUN.fraction,
    threshold: Annotated[
        float, typer.Option(help="Share of the largest score, for --rule threshold.")
    ] = _RUN.threshold,
    steps: Annotated[int, typer.Option(help="Path steps.")] = _RUN.attribution_steps,
    max_completeness_error: Incompleteness = _RUN.max_completeness_error,
    layers: Layers = None,
    max_length: MaxLength = None,
    dtype: Dtype = "auto",
    device: Device = None,
    force: Force = False,
) -> None:
    """Score every neuron on the forget set, and save scores, selection and a heat map."""
    config = UnlearnConfig(
        rule=cast("Rule", rule),
        fraction=fraction,
        threshold=threshold,
        attribution_steps=steps,
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
    say(console, missed(attribution))
    say(console, f"Scores, selection and heat map: {out}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input gets one line on standard error and exit status 2.

    Ctrl-C and SIGTERM get one that says how to go on, and exit status 130 and 143.
    """
    try:
        with interruptible():
            status = app(arguments, standalone_mode=False)
    except Interrupt as interrupt:
        _fail(how_to_go_on(interrupt), status=interrupt.status)
    except _UsageError as error:
        _fail(cast("typer.BadParameter", error).format_message())
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", status=130)
    except (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError) as error:
        # KeyError shows the repr of its message; the message itself is what helps.
        _fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2) -> None:
    line = plain(" ".join(message.split())) or "failed without a message"
    sys.stderr.write(f"torch-simu: {line}\n")
    sys.exit(status)
