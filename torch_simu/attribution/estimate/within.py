"""Attribute some samples within a limit: exactly where that fits, else by an estimate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from torch_simu.attribution.estimate.limit import Limit
from torch_simu.attribution.estimate.passes import Passes
from torch_simu.attribution.methods.memory import Memory
from torch_simu.attribution.methods.rows import RowsOf
from torch_simu.attribution.methods.sums import LayerSum, Method
from torch_simu.attribution.path import Path
from torch_simu.attribution.sequences import ScoredSequence


@dataclass(frozen=True, slots=True, eq=False)
class Within:
    """How samples are attributed.

    Args:
        model: A causal language model, frozen.
        layers: Name -> module.
        path: Objective and path points; the points are those of exact sums.
        memory: What one pass may take.
        exact: The method of exact sums.
        rows_of: How the method arranges samples; None: it gives exact sums only.
        per_point: Passes that exact sums take for each path point, and for the path's end at zero.
        limit: What may be taken; None: what exact sums take.
        seed: Of the random layers and points.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    path: Path
    memory: Memory
    exact: Method
    rows_of: RowsOf | None = None
    per_point: float = 1.0
    limit: Limit | None = None
    seed: int = 0

    def sums(
        self, sequences: Sequence[ScoredSequence], *, share: float, number: int, progress: Callable[[float], None]
    ) -> dict[str, LayerSum]:
        """Return the sum of each layer over all samples of the sequences, or its estimate.

        Args:
            sequences: Sequences with samples.
            share: Of the samples that are left, these.
            number: How many sequences came before.
            progress: Called with the share of the work that is done.
        """
        path, rounds = self.path, len(self.layers)
        if self.limit is not None and self.rows_of is not None:
            passes, wanted = None, self.limit.number
            if wanted is None or wanted < self.per_point:
                # Far from the seeds of other processes, which follow each other.
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * number)
                rows = list(self.rows_of(self.model, sequences, self.layers, self.path, self.memory))
                passes = Passes(rows, self.layers, generator)
                start = time.monotonic()
                passes.run()
                wanted = self.limit.passes(time.monotonic() - start, share)
            # As many points as fit, and the end at zero where there is more than one.
            fit = int(wanted / self.per_point)
            path = replace(path, steps=max(1, min(path.steps, fit - 1)), measured=fit > 1)
            if fit < 1 and passes is not None:
                return self._estimated(passes, min(wanted, rounds + 1), progress)
        found: dict[str, LayerSum] = {}
        for name, each in self.exact(self.model, sequences, self.layers, path, self.memory):
            found[name] = each
            progress(len(found) / rounds)
        return found

    def _estimated(self, passes: Passes, wanted: int, progress: Callable[[float], None]) -> dict[str, LayerSum]:
        while passes.done < wanted:
            progress(passes.done / wanted)
            passes.run()
        progress(1.0)
        return passes.sums()
