"""Column scores: what each method says of every down-projection column, fact by fact, and the rules that rank them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torch_simu import attribute_neurons, register_neuron_hooks
from torch_simu.attribution.path import objective_values
from torch_simu.curvature import scored_logits
from torch_simu.layers import select_layers
from torch_simu.unlearning.data import Example, collate
from torch_simu.unlearning.objectives import answer_logits

Scores = dict[str, Tensor]
"""Layer -> scores. Shape of each: `(num_facts, num_neurons)`, float64."""


def attributed(model: PreTrainedModel, facts: Sequence[Example], method: str, objective: str, steps: int) -> Scores:
    """Scores along a path, by `attribute_neurons`."""
    batches = [collate([fact], 0) for fact in facts]
    found = [attribute_neurons(model, [one], method=method, objective=objective, steps=steps) for one in batches]
    return {name: torch.stack([each.scores[name] for each in found]) for name in found[0].scores}


@dataclass(frozen=True, slots=True)
class Local:
    """Scores at the model as it is, all from one pass per fact."""

    gradient_activation: Scores
    weight_saliency: Scores
    gradient_magnitude: Scores
    activation_frequency: Scores
    activation_magnitude: Scores


def local(model: PreTrainedModel, facts: Sequence[Example], objective: str) -> Local:
    """Scores that need one backward pass per fact: gradients of the summed objective of its answer.

    Signed, the saliency of a column, the sum of weight times gradient, is gradient x activation; the methods that score
    weights (WAGLE, SalUn) take magnitudes first.
    """
    layers = select_layers(model)
    rows: dict[str, dict[str, list[Tensor]]] = {name: {layer: [] for layer in layers} for name in Local.__slots__}
    for fact in facts:
        batch = collate([fact], 0)
        model.zero_grad()
        with register_neuron_hooks(model, list(layers), reduce=None) as hooks:
            logits, labels = scored_logits(answer_logits(model, batch), batch["labels"])
            objective_values(logits, labels, objective).sum().backward()
        # The position before each scored label is the one that predicts it.
        scored = batch["labels"][0, 1:] != -100
        for name, layer in layers.items():
            activation, gradient = hooks[name].double()
            size = activation[:-1][scored].abs()
            slope = layer.weight.grad.double()
            for kind, score in (
                ("gradient_activation", (activation * gradient).sum(0)),
                ("weight_saliency", (slope * layer.weight.detach()).abs().sum(0)),
                ("gradient_magnitude", slope.abs().sum(0)),
                ("activation_frequency", (size > size.mean()).double().mean(0)),
                ("activation_magnitude", size.mean(0)),
            ):
                rows[kind][name].append(score)
    model.zero_grad()
    return Local(**{kind: {name: torch.stack(found) for name, found in each.items()} for kind, each in rows.items()})
