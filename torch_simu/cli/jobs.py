"""Jobs: what the commands do, from files to files."""

from __future__ import annotations

from pathlib import Path

from torch_simu._checks import check_choice, problem
from torch_simu.attribution import Attribution
from torch_simu.cli.attack.attacking import Attacking, attack_notes, floor_of, worst_of
from torch_simu.cli.loading import BASE_STILL_KNOWS, Loading
from torch_simu.cli.measuring import Measuring, Show, Sources, read_sets, show_first
from torch_simu.cli.recording import Recording, RowKey, tensor_hashes
from torch_simu.cli.reference import read_reference
from torch_simu.cli.saving import check_saves, exactness, save_model, save_scores
from torch_simu.deltas import attached_layers, decode_model
from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.attack.result import AttackResult
from torch_simu.unlearning.attack.rows import split_rows
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.refusals import encode_refusals
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.localization import choose_neurons
from torch_simu.unlearning.metrics.suites import SUITES, Figures
from torch_simu.unlearning.objectives import REFUSING
from torch_simu.unlearning.progress import Progress, renamed
from torch_simu.unlearning.report.folder import check_new_file, check_writable, locked, whole_folder
from torch_simu.unlearning.report.plots import check_plots, plot_attribution, plot_curves
from torch_simu.unlearning.report.report import MethodResult, Report, bargain, write_json, write_log


def unlearn_job(
    model: str,
    sets: Sources,
    out: Path,
    config: UnlearnConfig,
    *,
    loading: Loading | None = None,
    measuring: Measuring | None = None,
    attack: AttackConfig | None = None,
    reference: str | None = None,
    row_key: Path | None = None,
    save_as: str = "loaded",
    force: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
) -> Report:
    """Make a model forget, and write model, selection, scores, step log, plots and report into the folder `out`.

    The run is checkpointed in `OUT.run` beside it; called again after a kill, it goes on from there. Of a quantized
    model (`load_in` "8bit" or "4bit", or saved so) the untouched base is written, and the deltas beside it; with
    `save_as` "float" the values of its codes as float weights instead, with the deltas in them.

    Args:
        model: Folder of the model and its tokenizer.
        sets: Set -> its rows; of "unseen" rows, which no model saw, the report says whether the forgotten ones differ.
        out: A new folder for the results.
        config: Every choice of the run.
        loading: How the model is loaded.
        measuring: How the sets are measured.
        attack: How the models before and after are attacked; None: they are not.
        reference: A model that never saw the rows, or what `evaluate_job` wrote of one, to compare with.
        row_key: File of the key under which the report names the rows, made where there is none; None: `OUT.key`.
        save_as: "loaded": codes and deltas apart; "float": a plain model of float weights.
        force: Replace an older result at `out`.
        progress: Told of each stage.
        show: Told the first row to forget, as the model reads it.

    Returns:
        The report; `Report.reached` says whether the forget target was reached.

    Raises:
        ValueError: If a file, a row or an option is wrong, a loss is not finite, or an attack is asked for and the
            forget set has fewer than two different rows.
        OSError: If `out` exists and `force` is not given, holds an input, or cannot be written, or another process is
            working on it.
        ImportError: If matplotlib is not installed.
    """
    loading, measuring = loading or Loading(), measuring or Measuring()
    check_choice("save_as", save_as, ("loaded", "float"))
    check_writable(out, force=force, inputs=[model, *sets.values(), *filter(None, [reference])])
    check_plots()
    if loading.load_in is not None and config.where in ("all", "attention"):
        wrong = f"Method {config.method!r} trains whole weights, and load_in is {loading.load_in!r}"
        raise ValueError(problem(wrong, "a method that trains neurons", "Or leave the model unquantized."))
    key = RowKey.beside(out, row_key)
    rows = read_sets(sets)
    if attack is not None:
        split_rows(rows["forget"], every=attack.attacker_every)
    recording = Recording(model, sets, rows, key, loading, measuring, attack, progress)
    with locked(out, resumable=True) as checkpoint:
        other = recording.of_reference(reference)
        net, tokenizer = loading.load(model, float_attention=config.attention == "full")
        check_saves(net)
        show_first(rows, tokenizer, measuring.max_length, show)
        recorded = recording.measured
        examples = {name: encode(part, tokenizer, max_length=measuring.max_length) for name, part in recorded.items()}
        before_tensors = tensor_hashes(net)
        before, _ = recording.of(net, tokenizer, "before")
        kept = {name: part for name, part in examples.items() if name != "forget"}
        done = unlearn(
            net,
            examples["forget"],
            examples["retain"],
            config=config,
            refusals=encode_refusals(tokenizer) if config.objective in REFUSING else None,
            monitor=kept,
            pad_id=pad_id(tokenizer, net),
            checkpoint=checkpoint,
            progress=progress,
        )
        if save_as == "float":
            # Before it is measured: the figures are those of what is written.
            decode_model(net)
        after, found = recording.of(net, tokenizer, "after", done)
        summary = recording.summary(
            net,
            done,
            config,
            before=before,
            after=after,
            reference=other,
            attacks=found,
            before_tensors=before_tensors,
            save_as=save_as,
        )
        report = Report(
            f"torch-simu unlearn: {config.method}",
            config.seed,
            {"before": before, config.method: after, **({} if other is None else {"reference": other})},
            config.to_json(),
            [
                *bargain(before, after, config.forget_target, reached=done.reached),
                *attack_notes(found, reference=floor_of(other)),
                *([] if done.attribution is None else [exactness(done.attribution, config.fraction)]),
                *([BASE_STILL_KNOWS] if attached_layers(net) else []),
            ],
            reached=done.reached,
            summary=summary,
        )
        with whole_folder(out, force=force, run=checkpoint) as folder:
            save_model(net, tokenizer, folder)
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
                plot_attribution(done.attribution, folder / "attribution.png", selection=done.selection)
                plots.append("attribution.png")
            write_log(folder / "steps.jsonl", done.log)
            report.save(folder, plots)
            key.save()
    return report


