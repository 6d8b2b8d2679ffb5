"""Attribution: a score for every neuron, and the selections that can be made from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from torch_simu._checks import check_choice, check_count, check_number, problem
from torch_simu._files import load_tensors, save_tensors
from torch_simu.neurons import NeuronSelection

Scope = Literal["layer", "global"]
"""Where neurons compete: within their layer, or with those of all layers."""

Dual = Literal["keep", "drop", "isolate"]
"""What becomes of dual neurons, critical for both sets: they stay, they go, or they alone are selected."""

_KIND = "Attribution"
_ESTIMATE = ("standard_error", "difference")
_SCOPES = ("layer", "global")
_DUALS = ("keep", "drop", "isolate")


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """How much every neuron supports the targets of some samples.

    Attributes:
        scores: Layer -> attribution of each neuron, summed over samples, in units of the objective. With the default
            objective, positive means that the neuron supports the targets. Shape of each: `(num_neurons,)`, float64.
        completeness_error: Layer -> the sum of the scores minus the change of the objective between zero and clean
            activation, summed over samples. A contrast has none.
        num_samples: How many samples were summed.
        provenance: How the scores came about: objective, rule, steps, method and model; nothing of the data.
        change_size: Layer -> sum over samples of the size of that change. Of each sample counts at least the share of
            the objective that rounding hides: 1e-4, or 16 roundings of the coarsest dtype (0.125 in bfloat16). A
            contrast has none.
        standard_error: Layer -> that of each score of an estimate, as if samples were drawn independently. Since they
            are spread, it is an upper bound. Shape: as `scores`.
        difference: Layer -> half of what the scores of two halves of the estimate differ by. Shape: as `scores`.

    Examples:
        >>> scores = {"mlp": torch.tensor([0.1, 2.0, -3.0, 1.0], dtype=torch.float64)}
        >>> attribution = Attribution(scores, {"mlp": 0.0}, num_samples=1, provenance={})
        >>> attribution.select(threshold=0.3)["mlp"]
        tensor([1, 3])
        >>> attribution.top(0.25)["mlp"]
        tensor([1])
    """

    scores: Mapping[str, Tensor]
    completeness_error: Mapping[str, float]
    num_samples: int
    provenance: Mapping[str, object]
    change_size: Mapping[str, float] = field(default_factory=dict)
    standard_error: Mapping[str, Tensor] = field(default_factory=dict)
    difference: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def halves(self) -> tuple[Attribution, Attribution]:
        """The scores by each half of an estimate: `one.stability(two)` tells how far it names the same neurons."""
        signed = ({at: sign * each for at, each in self.difference.items()} for sign in (1, -1))
        one, two = (Attribution(_merged(torch.add, self.scores, each), {}, self.num_samples, {}) for each in signed)
        return one, two

    @property
    def delta(self) -> Mapping[str, float]:
        """The old name of `completeness_error`."""
        return self.completeness_error

    @property
    def incompleteness(self) -> dict[str, float]:
        """Layer -> size of the completeness error per `change_size`: the share of what they explain that scores miss.

        The size of the changes, not of their sum, is what it is compared with: changes of different samples may cancel.
        """
        sizes = {layer: size for layer, size in self.change_size.items() if layer in self.completeness_error}
        return {layer: abs(self.completeness_error[layer]) / size if size else 0.0 for layer, size in sizes.items()}

    def __repr__(self) -> str:
        total = sum(score.numel() for score in self.scores.values())
        found = self.incompleteness
        missed = f", {max(found.values()):.1%} incomplete at most" if found else ""
        return f"Attribution({len(self.scores)} layers, {total} neurons, {self.num_samples} samples{missed})"

    def __add__(self, other: Attribution) -> Attribution:
        """Return the attribution of the samples of both.

        Raises:
            ValueError: If the layers differ.
        """
        if not isinstance(other, Attribution):
            return NotImplemented
        self._check_layers(other)
        scores = {layer: score + other.scores[layer] for layer, score in self.scores.items()}
        theirs = other.completeness_error
        errors = {layer: error + theirs[layer] for layer, error in self.completeness_error.items() if layer in theirs}
        provenance: dict[str, object] = {"sum": [dict(self.provenance), dict(other.provenance)]}
        sizes = {layer: size + other.change_size[layer] for layer, size in self.change_size.items() if layer in theirs}
        deviation = _merged(torch.hypot, self.standard_error, other.standard_error)
        difference = _merged(torch.add, self.difference, other.difference)
        merged = (scores, errors, self.num_samples + other.num_samples, provenance, sizes, deviation, difference)
        return Attribution(*merged)

    def select(
        self,
        threshold: float = 0.3,
        scope: Scope = "layer",
        *,
        retain: Attribution | None = None,
        dual: Dual = "keep",
    ) -> NeuronSelection:
        """Select the neurons whose score exceeds a share of the largest score.

        Args:
            threshold: The share, strictly between 0 and 1.
            scope: "layer" compares with the layer's largest score, as in the paper; "global" with the largest of all,
                as in DEPN.
            retain: Scores of the same layers on the retain set. The neurons that the same rule selects there, too, are
                dual.
            dual: Whether to keep dual neurons, as in the paper, to drop them, or to select them alone.

        Returns:
            The critical neurons. Empty, with a warning, where the largest score is not positive.

        Raises:
            ValueError: If the threshold is not in (0, 1), the scope or `dual` is unknown, the layers differ, or a score
                is not finite.
        """
        if retain is not None:
            return self._parted(retain, dual, lambda each: each.select(threshold, scope))
        check_number("threshold", threshold, high=1.0, low_open=True, high_open=True)
        check_choice("scope", scope, _SCOPES)
        self._check_finite()
        largest = {layer: score.max().item() for layer, score in self.scores.items()}
        if scope == "global":
            largest = dict.fromkeys(largest, max(largest.values()))
        if idle := [layer for layer, value in largest.items() if value <= 0]:
            wrong = f"The largest score of layer {idle[0]!r} ({len(idle)} such) is {largest[idle[0]]:.3g}"
            text = problem(wrong, "a positive one", "No neuron is selected there; check the objective's sign.")
            warnings.warn(text, UserWarning, stacklevel=2)
        return NeuronSelection.from_masks(
            {layer: (score > threshold * largest[layer]) & (score > 0) for layer, score in self.scores.items()}
        )

    def top(
        self, fraction: float, scope: Scope = "layer", *, retain: Attribution | None = None, dual: Dual = "keep"
    ) -> NeuronSelection:
        """Select the neurons with the highest scores; of equal scores, the lower index.

        Args:
            fraction: Share of the neurons, rounded to the nearest count.
            scope: "layer" takes the share of each layer; "global" of all neurons together, a budget for the model.
            retain: As in `select`.
            dual: As in `select`.

        Raises:
            ValueError: If the fraction is not in [0, 1], the scope or `dual` is unknown, the layers differ, or a score
                is not finite.
        """
        if retain is not None:
            return self._parted(retain, dual, lambda each: each.top(fraction, scope))
        check_number("fraction", fraction, high=1.0)
        check_choice("scope", scope, _SCOPES)
        self._check_finite()
        groups = [[layer] for layer in self.scores] if scope == "layer" else [list(self.scores)]
        masks: dict[str, Tensor] = {}
        for layers in groups:
            scores = torch.cat([self.scores[layer] for layer in layers])
            mask = torch.zeros(scores.shape, dtype=torch.bool)
            mask[scores.sort(descending=True, stable=True).indices[: round(fraction * scores.numel())]] = True
            parts = torch.split(mask, [self.scores[layer].numel() for layer in layers])
            masks.update(zip(layers, parts, strict=True))
        return NeuronSelection.from_masks(masks)

    def contrast(self, other: Attribution) -> Attribution:
        """Return the score over its mean magnitude, minus the other's score over its own, layer by layer.

        High where a neuron supports these samples and not the others; the result has no unit and no completeness error.

        Args:
            other: Scores of the same layers on other samples, say the retain set.

        Raises:
            ValueError: If the layers differ, or a score is not finite.
            TypeError: If `other` is no attribution.

        Examples:
            >>> forget = Attribution({"mlp": torch.tensor([1.0, 3.0]).double()}, {}, 1, {})
            >>> retain = Attribution({"mlp": torch.tensor([4.0, 4.0]).double()}, {}, 1, {})
            >>> forget.contrast(retain).scores["mlp"]
            tensor([-0.5000,  0.5000], dtype=torch.float64)
        """
        self._check_layers(other)
        self._check_finite()
        other._check_finite()
        scores = {layer: _relative(self.scores[layer]) - _relative(other.scores[layer]) for layer in self.scores}
        return Attribution(scores, {}, self.num_samples, {"contrast": [dict(self.provenance), dict(other.provenance)]})

    def stability(self, other: Attribution, fraction: float = 0.1, scope: Scope = "layer") -> float:
        """Return the share of the top neurons that are among the other's top neurons, too.

        Attribute two halves of the forget set: where their top neurons differ, a selection follows the sample more than
        the set. By chance the share is `fraction`. `a.top(fraction) & b.top(fraction)` are the stable neurons.

        Args:
            other: Scores of the same layers on other samples.
            fraction: As in `top`.
            scope: As in `top`.

        Raises:
            ValueError: As in `top`, and if no neuron is selected.

        Examples:
            >>> one = Attribution({"mlp": torch.tensor([3.0, 2.0, 1.0, 0.0]).double()}, {}, 1, {})
            >>> two = Attribution({"mlp": torch.tensor([3.0, 0.0, 1.0, 2.0]).double()}, {}, 1, {})
            >>> one.stability(two, 0.5)
            0.5
        """
        self._check_layers(other)
        if not (mine := self.top(fraction, scope)).num_selected:
            raise ValueError(problem(f"fraction {fraction} selects no neuron", "at least one", "Take a larger one."))
        return (mine & other.top(fraction, scope)).num_selected / mine.num_selected

    def save(self, path: str | Path) -> None:
        """Write the attribution to `path` (safetensors with a JSON header), whole or not at all."""
        header = {
            "layers": list(self.scores),
            "completeness_error": dict(self.completeness_error),
            "change_size": dict(self.change_size),
            "num_samples": self.num_samples,
            "provenance": dict(self.provenance),
        }
        tensors = {f"{layer}/{name}": each for name in _ESTIMATE for layer, each in getattr(self, name).items()}
        save_tensors(path, _KIND, {**self.scores, **tensors}, header)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read an attribution that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or holds something else.
        """
        tensors, header = load_tensors(path, _KIND)
        try:
            # Files of older versions say "delta".
            errors = header["completeness_error"] if "completeness_error" in header else header["delta"]
            scores = {layer: tensors[layer] for layer in cast("list[str]", header["layers"])}
            if other := [layer for layer, score in scores.items() if score.dim() != 1 or not score.is_floating_point()]:
                raise ValueError(f"the scores of layer {other[0]!r} are {scores[other[0]].dtype}")
            return cls(
                scores,
                {layer: float(error) for layer, error in cast("dict[str, float]", errors).items()},
                check_count("num_samples", header["num_samples"]),
                dict(cast("dict[str, object]", header["provenance"])),
                {layer: float(size) for layer, size in cast("dict[str, float]", header.get("change_size", {})).items()},
                *({at: tensors[f"{at}/{name}"] for at in scores if f"{at}/{name}" in tensors} for name in _ESTIMATE),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            wrong = f"File {str(path)!r} holds no consistent attribution ({error})"
            raise ValueError(problem(wrong, "what Attribution.save wrote", "The file is damaged.")) from None

    def _parted(
        self, retain: Attribution, dual: str, rule: Callable[[Attribution], NeuronSelection]
    ) -> NeuronSelection:
        check_choice("dual", dual, _DUALS)
        self._check_layers(retain)
        mine, theirs = rule(self), rule(retain)
        return {"keep": mine, "drop": mine - theirs, "isolate": mine & theirs}[dual]

    def _check_layers(self, other: Attribution) -> None:
        if not isinstance(other, Attribution):
            raise TypeError(problem(f"The other scores are of type {type(other).__name__}", "an Attribution"))
        mine, theirs = ({layer: len(score) for layer, score in each.scores.items()} for each in (self, other))
        if mine != theirs:
            different = dict(sorted(mine.items() ^ theirs.items()))
            raise ValueError(problem(f"The layers differ in {different}", "attributions of the same model and layers"))

    def _check_finite(self) -> None:
        for layer, score in self.scores.items():
            if count := int((~score.isfinite()).sum()):
                wrong = f"{count} of {score.numel()} scores of layer {layer!r} are not finite"
                raise ValueError(problem(wrong, "finite scores", "Run the model in bfloat16 or float32."))


def _merged(both: Callable[..., Tensor], one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**one, **two, **{layer: both(one[layer], two[layer]) for layer in one if layer in two}}


def _relative(score: Tensor) -> Tensor:
    size = score.abs().mean()
    # A layer without any influence stays at zero.
    return score / size if size > 0 else score
