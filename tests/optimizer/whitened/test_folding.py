"""A refresh folds in layer by layer, all of them or none, and lets what hooks summed up go where it is asked to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.strategies import normal
from torch_simu import SIMUOptimizer
from torch_simu.hooks import NeuronHooks
from torch_simu.optimizer import covariance_hooks
from torch_simu.optimizer.curvature import updates


class Recorded:
    """Three layers, of which hooks recorded a batch."""

    def __init__(self) -> None:
        self.net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)])
        with torch.no_grad():
            for number, layer in enumerate(self.net):
                layer.weight.copy_(normal(number, 4, 4))
        groups = [{"params": [layer.weight for layer in self.net], "neurons": [None, [0, 2], None]}]
        self.optimizer = SIMUOptimizer(groups, curvature="both")
        self.hooks = self.record()

    def record(self) -> NeuronHooks:
        """Hooks that recorded a batch."""
        with covariance_hooks(self.net, self.optimizer) as hooks:
            self.net(normal(5, 6, 4)).square().sum().backward()
        return hooks

    def sums(self) -> dict[str, Tensor]:
        """What the hooks hold."""
        inputs = {f"{name} in": self.hooks[name] for name in self.hooks if self.hooks.recorded(name)}
        return inputs | {f"{name} out": total for name, total in self.hooks.outputs.items()}

    def factors(self) -> dict[str, Tensor]:
        """Those of all layers."""
        found = enumerate(self.optimizer.state[layer.weight] for layer in self.net)
        return {f"{number} {key}": value for number, state in found for key, value in state.items() if "factor" in key}


def test_a_refresh_leaves_what_hooks_recorded_as_it_was() -> None:
    run = Recorded()
    before = {name: total.clone() for name, total in run.sums().items()}
    run.optimizer.update_curvature(run.hooks)
    after = run.sums()
    assert len(before) == 6 and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_refresh_that_resets_gives_the_same_factors_and_lets_each_layer_go_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, other = Recorded(), Recorded()
    other.optimizer.update_curvature(other.hooks)
    held: list[list[str]] = []
    fold = updates.fold_factors
    monkeypatch.setattr(updates, "fold_factors", lambda *args: (held.append(sorted(run.sums())), fold(*args))[1])
    run.optimizer.update_curvature(run.hooks, reset=True)
    assert held == [["1 in", "1 out", "2 in", "2 out"], ["2 in", "2 out"], []]
    expected = other.factors()
    assert len(expected) == 6 and all(torch.equal(factor, expected[name]) for name, factor in run.factors().items())


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("which", ["_records", "_outputs"])
def test_a_sum_of_the_last_layer_that_is_not_finite_keeps_the_first_from_being_folded_in(
    which: str, refreshed: bool
) -> None:
    run = Recorded()
    if refreshed:
        run.optimizer.update_curvature(run.hooks)
    before = {name: factor.clone() for name, factor in run.factors().items()}
    records: dict[str, Any] = getattr(run.hooks, which)
    records["2"].total[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="this refresh changed nothing"):
        run.optimizer.update_curvature(run.hooks, reset=True)
    after = run.factors()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not run.sums()


def test_a_look_at_the_first_layer_alone_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = updates.Guard.passes
    monkeypatch.setattr(
        updates.Guard, "passes", lambda self, entries, groups, what: guard(self, [next(iter(entries))], groups, what)
    )
    with pytest.raises(pytest.fail.Exception):
        test_a_sum_of_the_last_layer_that_is_not_finite_keeps_the_first_from_being_folded_in("_records", False)
