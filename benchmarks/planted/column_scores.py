"""Column scores: what each method says of every down-projection column, fact by fact, and the rules that rank them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torch_simu import attribute_neurons, register_neuron_hooks
from torch_simu.curvature import IGNORED, scored_logits
from torch_simu.layers import select_layers
from torch_simu.unlearning.data.examples import Example, collate
from torch_simu.unlearning.objectives import answer_logits

Scores = dict[str, Tensor]
"""Layer -> scores. Shape of each: `(num_facts, num_neurons)`, float64."""

PATHS: Mapping[str, str] = MappingProxyType({"exact": "packed", "layerwise": "layerwise", "joint": "joint"})
"""Method -> that of `attribute_neurons`."""


def every_score(
    model: PreTrainedModel, facts: Sequence[Example], *, steps: int, seed: int
) -> Iterator[tuple[str, str, Scores]]:
    """Yield method, objective and scores of all methods."""
    for method, name in PATHS.items():
        for objective in ("logprob", "prob"):
            scores = attributed(model, facts, name, objective, steps)
            yield method, objective, scores
            if objective == "logprob":
                # The loss is the negative log-likelihood, and attribution is linear in its objective.
                yield method, "loss", {layer: -score for layer, score in scores.items()}
    for method, scores in local_scores(model, facts).items():
        yield method, "logprob", scores
    draw = torch.Generator().manual_seed(seed)
    shapes = {layer: score.shape for layer, score in scores.items()}
    yield "random", "none", {layer: torch.rand(shape, generator=draw).double() for layer, shape in shapes.items()}


def attributed(model: PreTrainedModel, facts: Sequence[Example], method: str, objective: str, steps: int) -> Scores:
    """Scores along a path, by `attribute_neurons`."""
    batches = [collate([fact], 0) for fact in facts]
    options = {
        "method": method,
        "objective": objective,
        "steps": steps,
        "rule": "midpoint",
        "max_completeness_error": None,
    }
    found = [attribute_neurons(model, [one], **options) for one in batches]
    return {name: torch.stack([each.scores[name] for each in found]) for name in found[0].scores}


def local_scores(model: PreTrainedModel, facts: Sequence[Example]) -> dict[str, Scores]:
    """Scores at the model as it is: those of the gradient of each answer's log-likelihood, and of its activations.

    Summed with its sign, weight times gradient of a column is gradient x activation; the methods that score weights
    take magnitudes first (weight saliency: WAGLE; gradient magnitude: SalUn).
    """
    layers = select_layers(model)
    rows: dict[str, dict[str, list[Tensor]]] = {}
    for fact in facts:
        batch = collate([fact], 0)
        model.zero_grad()
        with register_neuron_hooks(model, list(layers), reduce=None) as hooks:
            logits, labels = scored_logits(answer_logits(model, batch), batch["labels"])
            (-torch.nn.functional.cross_entropy(logits, labels, reduction="sum")).backward()
        # The position before each scored label is the one that predicts it.
        scored = batch["labels"][0, 1:] != IGNORED
        for name, layer in layers.items():
            activation, gradient = hooks[name].double()
            size = activation[:-1][scored].abs()
            slope = layer.weight.grad.double()
            for method, score in (
                ("gradient_activation", (activation * gradient).sum(0)),
                ("weight_saliency", (slope * layer.weight.detach()).abs().sum(0)),
                ("gradient_magnitude", slope.abs().sum(0)),
                ("activation_frequency", (size > size.mean()).double().mean(0)),
                ("activation_magnitude", size.mean(0)),
            ):
                rows.setdefault(method, {}).setdefault(name, []).append(score)
    model.zero_grad()
    return {method: {name: torch.stack(found) for name, found in each.items()} for method, each in rows.items()}


def relative(score: Tensor) -> Tensor:
    """The score over its mean magnitude; all zero stays so."""
    return score / score.abs().mean(-1, keepdim=True).clamp(min=1e-300)


def _welch(forget: Tensor, retain: Tensor) -> Tensor:
    variance = forget.var(0) / len(forget) + retain.var(0) / len(retain)
    return (forget.mean(0) - retain.mean(0)) / variance.sqrt().clamp(min=1e-300)


def _residual(forget: Tensor, retain: Tensor) -> Tensor:
    mine, theirs = forget.sum(0), retain.sum(0)
    return mine - theirs * (mine @ theirs) / (theirs @ theirs).clamp(min=1e-300)


RULES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "raw": lambda forget, retain: forget.sum(0),
        "absolute": lambda forget, retain: forget.sum(0).abs(),
        # The rule of `Attribution.contrast`.
        "contrast": lambda forget, retain: relative(forget.sum(0)) - relative(retain.sum(0)),
        "contrast_per_fact": lambda forget, retain: (
            relative(relative(forget).sum(0)) - relative(relative(retain).sum(0))
        ),
        "difference": lambda forget, retain: forget.mean(0) - retain.mean(0),
        "welch_t": _welch,
        "residual": _residual,
        "rms": lambda forget, retain: forget.square().mean(0).sqrt(),
        "both_halves": lambda forget, retain: torch.minimum(forget[::2].sum(0), forget[1::2].sum(0)),
    }
)
"""Rule -> one score per column from those of every forget fact and every retain fact, the same for all methods."""


def auc(scores: Tensor, planted: Tensor) -> float:
    """How often a planted column scores higher than another one; ties count half."""
    mine, others = scores[planted][:, None], scores[~planted]
    return ((mine > others).double() + 0.5 * (mine == others).double()).mean().item()
