"""Attacked: what relearning brings back of each method's model, in the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.progress import Progress
from torch_simu.unlearning.report.plots import plot_attack
from torch_simu.unlearning.report.report import Measures, MethodResult


def relearned(
    model: PreTrainedModel,
    forget: Sequence[Example],
    config: AttackConfig | None,
    *,
    progress: Progress | None = None,
) -> dict[str, Measures] | None:
    """Teach a copy of a model a part of the forget rows, and return what comes back of the others.

    Args:
        model: It is only read.
        forget: The forget rows.
        config: Of the attack; None: it is not made.
        progress: Told of the attack.

    Returns:
        As `MethodResult.attack`.
    """
    if config is None:
        return None
    found = attack_model(model, forget, attacks=["relearn"], config=config, progress=progress)
    return {name: result.worst for name, result in found.items() if not result.skipped}


def back_note(config: AttackConfig) -> str:
    """Say in a sentence what the column "back" is under an attack of this configuration (`config`)."""
    return (
        f"`back`: the largest probability of the other forget answers after one in {config.attacker_every} was taught "
        "again. `retrained` is the floor; a small figure is no guarantee against stronger attacks."
    )


def plot_brought_back(methods: Mapping[str, MethodResult], path: Path) -> list[str]:
    """Draw what each method keeps of the world facts against what relearning brings back, where that was measured.

    Returns:
        The name of the file, or nothing where there was nothing to draw.
    """
    points = {
        name: (result.sets["world"]["qa_exact_match"], result.attack["relearn"]["probability"])
        for name, result in methods.items()
        if result.attack and "relearn" in result.attack
    }
    if not points:
        return []
    plot_attack(points, path, kept="world QA kept (share of answers)")
    return [path.name]
