"""The naive oracle of attribution: one forward and backward pass per prefix and path point, in plain loops."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.models import VOCABULARY, tiny
from tests.strategies import generator


@dataclass(frozen=True)
class Expected:
    """Scores of one layer, and the change of the objective from zero to clean activation."""

    scores: Tensor
    change: float


@functools.cache
def lively(name: str, **config: object) -> nn.Module:
    """A tiny model whose weights are large enough for attention and nonlinearities to matter."""
    model = tiny(name, **config)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(6.0)
    return model


def sequences(seed: int, num_rows: int = 3, shortest: int = 3, longest: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each row, about half of the labels scored, the last one always."""
    source = generator(seed)
    rows = []
    for _ in range(num_rows):
        length = int(torch.randint(shortest, longest + 1, (), generator=source))
        ids = torch.randint(3, VOCABULARY, (length,), generator=source)
        # Labels need not be the tokens themselves.
        labels = torch.randint(3, VOCABULARY, (length,), generator=source)
        labels[torch.rand(length, generator=source) < 0.5] = -100
        labels[-1] = ids[-1]
        rows.append((ids, labels))
    return rows


def padded_batch(rows: list[tuple[Tensor, Tensor]], side: str) -> dict[str, Tensor]:
    """The rows as one batch, padded to the longest and two more."""
    length = max(len(ids) for ids, _ in rows) + 2
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
        "labels": torch.full((len(rows), length), -100),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
    }
    for index, (ids, labels) in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        batch["input_ids"][index, place] = ids
        batch["labels"][index, place] = labels
        batch["attention_mask"][index, place] = 1
    return batch


def reference(
    model: nn.Module, rows: list[tuple[Tensor, Tensor]], layer: str, objective: str, rule: str, steps: int
) -> Expected:
    """The definition: each scored label is predicted from its own prefix, changed at the last position only."""
    module = model.get_submodule(layer)
    scores: Tensor | float = 0.0
    change = 0.0
    for ids, labels in rows:
        for t in range(1, len(ids)):
            if labels[t] == -100:
                continue
            beta = _last_activation(model, module, ids[:t])
            for j in range(1, steps + 1):
                alpha = {"midpoint": (j - 0.5) / steps, "right": j / steps, "left": (j - 1) / steps}[rule]
                activation = (alpha * beta).requires_grad_()
                value = _value(model, module, ids[:t], labels[t], activation, objective)
                (gradient,) = torch.autograd.grad(value, activation)
                scores = scores + beta.double() * gradient.double() / steps
            change += _value(model, module, ids[:t], labels[t], beta, objective).item()
            change -= _value(model, module, ids[:t], labels[t], torch.zeros_like(beta), objective).item()
    assert isinstance(scores, Tensor)
    return Expected(scores, change)


def _last_activation(model: nn.Module, module: nn.Module, prefix: Tensor) -> Tensor:
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor]) -> None:
        found.append(args[0].detach().reshape(len(prefix), -1)[-1])

    handle = module.register_forward_pre_hook(hook)
    model(input_ids=prefix[None], use_cache=False)
    handle.remove()
    return found[0]


def _value(
    model: nn.Module, module: nn.Module, prefix: Tensor, target: Tensor, activation: Tensor, objective: str
) -> Tensor:
    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        tokens = args[0].detach().reshape(len(prefix), -1)
        return (torch.cat([tokens[:-1], activation[None]]).reshape(args[0].shape),)

    handle = module.register_forward_pre_hook(hook)
    logits = model(input_ids=prefix[None], use_cache=False).logits[0, -1]
    handle.remove()
    logprob = logits.float().log_softmax(-1)[target]
    return {"logprob": logprob, "prob": logprob.exp(), "loss": -logprob}[objective]
