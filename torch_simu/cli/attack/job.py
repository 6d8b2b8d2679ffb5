"""attack_job: what the command does, from files to figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch_simu.cli.attack.attacking import Attacking, attack_notes, floor_of, worst_of
from torch_simu.cli.loading import Loading
from torch_simu.cli.measuring import Show, Sources, read_sets, show_first
from torch_simu.unlearning.attack.config import AttackConfig, chosen_attacks
from torch_simu.unlearning.attack.result import AttackResult
from torch_simu.unlearning.attack.rows import split_rows
from torch_simu.unlearning.progress import Progress
from torch_simu.unlearning.report.folder import check_new_file
from torch_simu.unlearning.report.report import MethodResult, Report, write_json


def attack_job(
    model: str,
    sets: Sources,
    *,
    reference: str | None = None,
    attacks: Sequence[str] | None = None,
    config: AttackConfig | None = None,
    out: Path | None = None,
    loading: Loading | None = None,
    max_length: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
) -> tuple[Report, dict[str, dict[str, AttackResult]]]:
    """Attack a model, and a reference beside it if there is one, and write the figures to `out`.

    Args:
        model: Folder of the model and its tokenizer.
        sets: "forget", and perhaps "retain" and "text" -> their rows.
        reference: A model that never saw the forget set.
        attacks: Names of attacks; None: all that there are rows for.
        config: Every choice of the attack.
        out: File for the figures.
        loading: How the models are loaded.
        max_length: Largest number of tokens of prompt and answer.
        force: Replace the file.
        progress: Told of a stage for each model and attack.
        show: Told the first row to forget, as the model reads it.

    Returns:
        The report, in which the set "scored" is that of the forget rows that the attacker does not have, and the
        results of "model" and "reference".

    Raises:
        ValueError: If a file, a row or an option is wrong, or the forget set has fewer than two different rows.
        OSError: If `out` exists and `force` is not given.
    """
    config, loading = config or AttackConfig(), loading or Loading()
    chosen_attacks(attacks, retain="retain" in sets, text="text" in sets)
    if out is not None:
        check_new_file(out, force=force, inputs=[model, *sets.values(), *filter(None, [reference])])
    rows = read_sets(sets)
    split_rows(rows["forget"], every=config.attacker_every)
    named = {"model": model} | ({} if reference is None else {"reference": reference})
    for source in named.values():
        loading.check(source)
    found: dict[str, dict[str, AttackResult]] = {}
    methods: dict[str, MethodResult] = {}
    for name, source in named.items():
        net, tokenizer = loading.load(source)
        show_first(rows, tokenizer, max_length, show)
        show = None
        results = Attacking(config, tokenizer, rows, max_length, progress, attacks).on(net, name) or {}
        before = next(iter(results.values())).before
        found[name] = results
        methods[name] = MethodResult(
            {"scored": {"es": before.es, "probability": before.probability}}, attack=worst_of(results)
        )
        # Before the next one is loaded.
        del net
    settings = {
        "sets": dict(sets),
        "rows": {name: len(part) for name, part in rows.items()},
        "attack": config.to_json(),
        "max_length": max_length,
    }
    notes = attack_notes(found["model"], reference=floor_of(methods.get("reference")))
    report = Report("torch-simu attack", config.seed, methods, settings, notes)
    if out is not None:
        traces = {name: {each: result.to_json() for each, result in part.items()} for name, part in found.items()}
        write_json(out, report.to_json() | {"attacks": traces})
    return report, found
