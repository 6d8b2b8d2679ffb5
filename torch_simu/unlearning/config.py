"""UnlearnConfig: every choice of an unlearning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from torch_simu._checks import check_choice, check_count, check_number, check_pattern, problem
from torch_simu.attribution.estimate.limit import budget_of
from torch_simu.unlearning.adversary import check_rate
from torch_simu.unlearning.objectives import OBJECTIVES, RETAIN_TERMS, RETAIN_WEIGHT

Where = Literal["all", "critical", "random", "every_neuron", "attention"]
"""Which weights train: all of them, critical neurons, as many random ones, all neurons, or attention projections."""

MethodName = Literal[
    "simu", "fo_graddiff", "so_graddiff", "simu_graddiff", "random_neurons", "all_neurons", "attention_only"
]
"""The methods, under the names they have in reports."""

Curvature = Literal["gnb", "neurons", "both"]
"""Where the curvature of a second-order method comes from; see `SIMUOptimizer`."""

CovarianceSets = Literal["forget", "both"]
"""Which rows of a step covariances are of: those to forget, or those and the ones to keep."""

Rule = Literal["contrast", "top", "threshold"]
"""How critical neurons are chosen; `choose_neurons` says what each does."""

RULES: tuple[Rule, ...] = get_args(Rule)

METHODS: Mapping[str, tuple[Literal["first", "second"], Where]] = MappingProxyType(
    {
        "simu": ("second", "critical"),
        "fo_graddiff": ("first", "all"),
        "so_graddiff": ("second", "all"),
        "simu_graddiff": ("second", "critical"),
        "random_neurons": ("second", "random"),
        "all_neurons": ("second", "every_neuron"),
        "attention_only": ("second", "attention"),
    }
)
"""Method -> (order of the optimizer: AdamW or Sophia, which weights train)."""

_PUBLISHED: Mapping[str, object] = MappingProxyType(
    {
        "objective": "grad_diff",
        "balance": False,
        "curvature": "gnb",
        "covariance_of": "forget",
        "fraction": 0.1,
        "lr": 1e-4,
        "betas": (0.965, 0.99),
        "hessian_interval": 10,
        "paced": False,
    }
)
"""What the published methods leave open, as the optimizer has it."""

_SIMU: Mapping[str, object] = MappingProxyType(
    {
        "objective": "probability",
        "balance": True,
        "curvature": "both",
        "covariance_of": "both",
        "fraction": 1.0,
        "lr": 0.04,
        "betas": (0.9, 0.8),
        "hessian_interval": 5,
        "paced": True,
    }
)
"""What forgets for longest in our measurements."""


def own_choices(method: str) -> Mapping[str, object]:
    """Return the values that a method has where the configuration says nothing.

    Examples:
        >>> own_choices("simu")["objective"], own_choices("simu_graddiff")["objective"]
        ('probability', 'grad_diff')
    """
    return _SIMU if method == "simu" else _PUBLISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearnConfig:
    """Every choice of an unlearning run. None stands for the method's own value (`own_choices`); `lr` wants tuning.

    Args:
        method: What is updated and how; see `METHODS`.
        objective: What is descended: one of `torch_simu.unlearning.objectives.OBJECTIVES`.
        retain_weight: Weight of the retain loss.
        retain_term: "nll" for the objective's own, or "kl" for the divergence from the model before the first step on
            retain rows.
        rehearsal: So many rows the model writes itself before the first step; as many of them as retain rows are kept
            beside these in each step. See `rehearse`.
        balance: Whether the forget gradient is brought to the norm of the retain gradient; see `GradientBalance`.
        adversary_lr: Learning rate of a copy of weights that relearns the forget set while it is forgotten, or "auto";
            the forget gradient is taken there then. None: there is no adversary. See `Adversary`.
        adversary_scope: Which weights that copy is of: "trained", or "all", which lasts longer and takes the memory of
            more models.
        adversary_interval: Steps after which that copy starts anew.
        rule: How critical neurons are chosen: "contrast" (forget score against retain score), "top" (largest forget
            scores), both up to `fraction`; or "threshold" (the paper's rule, share of the layer's largest score).
        fraction: Share of neurons that "contrast", "top" and random neurons select.
        threshold: Share of the largest score for the rule "threshold".
        scope: Whether neurons compete within their "layer" or over all layers ("global").
        attention: Whether attention projections train too: "frozen", or "full" as in the paper.
        units: Whether the rows of the gate and up projections that make the chosen neurons train, too.
        layers: Regular expression for the down projections; None: known from the model type.
        attribution_method: As `method` of `attribute_neurons`.
        attribution_steps: Path steps of the attribution.
        attribution_budget: What the attribution of each set may cost: a number of passes, or a time as "90s", "10m" or
            "1.5h"; see `budget` of `attribute_neurons`. None: all `attribution_steps`.
        max_completeness_error: As in `attribute_neurons`: scores of a layer that miss a larger share are refused.
        attribution_rows: At most this many retain rows are attributed for the contrast, evenly spread.
        curvature: "gnb" (Sophia's diagonal on retain batches), or covariances: of the "neurons", or of outputs, too
            ("both").
        damping: As in `SIMUOptimizer`, for the covariances.
        covariance_of: Which rows covariances are of: those to "forget", or "both" sets of a step.
        lr: Step size: the largest change of one weight per step (Sophia), of a layer as a share of its norm (with a
            curvature from covariances), or AdamW's learning rate.
        paced: Whether `lr` is the largest step size only, and the run begins with a hundredth of it and lengthens or
            shortens its steps by how fast the forget set is forgotten; see `paced_rate`.
        betas: Decay of momentum and curvature (Sophia); AdamW keeps (0.9, 0.999).
        rho: Curvature scale.
        weight_decay: Decoupled decay of the trained weights.
        clip: Bound of the ratio of momentum and curvature.
        hessian_interval: Steps between two refreshes of the curvature.
        forget_batch_size: Forget rows per step.
        retain_batch_size: Retain rows per step.
        hessian_batch_size: Retain rows per refresh.
        eval_batch_size: Rows per forward pass of the measurements between steps.
        max_steps: Steps at most.
        forget_target: Stop when the mean probability of the forget answers is at most this; None: never.
        eval_interval: Steps between two measurements of that probability.
        eval_rows: At most this many forget rows are measured then, evenly spread; all of them where these say that the
            target is reached.
        monitor_interval: Steps between two measurements of the monitored sets.
        checkpoint_interval: Steps between two checkpoints, where there is a place for them.
        seed: Of batches, random neurons and sampled labels.

    Raises:
        ValueError: If a value is out of bounds or a name unknown.
        TypeError: If a value has a wrong type.

    Examples:
        >>> UnlearnConfig(lr=2e-3).updated(fraction=0.05).fraction
        0.05
    """

    method: MethodName = "simu"
    objective: str = None  # type: ignore[assignment]
    retain_weight: float = RETAIN_WEIGHT
    retain_term: Literal["nll", "kl"] = "nll"
    rehearsal: int = 0
    balance: bool = None  # type: ignore[assignment]
    adversary_lr: float | Literal["auto"] | None = None
    adversary_scope: Literal["trained", "all"] = "trained"
    adversary_interval: int = 20
    rule: Rule = "contrast"
    fraction: float = None  # type: ignore[assignment]
    threshold: float = 0.3
    scope: Literal["layer", "global"] = "layer"
    attention: Literal["frozen", "full"] = "frozen"
    units: bool = False
    layers: str | None = None
    attribution_method: Literal["auto", "packed", "decode", "prefix", "layerwise", "joint"] = "auto"
    attribution_steps: int = 10
    attribution_budget: int | str | None = None
    max_completeness_error: float | None = 0.2
    attribution_rows: int = 400
    curvature: Curvature = None  # type: ignore[assignment]
    damping: float = 0.1
    covariance_of: CovarianceSets = None  # type: ignore[assignment]
    lr: float = None  # type: ignore[assignment]
    paced: bool = None  # type: ignore[assignment]
    betas: tuple[float, float] = None  # type: ignore[assignment]
    rho: float = 0.04
    weight_decay: float = 0.0
    clip: float = 1.0
    hessian_interval: int = None  # type: ignore[assignment]
    forget_batch_size: int = 16
    retain_batch_size: int = 16
    hessian_batch_size: int = 16
    eval_batch_size: int = 128
    max_steps: int = 200
    forget_target: float | None = 0.1
    eval_interval: int = 1
    eval_rows: int = 100
    monitor_interval: int = 5
    checkpoint_interval: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        for name, value in own_choices(self.method).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("retain_term", self.retain_term, RETAIN_TERMS)
        check_choice("curvature", self.curvature, get_args(Curvature))
        check_choice("covariance_of", self.covariance_of, get_args(CovarianceSets))
        check_choice("rule", self.rule, RULES)
        check_choice("scope", self.scope, ("layer", "global"))
        check_choice("attention", self.attention, ("frozen", "full"))
        check_choice("adversary_scope", self.adversary_scope, ("trained", "all"))
        check_number("fraction", self.fraction, high=1.0, low_open=True)
        check_number("threshold", self.threshold, high=1.0, low_open=True, high_open=True)
        for name in ("retain_weight", "lr", "rho", "weight_decay"):
            check_number(name, getattr(self, name))
        check_number("clip", self.clip, low_open=True)
        check_number("damping", self.damping, low_open=True)
        if self.adversary_lr is not None:
            check_rate("adversary_lr", self.adversary_lr)
        if self.whitened and not (self.second_order and self.trains_neurons):
            wrong = f"curvature is {self.curvature!r} for method {self.method!r}"
            raise ValueError(problem(wrong, "'gnb'", "Covariances of neurons need a method that trains neurons."))
        if self.units and not self.trains_neurons:
            wrong = f"units is True for method {self.method!r}"
            raise ValueError(problem(wrong, "False", "Units are neurons with what makes them; take such a method."))
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise ValueError(problem(f"betas is {self.betas!r}", "two numbers in [0, 1)"))
        for number, beta in enumerate(self.betas):
            check_number(f"betas[{number}]", beta, high=1.0, high_open=True)
        if self.layers is not None:
            check_pattern(self.layers)
        if self.max_completeness_error is not None:
            check_number("max_completeness_error", self.max_completeness_error)
        if self.attribution_budget is not None:
            budget = budget_of(self.attribution_budget)
            if isinstance(budget, int):
                # The same run, however its passes were written.
                object.__setattr__(self, "attribution_budget", budget)
        if self.forget_target is not None:
            check_number("forget_target", self.forget_target, high=1.0)
        for field in dataclasses.fields(self):
            if field.name.endswith(("_size", "_steps", "_interval", "_rows")):
                check_count(field.name, getattr(self, field.name))
        for name in ("rehearsal", "seed"):
            check_count(name, getattr(self, name), low=0)

    @property
    def second_order(self) -> bool:
        """Whether the method steps with Sophia; else with AdamW."""
        return METHODS[self.method][0] == "second"

    @property
    def where(self) -> Where:
        """Which weights the method trains."""
        return METHODS[self.method][1]

    @property
    def whitened(self) -> bool:
        """Whether the curvature is a covariance from hooks."""
        return self.curvature != "gnb"

    @property
    def trains_neurons(self) -> bool:
        """Whether the method trains columns of down projections, and no whole weights but attention's."""
        return self.where not in ("all", "attention")

    def updated(self, **changes: object) -> UnlearnConfig:
        """Return a copy with some values changed, checked anew; what was a method's own is that of a new method."""
        if "method" in changes:
            before = own_choices(self.method)
            changes = {name: None for name, value in before.items() if getattr(self, name) == value} | changes
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, object]:
        """Return the values as JSON knows them."""
        return dataclasses.asdict(self)
