"""DemoRecipe: the sizes and choices of the demo."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.demo.memorize import TrainConfig

SHORT_ATTACK = AttackConfig(rates=(2e-4, 1e-3), steps=30, interval=10, batch_size=24, eval_batch_size=128)
"""An attack that takes a small part of the demo's time."""

# Step size and curvature scale of each method: the best of eight by retain EM on seeds that the demo does not show,
# from benchmarks/results/demo_tuning_cpu_202611.json; of simu the defaults.
_TUNED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "simu": {"lr": 0.04, "fraction": 1.0},
        "fo_graddiff": {"lr": 7e-5},
        "so_graddiff": {"lr": 5e-5, "rho": 100.0},
        "simu_graddiff": {"lr": 1e-3, "rho": 100.0},
        "random_neurons": {"lr": 5e-4, "rho": 0.04},
        "all_neurons": {"lr": 1e-4, "rho": 0.04},
        "attention_only": {"lr": 2e-4, "rho": 100.0},
    }
)


def _shared_choices() -> UnlearnConfig:
    return UnlearnConfig(
        retain_weight=1.0,
        fraction=0.1,
        hessian_interval=5,
        attribution_steps=5,
        max_completeness_error=None,
        forget_batch_size=24,
        retain_batch_size=24,
        hessian_batch_size=24,
        max_steps=250,
        monitor_interval=10,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecipe:
    """The sizes and choices of the demo.

    Args:
        num_forget: Fictional people to forget, with four facts each.
        retain_per_forget: Retain people for each of them.
        num_places: Fictional places, the world facts.
        topic_share: How far the forget people have a topic of their own; see `make_corpus`.
        d_model: Width of the model.
        d_ff: Neurons of each layer.
        num_layers: Layers.
        training: How the model memorizes.
        unlearning: What all methods have in common.
        tuned: Method -> its own values of the configuration, say `lr`.
        attack: How every model is taught a third of the forget rows again, to see what comes back of the others; None:
            it is not.
    """

    num_forget: int = 20
    retain_per_forget: int = 3
    num_places: int = 27
    topic_share: float = 0.95
    d_model: int = 96
    d_ff: int = 1536
    num_layers: int = 2
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=36))
    unlearning: UnlearnConfig = field(default_factory=_shared_choices)
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: _TUNED)
    attack: AttackConfig | None = field(default_factory=lambda: SHORT_ATTACK)

    def to_json(self) -> dict[str, object]:
        """Return the values as JSON knows them."""
        values = dataclasses.asdict(dataclasses.replace(self, tuned={}))
        return {**values, "tuned": {method: dict(own) for method, own in self.tuned.items()}}
