"""Words: the facts of a run as the sections of a page, for a person who has never seen this project."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch_simu.unlearning.report.page import Bullets, Part, Section, Table
from torch_simu.unlearning.report.result import MEASURES, readable_bytes

_Facts = Mapping[str, Any]

NOT_MEASURED = "not measured"
"""What stands where a figure is not known."""

_LOSS = 0.05
_TONES = MappingProxyType({"forgotten": "good", "not forgotten": "bad"})
_MET = MappingProxyType({True: "yes", False: "NO", None: NOT_MEASURED})
_PLAIN = MappingProxyType(
    {
        "em": "Tokens of the answer that the model has right, one by one (exact memorization)",
        "es": "Share of the answer that its beginning brings up (extraction strength)",
        "probability": "Probability of the answer, token by token (geometric mean)",
        "qa_exact_match": "Answers that the model writes as they are, when asked",
        "membership": "Forgotten rows told from rows never seen (membership inference, AUC; 0.5 is guessing)",
    }
)
_SETS = MappingProxyType(
    {
        "forget": "to be forgotten",
        "retain": "to be kept, used in training",
        "world": "to be kept, measured only",
        "unseen": "never seen by any model, for membership inference",
    }
)


def sections_of(summary: _Facts) -> list[Section]:
    """Return the sections that say all of a summary.

    Args:
        summary: As `torch_simu.unlearning.report.facts.RunFacts.to_json` returns it.
    """
    return [
        _short(summary),
        _verdict(summary["verdict"]),
        _data(summary),
        _run(summary),
        _change(summary["changed"]),
        _forgotten(summary["forgotten"]),
        _cost(summary["cost"]),
        Section("What remains, and what to do about it", [Bullets(summary["remains"])]),
        Section("What this report cannot say", [Bullets(summary["limits"])]),
    ]


def appendices_of(summary: _Facts, settings: Mapping[str, object]) -> list[Section]:
    """Return the sections that stand at the end: the settings, and the hashes of all tensors in the summary."""
    changed, same = summary["changed"]["changed"], summary["changed"]["unchanged"]
    options = Table(["Option", "Value"], [[name, str(value)] for name, value in settings.items()])
    after = [
        [name, each["before"] or "was not there", each["after"] or "is not there", _neurons(each)]
        for name, each in changed.items()
    ]
    return [
        Section("Appendix: every option", [options]),
        Section(
            "Appendix: tensors that changed",
            [Table(["Tensor", "sha256 before", "sha256 after", "Neurons trained"], after)] if after else ["None."],
        ),
        Section(
            "Appendix: tensors that did not change, to the last bit",
            [Table(["Tensor", "sha256 before and after"], [list(each) for each in same.items()])]
            if same
            else ["None."],
        ),
    ]


def shown(value: object) -> str:
    """Return a value as the pages show it.

    Examples:
        >>> shown(0.12345), shown(7), shown(None)
        ('0.123', '7', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _short(summary: _Facts) -> Section:
    forget, changed, loss = summary["sets"]["forget"], summary["changed"], summary["cost"]["largest_loss"]
    answers = [
        ("Which data?", f"{forget['rows']} rows of {forget['file']}."),
        ("Which model?", f"{summary['model']['name']}, sha256 {summary['model']['sha256'][:12]}."),
        ("What changed?", f"{_share(changed['share'])} of its weights, in {changed['num_changed']} tensors."),
        ("Is it forgotten?", summary["verdict"]["sentence"]),
        ("What did it cost?", NOT_MEASURED if loss is None else _loss(loss)),
        ("What can go wrong?", " ".join([*summary["remains"][:2], *summary["limits"][1:3]])),
    ]
    said = "A language model was made to forget chosen rows of data. This page says which, how well, and what remains."
    return Section("In short", [said, Table(["Question", "Answer"], [list(each) for each in answers])])


def _verdict(verdict: _Facts) -> Section:
    rules = [
        [
            rule["rule"],
            shown(rule["value"]),
            "" if rule["limit"] is None else shown(rule["limit"]),
            _MET[rule["met"]],
            rule["basis"],
        ]
        for rule in verdict["rules"]
    ]
    return Section(
        f"Verdict: {verdict['word']}",
        [
            verdict["sentence"],
            "It follows from these rules alone. A figure meets its rule when it is at most the limit. Without a "
            "reference model, one that never saw the rows (--reference), the limits are conventions.",
            Table(["Rule", "Figure", "Limit", "Met", "Where the limit comes from, or how to measure"], rules),
        ],
        _TONES.get(verdict["word"], "mixed"),
    )


def _data(summary: _Facts) -> Section:
    rows = [
        [name, _SETS.get(name, ""), each["file"], str(each["rows"]), each["hmac_sha256"]]
        for name, each in summary["sets"].items()
    ]
    return Section(
        "Which data",
        [
            "The rows of the set forget were to be forgotten. This report names files and holds no text of any row.",
            Table(["Set", "Use", "File", "Rows", "Keyed hash of the rows (HMAC-SHA256)"], rows),
            f"The key of the hashes is in the file {summary['key_file']}, which is not part of this report. Who has "
            "the rows and the key can compute the hash again and so prove which rows were meant "
            "(torch_simu.unlearning.report.keyed.keyed_hash); who has this report alone cannot test guesses by it.",
        ],
    )


def _run(summary: _Facts) -> Section:
    rows = [
        ["Model that was given", summary["model"]["name"]],
        ["sha256 of all its tensors", summary["model"]["sha256"]],
        ["sha256 of the tensors that were written", summary["changed"]["sha256"]],
        ["Finished (UTC)", summary["when"]],
        *([_titled(name), str(value)] for name, value in summary["by"].items()),
    ]
    return Section(
        "Which model, when, and by what",
        [
            Table(["What", "Value"], rows),
            "The sha256 of a model is that of lines with the hash, two spaces and the name of each of its tensors, in "
            "the order of the names; the appendix has them.",
        ],
    )


def _change(changed: _Facts) -> Section:
    counts = f"{changed['num_changed']} tensors differ, {changed['num_unchanged']} are the same to the last bit"
    parts: list[Part] = [
        f"{_share(changed['share'])} of the model's weights changed: {counts}. The hash "
        "of each is in the appendix. Of a tensor that changed by neurons, only the columns of those neurons were "
        "trained; torch-simu patch create and patch verify prove it against the model that was given."
    ]
    if changed["layers"]:
        layers = [[name, str(each["trained"]), str(each["of"])] for name, each in changed["layers"].items()]
        parts.append(Table(["Layer", "Neurons trained", "Of"], layers, numbers=True))
        if rows := [[name, str(each["trained"]), str(each["of"])] for name, each in changed.get("rows", {}).items()]:
            parts.append("The rows that make these neurons were trained, too, weights and biases, and no others:")
            parts.append(Table(["Projection", "Rows trained", "Of"], rows, numbers=True))
    else:
        parts.append("Whole weights were trained, not chosen neurons.")
    return Section("What changed", parts)


def _forgotten(facts: _Facts) -> Section:
    measures, attacks = facts["measures"], facts["attacks"]
    said = []
    if (each := measures.get("qa_exact_match")) is not None:
        said.append(
            f"Asked, the model wrote {percent(each['before'])} of the answers as they are before, and writes "
            f"{percent(each['after'])} now."
        )
    probability = measures["probability"]
    target = "No target was set" if facts["target"] is None else f"The target was {shown(facts['target'])}"
    said.append(
        f"The mean probability of the true answers went from {shown(probability['before'])} to "
        f"{shown(probability['after'])}. {target}."
    )
    models = _models(*measures.values(), facts["membership"])
    rows = [[_PLAIN[name], *(shown(each.get(model)) for model in models)] for name, each in measures.items()]
    rows.append([_PLAIN["membership"], *(shown(facts["membership"].get(model)) for model in models)])
    parts: list[Part] = [" ".join(said), Table(["Of the rows to be forgotten", *models], rows, numbers=True)]
    if "reference" not in models:
        parts.append(f"A reference model, which never saw the rows: {NOT_MEASURED}. Give --reference.")
    if not facts["membership"]:
        parts.append(f"Membership inference: {NOT_MEASURED}. Give --unseen, rows of the same kind that no model saw.")
    if not attacks:
        parts.append(f"What relearning and other attacks bring back: {NOT_MEASURED}. Call with --attack.")
        return Section("Is it forgotten?", parts)
    parts.append(
        "An attacker has some of the rows or none, and tries to bring back the others. Probability and extraction "
        "strength of these others, the largest that each attack came to:"
    )
    return Section("Is it forgotten?", [*parts, *_attacks(attacks)])


def _attacks(attacks: _Facts) -> list[Part]:
    made = {name: each for name, each in attacks.items() if "skipped" not in each}
    models = _models(*(each for attack in made.values() for each in (attack["probability"], attack["es"])))
    rows = [
        [
            f"{name}: {each['what']}",
            str(each["rows_taught"]),
            str(each["rows_scored"]),
            *(f"{shown(each['probability'].get(model))} / {shown(each['es'].get(model))}" for model in models),
        ]
        for name, each in made.items()
    ]
    parts: list[Part] = [Table(["Attack", "Rows it has", "Rows scored", *models], rows)] if rows else []
    return parts + [
        f"The attack {name} ({each['what']}) was skipped: {each['skipped']}. It would have had {each['rows_taught']} "
        f"rows, and {each['rows_scored']} scored."
        for name, each in attacks.items()
        if "skipped" in each
    ]


def _cost(cost: _Facts) -> Section:
    parts: list[Part] = []
    loss = cost["largest_loss"]
    if loss is not None:
        parts.append(_loss(loss))
    sets = [each for measures in cost["sets"].values() for each in measures.values()]
    models = _models(*sets)
    rows = [
        [f"{name}: {MEASURES[key][1]}", *(shown(each.get(model)) for model in models)]
        for name, measures in cost["sets"].items()
        for key, each in measures.items()
    ]
    parts.append(Table(["What was kept, as a mean (1 is best)", *models], rows, numbers=True))
    if "world" not in cost["sets"]:
        parts.append(f"Knowledge outside of both sets: {NOT_MEASURED}. Give --world, rows that are in no batch.")
    state, seconds = cost["optimizer_bytes"], cost["seconds"]
    work = [
        ["Steps", shown(cost["steps"])],
        ["Seconds", NOT_MEASURED if seconds is None else f"{seconds:.1f}"],
        ["State of the optimizer", NOT_MEASURED if state is None else readable_bytes(state)],
    ]
    parts.append(Table(["Work", "Amount"], work))
    return Section("What it cost", parts)


def _loss(loss: _Facts) -> str:
    use = f" ({_SETS[loss['set']]})" if loss["set"] in _SETS else ""
    kept = f"{loss['set']}{use}, {MEASURES[loss['measure']][1]}: from {shown(loss['before'])} to {shown(loss['after'])}"
    if loss["loss"] <= 0:
        return f"Nothing that was measured got worse; the least gain is that of {kept}."
    size = "a loss to weigh" if loss["loss"] > _LOSS else "a small loss"
    # Of the figures as they are shown, since who reads them subtracts.
    less = round(loss["before"], 3) - round(loss["after"], 3)
    return f"The largest loss is that of {kept}, {shown(less)} less ({size})."


def _share(share: float | None) -> str:
    return "An unknown share" if share is None else percent(share)


def _models(*figures: _Facts) -> list[str]:
    return [model for model in ("before", "after", "reference") if any(model in each for each in figures)]


def _neurons(each: _Facts) -> str:
    if "rows" in each:
        return f"{each['rows']} of {each['of']} rows"
    return f"{each['neurons']} of {each['of']}" if "of" in each else "whole"


def _titled(name: str) -> str:
    return name.replace("_", " ").capitalize()


def percent(share: float) -> str:
    """Return a share as a percentage with three digits.

    Examples:
        >>> percent(0.29512)
        '29.5 %'
    """
    return f"{100 * share:.3g} %"
