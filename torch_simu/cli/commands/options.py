"""Options: what the commands take, under the names that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from torch_simu._checks import problem
from torch_simu.unlearning.config import METHODS, RULES
from torch_simu.unlearning.metrics.suites import SUITES
from torch_simu.unlearning.objectives import OBJECTIVES


class Decays(NamedTuple):
    """The two `betas`. A class of its own: of a plain tuple typer would make an option that takes two words."""

    momentum: float
    curvature: float


class Rate(NamedTuple):
    """A learning rate, or "auto"."""

    value: float | Literal["auto"]


def read_rate(text: str | Rate) -> Rate:
    """Read a number, or the word "auto".

    Examples:
        >>> read_rate("1e-4"), read_rate("auto")
        (Rate(value=0.0001), Rate(value='auto'))

    Raises:
        typer.BadParameter: If it is neither.
    """
    if isinstance(text, Rate):
        return text
    if text == "auto":
        return Rate("auto")
    try:
        return Rate(float(text))
    except ValueError:
        raise typer.BadParameter(problem(f"adversary_lr is {text!r}", "a number, 1e-4 say, or auto")) from None


def read_decays(text: str | Decays) -> Decays:
    """Read two numbers with a comma between them.

    Examples:
        >>> read_decays("0.9,0.99")
        Decays(momentum=0.9, curvature=0.99)

    Raises:
        typer.BadParameter: If they are not two numbers.
    """
    if isinstance(text, Decays):
        return text
    try:
        return Decays(*map(float, text.split(",")))
    except (ValueError, TypeError):
        raise typer.BadParameter(problem(f"betas is {text!r}", "two numbers, 0.965,0.99 say")) from None


_DATA = (
    "JSON Lines with question/answer, prompt/response, instruction/output, input/output, messages or text; or a "
    "Hugging Face data set, NAME:CONFIG:SPLIT"
)
Model = Annotated[str, typer.Option(help="Folder of the model and its tokenizer.")]
Forget = Annotated[str, typer.Option(help=f"Rows to forget: {_DATA}.")]
Retain = Annotated[str, typer.Option(help="Rows to keep, in the same formats.")]
Contrast = Annotated[str | None, typer.Option(help="Rows to contrast with.")]
World = Annotated[str | None, typer.Option(help="Rows that are measured only, in no batch.")]
Unseen = Annotated[
    str | None, typer.Option(help="Rows like those to forget that no model saw: can they be told apart?")
]
RowKey = Annotated[
    Path | None, typer.Option(help="File of the key under which the report names the rows; OUT.key, made if missing.")
]
TofuRows = Annotated[str | None, typer.Option(help="Rows for --suite tofu.")]
MuseRows = Annotated[str | None, typer.Option(help="Rows like those to forget that no model saw, for --suite muse.")]
Reference = Annotated[
    str | None,
    typer.Option(help="A model that never saw the forget set, or the file that --out wrote when it was measured."),
]
Suite = Annotated[str | None, typer.Option(help=f"Also measure as a benchmark does: {', '.join(SUITES)}.")]
Attack = Annotated[
    bool, typer.Option("--attack", help="Also attack the models, as torch-simu attack does: what comes back?")
]
Out = Annotated[Path, typer.Option(help="Folder for the results; it must not exist yet.")]
OutFile = Annotated[Path | None, typer.Option(help="File for the numbers, as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder.")]

Method = Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")]
Objective = Annotated[str | None, typer.Option(help=f"One of {', '.join(OBJECTIVES)}; the method's own.")]
RetainTerm = Annotated[str, typer.Option(help="What keeps the retain rows: nll, or kl to the model as it was.")]
Balance = Annotated[
    bool | None, typer.Option(help="Bring the forget gradient to the norm of the retain gradient; the method's own.")
]
Curvature = Annotated[
    str | None,
    typer.Option(
        help="gnb (a diagonal on retain rows), or covariances: of neurons, or of outputs, too (both); the method's own."
    ),
]
Damping = Annotated[float, typer.Option(help="Share of its mean that is added to the diagonal of a covariance.")]
CovarianceSets = Annotated[
    str | None, typer.Option(help="Which rows covariances are of: forget, or both sets; the method's own.")
]
Rehearsal = Annotated[
    int, typer.Option(help="So many rows that the model writes itself, about random words, are kept like retain rows.")
]
AdversaryLr = Annotated[
    Rate | None,
    typer.Option(
        parser=read_rate,
        metavar="<float>|auto",
        help="Forget at a copy that relearns at this rate, or at one that fits the model; slower, and lasts longer.",
    ),
]
AdversaryScope = Annotated[
    str, typer.Option(help="What that copy is of: trained weights, or all, which lasts longer and takes more memory.")
]
AdversaryInterval = Annotated[int, typer.Option(help="Steps after which that copy starts anew.")]
RetainWeight = Annotated[float, typer.Option(help="Weight of the retain loss.")]
ForgetTarget = Annotated[float, typer.Option(help="Stop at this mean forget probability.")]
MaxSteps = Annotated[int, typer.Option(help="Steps at most.")]
CheckpointInterval = Annotated[int, typer.Option(help="Steps between two checkpoints.")]

Rule = Annotated[str, typer.Option(help=f"Choice of neurons: {', '.join(RULES)}; contrast needs retain rows.")]
Fraction = Annotated[float, typer.Option(help="Share of neurons to select.")]
OwnFraction = Annotated[float | None, typer.Option(help="Share of neurons to train; the method's own.")]
Threshold = Annotated[float, typer.Option(help="Share of the largest score, for --rule threshold.")]
Scope = Annotated[str, typer.Option(help="Where neurons compete: in their layer, or in all layers together (global).")]
Attention = Annotated[str, typer.Option(help="Attention projections: frozen or full (the paper's form).")]
Units = Annotated[bool, typer.Option(help="Also train the gate and up rows that make the chosen neurons.")]
Layers = Annotated[str | None, typer.Option(help="Regular expression for the MLP down projections of unknown models.")]
PathSteps = Annotated[int, typer.Option(help="Path points of the attribution.")]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Passes (31) or time (90s, 10m, 1.5h) of each attribution: an estimate where exact scores cost more."
    ),
]
ContrastRows = Annotated[int, typer.Option(help="Retain rows to attribute at most, evenly spread.")]
Incompleteness = Annotated[
    float | None, typer.Option(help="Refuse scores that miss a larger share of the change that they explain.")
]

Lr = Annotated[
    float | None,
    typer.Option(
        help="Step size: the largest change of one weight, or of a layer as a share of its norm; the method's own."
    ),
]
Paced = Annotated[
    bool | None, typer.Option(help="Let --lr be the largest step, and follow how fast is forgotten; the method's own.")
]
Betas = Annotated[
    Decays | None,
    typer.Option(
        parser=read_decays, metavar="<float>,<float>", help="Decay of momentum and curvature; the method's own."
    ),
]
Rho = Annotated[float, typer.Option(help="Curvature scale: larger clips less.")]
Clip = Annotated[float, typer.Option(help="Bound of the ratio of momentum and curvature.")]
WeightDecay = Annotated[float, typer.Option(help="Decoupled decay of the trained weights.")]
HessianInterval = Annotated[
    int | None, typer.Option(help="Steps between two refreshes of the curvature; the method's own.")
]

BatchSize = Annotated[int, typer.Option(help="Rows per batch.")]
MaxLength = Annotated[int | None, typer.Option(help="Cut prompts so that a row has at most this many tokens.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest generation.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Dtype = Annotated[str, typer.Option(help="Weights: auto (as saved), float32, bfloat16 or float16.")]
LoadIn = Annotated[str | None, typer.Option(help="Quantize the model first: 8bit or 4bit.")]
SaveAs = Annotated[str, typer.Option(help="loaded, or float: one plain model for any loader, also of a quantized one.")]
Device = Annotated[str | None, typer.Option(help="Where to run, cuda:0 say; the GPU if there is one.")]
