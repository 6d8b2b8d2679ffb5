"""Suites: the ways to measure a model that the command line knows by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

from torch_simu._checks import check_number, problem
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.lume import check_lume, lume_suite
from torch_simu.unlearning.metrics.muse import check_muse, muse_suite
from torch_simu.unlearning.metrics.tofu import check_tofu, tofu_suite
from torch_simu.unlearning.metrics.truth_ratio import AVERAGES
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


class Check(Protocol):
    """What a suite asks of the rows before a model is loaded."""

    def __call__(self, sets: Mapping[str, Sequence[Row]], *, compared: bool, reference: Figures | None) -> None:
        """Raise where rows, packages or figures are wrong.

        Args:
            sets: Set -> its rows.
            compared: Whether the model will be compared with a reference.
            reference: The figures of the reference, where they were measured before.
        """
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """A way to measure a model.

    Attributes:
        measure: Measures a model.
        headlines: The figures that are shown: each a number, or numbers by name.
        sets: The sets it needs beside "forget" and "retain".
        max_new_tokens: How much a model generates unless another number is asked for.
        check: Raises what `measure` would, before a model is loaded; None: nothing can be said before.
    """

    measure: Measure
    headlines: tuple[str, ...]
    sets: tuple[str, ...] = ()
    max_new_tokens: int = 200
    check: Check | None = None

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
    return tofu_suite(
        model,
        tokenizer,
        sets,
        reference=None if reference is None else _log_truth_ratios(reference, len(sets["forget"])),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )


def _check_tofu(sets: Mapping[str, Sequence[Row]], *, compared: bool, reference: Figures | None) -> None:
    check_tofu(sets, quality=compared)
    if reference is not None:
        _log_truth_ratios(reference, len(sets["forget"]))


def _log_truth_ratios(figures: Figures, num_rows: int) -> dict[str, list[float]]:
    """Return the values that forget quality needs of a reference; the figures may come from a file."""
    found = figures.get("log_truth_ratios")
    ratios = {each: found.get(each) for each in AVERAGES} if isinstance(found, Mapping) else dict.fromkeys(AVERAGES)
    for average, values in ratios.items():
        if not isinstance(values, list) or len(values) != num_rows:
            count = f"{len(values)} values" if isinstance(values, list) else "none"
            wrong = f"The reference has {count} of log_truth_ratios ({average})"
            raise ValueError(problem(wrong, f"{num_rows}, one for each row to forget", "Measure it with the suite."))
        for value in values:
            check_number(f"A value of log_truth_ratios ({average})", value, low=-math.inf)
    return cast("dict[str, list[float]]", ratios)


def _check_lume(sets: Mapping[str, Sequence[Row]], *, compared: bool, reference: Figures | None) -> None:
    check_lume(sets)


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


def _check_muse(sets: Mapping[str, Sequence[Row]], *, compared: bool, reference: Figures | None) -> None:
    check_muse(sets)
    _min_k_auc(reference)


def _min_k_auc(figures: Figures | None) -> float | None:
    """Return what PrivLeak needs of a reference; the figures may come from a file."""
    return None if figures is None else check_number("min_k_auc of the reference", figures.get("min_k_auc"), high=1.0)


def _muse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    *,
    reference: Figures | None,
    batch_size: int,
    max_new_tokens: int,
    progress: Progress | None,
) -> Figures:
    return muse_suite(
        model,
        tokenizer,
        sets,
        reference=_min_k_auc(reference),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )


SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "tofu": Suite(_tofu, ("model_utility", "forget_quality"), ("real_authors", "world_facts"), check=_check_tofu),
        "lume": Suite(_lume, ("task_aggregate",), max_new_tokens=256, check=_check_lume),
        "muse": Suite(
            _muse,
            ("verbmem", "knowmem_forget", "knowmem_retain", "min_k_auc", "privleak"),
            ("unseen",),
            max_new_tokens=128,
            check=_check_muse,
        ),
    }
)
"""Name -> suite."""