def attribute_job(
    model: str,
    forget: str,
    retain: str | None,
    out: Path,
    config: UnlearnConfig,
    *,
    loading: Loading | None = None,
    max_length: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
) -> tuple[NeuronSelection, Attribution]:
    """Score every neuron, and write scores, selection and heat map into the folder `out`.

    `model`, `loading`, `max_length`, `progress` and `show` are as in `unlearn_job`; `config` and the sets `forget` and
    `retain` as in `choose_neurons`.

    Raises:
        ValueError: If a file, a row or an option is wrong, or the rule "contrast" has no retain set.
        OSError: If `out` exists and `force` is not given, or cannot be written.
    """
    check_writable(out, force=force, inputs=[model, forget, *([] if retain is None else [retain])])
    check_plots()
    if config.rule == "contrast" and retain is None:
        raise ValueError(problem("rule is 'contrast' without a retain set", "--retain", "Or take --rule top."))
    rows = read_sets({"forget": forget} | ({} if retain is None else {"retain": retain}))
    with locked(out):
        net, tokenizer = (loading or Loading()).load(model)
        show_first(rows, tokenizer, max_length, show)
        examples = {name: encode(part, tokenizer, max_length=max_length) for name, part in rows.items()}
        selection, attribution = choose_neurons(
            net,
            examples["forget"],
            examples.get("retain", []),
            config,
            pad_id=pad_id(tokenizer, net),
            progress=progress,
        )
        with whole_folder(out, force=force) as folder:
            save_scores(selection, attribution, folder)
    return selection, attribution


def evaluate_job(
    model: str,
    sets: Sources,
    *,
    reference: str | None = None,
    suite: str | None = None,
    out: Path | None = None,
    loading: Loading | None = None,
    measuring: Measuring | None = None,
    attack: AttackConfig | None = None,
    force: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
) -> tuple[Report, dict[str, float]]:
    """Measure a model, beside a reference if there is one, and by a benchmark's suite if one is named.

    With an `attack`, each is attacked, too, and the report says what comes back.

    A `reference` is a model, or the file that this function wrote to `out` when it measured one on the same sets.
    `loading`, `measuring`, `progress` and `show` are as in `unlearn_job`.

    Returns:
        The table, and the suite's headline figures.

    Raises:
        ValueError: If a file, a row or an option is wrong, the suite's sets are not complete, or the figures of the
            reference are of other sets or lack the suite.
        OSError: If `out` exists and `force` is not given.
        ImportError: If a package that the suite needs is not installed.
    """
    if suite is not None:
        check_choice("suite", suite, tuple(SUITES))
    loading, measuring = loading or Loading(), measuring or Measuring()
    measured = reference if reference is not None and Path(reference).is_file() else None
    if out is not None:
        check_new_file(out, force=force, inputs=[model, *sets.values(), *filter(None, [measured])])
    rows = read_sets(sets)
    settings = {
        "sets": dict(sets),
        "rows": {name: len(part) for name, part in rows.items()},
        "suite": suite,
        "max_length": measuring.max_length,
        "max_new_tokens": measuring.max_new_tokens,
    }
    if attack is not None:
        split_rows(rows["forget"], every=attack.attacker_every)
        settings["attack"] = attack.to_json()
    methods: dict[str, MethodResult] = {}
    suites: dict[str, Figures] = {}
    found: dict[str, AttackResult] | None = None
    # The reference comes first: TOFU's forget quality compares the model with it.
    named = ({} if reference is None or measured else {"reference": reference}) | {"model": model}
    if measured is not None:
        methods["reference"], figures = read_reference(Path(measured), settings)
        suites |= {} if figures is None else {"reference": figures}
    chosen = None if suite is None else SUITES[suite]
    if chosen is not None and chosen.check is not None:
        chosen.check(rows, compared=reference is not None, reference=suites.get("reference"))
    for source in named.values():
        loading.check(source)
    # A model is gone when its turn ends: two at once would take twice the memory.
    for name, source in named.items():
        net, tokenizer = loading.load(source)
        show_first(rows, tokenizer, measuring.max_length, show)
        show = None
        measures = measuring.measures(net, tokenizer, rows, f"evaluate {name}", progress)
        found = Attacking(attack, tokenizer, rows, measuring.max_length, progress).on(net, name)
        methods[name] = MethodResult(measures, attack=worst_of(found))
        if chosen is not None:
            suites[name] = chosen.measure(
                net,
                tokenizer,
                rows,
                reference=suites.get("reference"),
                batch_size=measuring.batch_size,
                max_new_tokens=measuring.max_new_tokens or chosen.max_new_tokens,
                progress=renamed(progress, f"{suite} {name}".format),
            )
        del net
    notes = attack_notes(found, reference=floor_of(methods.get("reference")))
    report = Report("torch-simu evaluate", 0, methods, settings, notes)
    headlines = {} if chosen is None else chosen.shown(suites["model"])
    if out is not None:
        write_json(out, report.to_json() | {"suites": suites})
    return report, headlines
