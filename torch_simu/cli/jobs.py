"""Jobs: what the commands do, from files to files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_simu._checks import check_choice, problem
from torch_simu.cli.loading import DELTAS, load_model, quiet_transformers
from torch_simu.deltas import attached_layers, detach_deltas, save_deltas
from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import encode, show_example
from torch_simu.unlearning.data.rows import Row, check_disjoint, load_rows
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.localization import choose_neurons
from torch_simu.unlearning.metrics.evaluate import evaluate
from torch_simu.unlearning.metrics.lume import lume_suite
from torch_simu.unlearning.metrics.tofu import tofu_suite
from torch_simu.unlearning.progress import Progress, part_of, renamed
from torch_simu.unlearning.report.folder import check_writable, whole_folder
from torch_simu.unlearning.report.plots import plot_attribution, plot_curves
from torch_simu.unlearning.report.report import Measures, MethodResult, Report, write_json, write_log

Show = Callable[[str], None]
"""Called once, before the work begins, with the text of the first row to forget as the model reads it."""

Sources = Mapping[str, str]
"""Set -> its file or data set; "forget" and "retain" are always there."""


def unlearn_job(
    model: str,
    sets: Sources,
    out: Path,
    config: UnlearnConfig,
    *,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    load_in: str | None = None,
    force: bool = False,
    progress: Progress,
    show: Show | None = None,
) -> Report:
    """Make a model forget, and write model, selection, scores, step log, plots and report into the folder `out`.

    The run is checkpointed in `OUT.run` beside it; called again after a kill, it goes on from there. Of a quantized
    model (`load_in` "8bit" or "4bit") the untouched base is written, and the deltas beside it.

    Raises:
        ValueError: If a file, a row or an option is wrong, or a loss is not finite.
        OSError: If `out` exists and `force` is not given, or cannot be written.
    """
    check_writable(out, force=force)
    rows = _rows(sets)
    net, tokenizer = load_model(
        model, dtype=dtype, device=device, load_in=load_in, float_attention=config.attention == "full"
    )
    _show_first(rows, tokenizer, max_length, show)
    examples = {name: encode(part, tokenizer, max_length=max_length) for name, part in rows.items()}
    before = MethodResult(_measures(net, tokenizer, rows, max_length, progress, "evaluate before"))
    kept = {name: part for name, part in examples.items() if name != "forget"}
    checkpoint = out.with_name(out.name + ".run")
    done = unlearn(
        net,
        examples["forget"],
        examples["retain"],
        config=config,
        monitor=kept,
        pad_id=pad_id(tokenizer, net),
        checkpoint=checkpoint,
        progress=progress,
    )
    after = MethodResult(
        _measures(net, tokenizer, rows, max_length, progress, "evaluate after"),
        done.changed_share,
        done.optimizer_bytes,
        done.seconds,
        done.steps,
    )
    goal = f"a mean forget probability of {config.forget_target}"
    reached = (
        f"Reached {goal} after {done.steps} steps." if done.reached else f"Did NOT reach {goal} in {done.steps} steps."
    )
    title = f"torch-simu unlearn: {config.method}"
    report = Report(title, config.seed, {"before": before, config.method: after}, config.to_json(), [reached])
    with whole_folder(out, force=force) as folder:
        if attached_layers(net):
            # The base stays what it was; its deltas go beside it.
            save_deltas(net, folder / DELTAS)
            detach_deltas(net)
        with quiet_transformers():
            net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        plots = ["forgetting.png"]
        start = {name: before.sets[name]["em"] for name in kept}
        start["forget_probability"] = before.sets["forget"]["probability"]
        plot_curves(
            {config.method: done.log}, folder / plots[0], sets=list(kept), start=start, target=config.forget_target
        )
        if done.selection is not None:
            done.selection.save(folder / "selection.safetensors")
        if done.attribution is not None:
            done.attribution.save(folder / "attribution.safetensors")
            plot_attribution(done.attribution, folder / "attribution.png")
            plots.append("attribution.png")
        write_log(folder / "steps.jsonl", done.log)
        report.save(folder, plots)
    shutil.rmtree(checkpoint)
    return report


def attribute_job(
    model: str,
    forget: str,
    retain: str | None,
    out: Path,
    config: UnlearnConfig,
    *,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    force: bool = False,
    progress: Progress,
    show: Show | None = None,
) -> NeuronSelection:
    """Score every neuron, and write scores, selection and heat map into the folder `out`.

    Raises:
        ValueError: If a file, a row or an option is wrong, or the rule "contrast" has no retain set.
        OSError: If `out` exists and `force` is not given, or cannot be written.
    """
    check_writable(out, force=force)
    if config.rule == "contrast" and retain is None:
        raise ValueError(problem("rule is 'contrast' without a retain set", "--retain", "Or take --rule top."))
    rows = _rows({"forget": forget} | ({} if retain is None else {"retain": retain}))
    net, tokenizer = load_model(model, dtype=dtype, device=device)
    _show_first(rows, tokenizer, max_length, show)
    examples = {name: encode(part, tokenizer, max_length=max_length) for name, part in rows.items()}
    selection, attribution = choose_neurons(
        net, examples["forget"], examples.get("retain", []), config, pad_id=pad_id(tokenizer, net), progress=progress
    )
    with whole_folder(out, force=force) as folder:
        selection.save(folder / "selection.safetensors")
        attribution.save(folder / "attribution.safetensors")
        plot_attribution(attribution, folder / "attribution.png")
        layers = {
            layer: {
                "selected": len(selection[layer]),
                "num_neurons": selection.num_neurons[layer],
                "largest_score": attribution.scores[layer].max().item(),
                "completeness_error": float(attribution.completeness_error[layer]),
            }
            for layer in selection
        }
        write_json(folder / "attribution.json", {"provenance": dict(attribution.provenance), "layers": layers})
    return selection


def evaluate_job(
    model: str,
    sets: Sources,
    *,
    reference: str | None = None,
    suite: str | None = None,
    out: Path | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    force: bool = False,
    progress: Progress,
    show: Show | None = None,
) -> tuple[Report, dict[str, float]]:
    """Measure a model, beside a reference if there is one, and by a benchmark's suite if one is named.

    Returns:
        The table, and the suite's headline figures.

    Raises:
        ValueError: If a file, a row or an option is wrong, or the suite's sets are not complete.
        OSError: If `out` exists and `force` is not given.
    """
    if suite is not None:
        check_choice("suite", suite, ("tofu", "lume"))
    if out is not None and out.exists() and not force:
        raise FileExistsError(problem(f"File {str(out)!r} exists", "a new file", "Use --force to replace it."))
    rows = _rows(sets)
    methods: dict[str, MethodResult] = {}
    suites: dict[str, dict[str, object]] = {}
    # The reference comes first: TOFU's forget quality compares the model with it.
    named = ({} if reference is None else {"reference": reference}) | {"model": model}
    for name, source in named.items():
        net, tokenizer = load_model(source, dtype=dtype, device=device)
        _show_first(rows, tokenizer, max_length, show if len(methods) == 0 else None)
        stage = f"evaluate {name}"
        methods[name] = MethodResult(_measures(net, tokenizer, rows, max_length, progress, stage, max_new_tokens))
        if suite is None:
            continue
        tell = renamed(progress, f"{{}} {name}".format)
        if suite == "lume":
            suites[name] = lume_suite(
                net, tokenizer, rows, batch_size=batch_size, max_new_tokens=max_new_tokens or 256, progress=tell
            )
        else:
            ratios = cast("Mapping[str, list[float]] | None", suites.get("reference", {}).get("log_truth_ratios"))
            suites[name] = tofu_suite(
                net,
                tokenizer,
                rows,
                reference=ratios,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens or 200,
                progress=tell,
            )
    report = Report("torch-simu evaluate", 0, methods, {"sets": dict(sets), "suite": suite})
    figures = _headlines(suites.get("model", {}))
    if out is not None:
        write_json(out, report.to_json() | {"suites": suites})
    return report, figures


def _show_first(
    rows: Mapping[str, list[Row]], tokenizer: PreTrainedTokenizerBase, max_length: int | None, show: Show | None
) -> None:
    if show is not None:
        (example,) = encode(rows["forget"][:1], tokenizer, max_length=max_length)
        show(f"First row to forget, its scored part between >>> and <<<:\n{show_example(example, tokenizer)}\n")


def _rows(sets: Sources) -> dict[str, list[Row]]:
    rows = {name: load_rows(source) for name, source in sets.items()}
    if "retain" in rows:
        check_disjoint(rows["forget"], rows["retain"])
    return rows


def _measures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, list[Row]],
    max_length: int | None,
    progress: Progress,
    stage: str,
    max_new_tokens: int | None = None,
) -> dict[str, Measures]:
    total = 2 * sum(map(len, rows.values()))
    before = 0
    measures: dict[str, Measures] = {}
    for name, part in rows.items():
        tell = part_of(renamed(progress, lambda _: stage), before, total)
        measures[name] = evaluate(
            model, tokenizer, part, rouge=False, max_length=max_length, max_new_tokens=max_new_tokens, progress=tell
        ).means
        before += 2 * len(part)
    return measures


def _headlines(suite: Mapping[str, object]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, value in suite.items():
        if isinstance(value, Mapping) and name in ("model_utility", "forget_quality"):
            figures |= {f"{name} ({average})": figure for average, figure in value.items()}
        elif isinstance(value, float):
            figures[name] = value
    return figures
