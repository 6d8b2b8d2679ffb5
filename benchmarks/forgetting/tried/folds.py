"""Forgetting in layered folds."""

from __future__ import annotations

from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.lasting import Row
from benchmarks.forgetting.tried.configured import configured


def folded(case: Case, seed: int, *, folds: int) -> tuple[PreTrainedModel, Row]:
    """Forget the first fold, then the first two, and so on, while the rest of the forget set is retained."""
    forget, model, steps = list(case.sets["forget"]), case.model, 0
    for last in range(1, folds + 1):
        own = [row for place, row in enumerate(forget) if place * folds // len(forget) < last]
        kept = [*case.sets["retain"], *forget[len(own) :]]
        part = Case({**case.sets, "forget": own, "retain": kept}, model, None, case.batch_size)
        model, row = configured(part, seed)
        steps += row["steps"]
    return model, {**row, "steps": steps}
