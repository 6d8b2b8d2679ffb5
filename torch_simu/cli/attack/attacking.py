"""Attacking: a loaded model against its rows, and what a report says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_simu.unlearning.attack.attack import attack_model, relearning
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.attack.result import AttackResult
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.progress import Progress, renamed
from torch_simu.unlearning.report.report import RELEARN, MethodResult


@dataclass(frozen=True, slots=True)
class Attacking:
    """How the models of a job are attacked; see `torch_simu.unlearning.attack.attack.attack_model`.

    Args:
        config: Every choice; None: they are not attacked.
        tokenizer: Of the models.
        rows: "forget", and perhaps "retain" and "text"; other sets do not count.
        max_length: Largest number of tokens of prompt and answer.
        progress: Told of a stage for each model and attack.
        attacks: Names of attacks; None: all that there are rows for.
    """

    config: AttackConfig | None
    tokenizer: PreTrainedTokenizerBase
    rows: Mapping[str, Sequence[Row]]
    max_length: int | None = None
    progress: Progress | None = None
    attacks: Sequence[str] | None = None

    def on(self, model: PreTrainedModel, name: str) -> dict[str, AttackResult] | None:
        """Attack a copy of a model, which is called by its name to `progress`; None where nothing is attacked."""
        if self.config is None:
            return None
        sets = {
            each: encode(self.rows.get(each, []), self.tokenizer, max_length=self.max_length)
            for each in ("forget", "retain", "text")
        }
        return attack_model(
            model,
            sets["forget"],
            sets["retain"],
            attacks=self.attacks,
            text=sets["text"],
            config=self.config,
            pad_id=pad_id(self.tokenizer, model),
            progress=renamed(self.progress, f"{name}: {{}}".format),
        )


def worst_of(results: Mapping[str, AttackResult] | None) -> dict[str, dict[str, float]] | None:
    """Return the figures of all attacks that were made, from their results; None where none was asked for."""
    return None if results is None else {name: each.worst for name, each in results.items() if not each.skipped}


def attack_notes(results: Mapping[str, AttackResult] | None, *, reference: float | None = None) -> list[str]:
    """Return what a report says of the attacks on a model, in sentences; nothing where there was none.

    Args:
        results: What `Attacking.on` returned.
        reference: The probability that relearning brings back of a model that never saw the rows.
    """
    if results is None:
        return []
    sentence = relearning(results, reference=reference)
    skipped = [f"The attack {name} was skipped: {each.skipped}." for name, each in results.items() if each.skipped]
    return [*([sentence] if sentence else []), *skipped]


def floor_of(reference: MethodResult | None) -> float | None:
    """Return the probability that relearning brings back of the reference, where that is known."""
    found = (reference.attack or {}).get(RELEARN) if reference is not None else None
    return None if found is None else found["probability"]
