"""RMU: misdirect what a layer says of the forget set, and keep what it says of the retain set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from torch_simu._checks import check_count, check_number, problem
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Term
from torch_simu.unlearning.objectives.start import StartModel


@dataclass(frozen=True, slots=True)
class RMU:
    r"""Representation misdirection (Li et al. 2024, arXiv 2403.03218).

    $$\overline{\lVert H(f) - c\,u \rVert^2 / d} + \gamma\,\overline{\lVert H(r) - H_0(r) \rVert^2 / d}$$

    $H$ are the hidden states behind a block, of size $d$, where a scored token is predicted (the source takes every
    position of its texts), and $u$ is a random unit vector with positive entries, the same for the whole run. What lies
    behind the block has no part in either term.

    Args:
        start: The model before the first step, whose hidden states are $H_0$.
        retain_weight: Weight $\gamma$ of the retain term; the source takes 100 by default, and 1200 for Zephyr-7B.
        block: How many blocks the hidden states lie behind; None: a quarter of them, as in the source 8 of 32.
        scale: $c$, the length of the target; the source takes 20 by default, and 6.5 for Zephyr-7B.
        seed: Of $u$.

    Raises:
        ValueError: If the weight is negative, `scale` or `block` not positive; and of the terms, if the model has fewer
            blocks, or no position is scored.
    """

    start: StartModel
    retain_weight: float = RETAIN_WEIGHT
    block: int | None = None
    scale: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("retain_weight", self.retain_weight)
        check_number("scale", self.scale, low_open=True)
        check_count("seed", self.seed, low=0)
        if self.block is not None:
            check_count("block", self.block)

    def terms(self, model: PreTrainedModel, forget: Batch, retain: Batch) -> Iterator[Term]:
        """Yield the distance of the forget batch from the target, and of the retain batch from the start model."""
        states = self._states(model, forget)
        draw = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        target = (self.scale * draw / draw.norm()).to(states)
        yield Term("forget", 1.0, functional.mse_loss(states, target.expand_as(states)), "forget tokens")
        with self.start.in_place(model):
            before = self._states(model, retain)
        loss = functional.mse_loss(self._states(model, retain), before)
        yield Term("retain", self.retain_weight, loss, "retain tokens")

    def _states(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the hidden states that predict scored tokens. Shape: `(num_tokens, d_model)`."""
        found = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        num_blocks = len(found) - 1
        block = max(1, num_blocks // 4) if self.block is None else self.block
        if block > num_blocks:
            raise ValueError(problem(f"block is {block} for a model of {num_blocks} blocks", f"1 to {num_blocks}"))
        states: Tensor = found[block][:, :-1]
        scored = (batch["labels"][:, 1:] != IGNORED).to(states.device)
        if not scored.any():
            raise ValueError(problem("Every label is -100", "at least one scored position"))
        states = states[scored]
        return states if states.dtype == torch.float64 else states.float()
