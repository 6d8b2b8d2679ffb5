"""The demo: a small model memorizes fictional people and places, then forgets some people by every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_simu._checks import check_choice, check_count
from torch_simu.attribution import Attribution
from torch_simu.unlearning.checkpoint import Record
from torch_simu.unlearning.config import METHODS
from torch_simu.unlearning.demo.attacked import back_note, plot_brought_back
from torch_simu.unlearning.demo.checkpoint import DemoCheckpoint, Finished
from torch_simu.unlearning.demo.models import DemoModels, models_of
from torch_simu.unlearning.demo.models import Fiction as Fiction
from torch_simu.unlearning.demo.models import forget_by as forget_by
from torch_simu.unlearning.demo.models import make_fiction as make_fiction
from torch_simu.unlearning.demo.models import make_model as make_model
from torch_simu.unlearning.demo.models import measured as measured
from torch_simu.unlearning.demo.models import train_base as train_base
from torch_simu.unlearning.demo.recipe import DemoRecipe as DemoRecipe
from torch_simu.unlearning.progress import Progress
from torch_simu.unlearning.report.plots import plot_attribution, plot_curves
from torch_simu.unlearning.report.report import MethodResult, Report, write_log


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found.

    Attributes:
        report: The table.
        logs: Method -> step log.
        attribution: Scores of the forget set; None when no method needed them.
        start: Set -> EM before unlearning, and the forget probability then.
        target: Forget probability at which methods are compared.
    """

    report: Report
    logs: Mapping[str, Sequence[Record]]
    attribution: Attribution | None
    start: Mapping[str, float]
    target: float | None

    def save(self, folder: Path) -> None:
        """Write report, plots and step logs into a folder."""
        plot_curves(
            self.logs, folder / "forgetting.png", sets=("retain", "world"), start=self.start, target=self.target
        )
        plots = ["forgetting.png"]
        if self.attribution is not None:
            plot_attribution(self.attribution, folder / "attribution.png")
            plots.append("attribution.png")
        plots += plot_brought_back(self.report.methods, folder / "attack.png")
        for method, log in self.logs.items():
            write_log(folder / f"steps_{method}.jsonl", log)
        self.report.save(folder, plots)


def empty_report(seed: int = 0, recipe: DemoRecipe | None = None) -> Report:
    """Return the report of a demo before a model is finished: which demo it is, by `seed` and `recipe`."""
    recipe = DemoRecipe() if recipe is None else recipe
    return Report("torch_simu demo: forget fictional people", seed, {}, recipe.to_json())


def run_demo(
    seed: int = 0,
    *,
    recipe: DemoRecipe | None = None,
    methods: Sequence[str] = tuple(METHODS),
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    finished: Callable[[str, MethodResult], None] | None = None,
) -> DemoResult:
    """Train a small model on fiction, make it forget by each method, and measure what it kept.

    Every method gets the same data, batches, objective and stopping rule: it stops at the first step after which the
    mean probability of the forget answers is at most the target. World facts are never in a batch.

    Args:
        seed: Of the corpus, the model, the training and the unlearning: the same seed gives the same numbers.
        recipe: Sizes and choices; the default takes a few minutes on two cores.
        methods: Which methods to run.
        checkpoint: A folder to save each model's results to, and to continue from; it is left there when all is done.
        progress: See `torch_simu.unlearning.progress.Progress`.
        finished: Called with the name and the result of each model when it is finished, those of the checkpoint first.

    Returns:
        The table, the step logs and the scores.

    Raises:
        ValueError: If a value is out of bounds, or `checkpoint` belongs to another demo.
    """
    check_count("seed", seed, low=0)
    recipe = DemoRecipe() if recipe is None else recipe
    for method in methods:
        check_choice("method", method, tuple(METHODS))
    report = empty_report(seed, recipe)
    saved = None if checkpoint is None else DemoCheckpoint.open(Path(checkpoint), report.to_json())
    models = DemoModels(recipe, seed, saved, progress)
    found: dict[str, Finished] = {}
    try:
        for name in models_of(methods):
            found[name] = models.finished(name)
            if finished is not None:
                finished(name, found[name].result)
    except BaseException:
        if saved is not None:
            saved.remove_if_empty()
        raise
    logs = {method: found[method].log for method in methods}
    scores = [part.attribution for part in found.values() if part.attribution is not None]
    before = found["before"].result
    start = {name: before.sets[name]["em"] for name in ("retain", "world")}
    start["forget_probability"] = before.sets["forget"]["probability"]
    results = {name: part.result for name, part in found.items()}
    report = dataclasses.replace(report, methods=results, notes=_notes(recipe, logs))
    return DemoResult(report, logs, scores[-1] if scores else None, start, recipe.unlearning.forget_target)


def _notes(recipe: DemoRecipe, logs: Mapping[str, Sequence[Record]]) -> list[str]:
    target = recipe.unlearning.forget_target
    missed = [method for method, log in logs.items() if log[-1].get("forget_probability", 1.0) > (target or 0.0)]
    notes = [
        "Every method stops at the first step after which the mean probability of the forget answers is at most "
        f"{target}; `retrained` never saw them. World facts are in no batch.",
        "`random_neurons`, `all_neurons` and `attention_only` are controls: they say what choosing neurons is worth.",
    ]
    if recipe.attack is not None:
        notes.append(back_note(recipe.attack))
    if missed and target is not None:
        notes.append(f"Not reached within {recipe.unlearning.max_steps} steps by: {', '.join(missed)}.")
    return notes
