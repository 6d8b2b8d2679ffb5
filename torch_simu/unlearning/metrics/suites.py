"""Suites: the ways to measure a model that the command line knows by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.lume import lume_suite
from torch_simu.unlearning.metrics.tofu import tofu_suite
from torch_simu.unlearning.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Figures = Mapping[str, object]
"""What a suite returns, as JSON knows it."""


class Measure(Protocol):
    """What a suite does with a model and the rows of its sets."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sets: Mapping[str, Sequence[Row]],
        *,
        reference: Figures | None,
        batch_size: int,
        max_new_tokens: int,
        progress: Progress | None,
    ) -> Figures:
        """Measure; `reference` holds the figures of a model that never saw the forget set, if there is one."""
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """A way to measure a model.

    Attributes:
        measure: Measures a model.
        headlines: The figures that are shown: each a number, or numbers by name.
        sets: The sets it needs beside "forget" and "retain".
        max_new_tokens: How much a model generates unless another number is asked for.
    """

    measure: Measure
    headlines: tuple[str, ...]
    sets: tuple[str, ...] = ()
    max_new_tokens: int = 200

    def shown(self, figures: Figures) -> dict[str, float]:
        """Return the headline figures that were measured, by name."""
        found: dict[str, float] = {}
        for name in self.headlines:
            value = figures.get(name)
            if isinstance(value, Mapping):
                found |= {f"{name} ({each})": number for each, number in value.items()}
            elif isinstance(value, float):
                found[name] = value
        return found


def _tofu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    *,
    reference: Figures | None,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress | None,
) -> Figures:
    ratios = None if reference is None else cast("Mapping[str, list[float]]", reference["log_truth_ratios"])
    return tofu_suite(
        model,
        tokenizer,
        sets,
        reference=ratios,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )


def _lume(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    *,
    reference: Figures | None,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress | None,
) -> Figures:
    return lume_suite(model, tokenizer, sets, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress)


SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "tofu": Suite(_tofu, ("model_utility", "forget_quality"), ("real_authors", "world_facts")),
        "lume": Suite(_lume, ("task_aggregate",), max_new_tokens=256),
    }
)
"""Name -> suite."""
