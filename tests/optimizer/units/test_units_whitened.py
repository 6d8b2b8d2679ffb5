"""Rows are whitened by the inputs and the gradients of selected outputs: as dense inverses do it, in compact state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import mutants
from tests.optimizer.units.dense import Run, steps_match_dense_inverses
from tests.optimizer.units.mlps import LAYOUTS, Mlp, mlps
from tests.strategies import Options, float_dtypes, options, seeds
from torch_simu import SIMUOptimizer, register_neuron_hooks
from torch_simu.hooks import NeuronHooks
from torch_simu.optimizer import GradientBalance

pytestmark = pytest.mark.usefixtures("device")

CURVATURES = st.sampled_from(["neurons", "both"])
OPTIONS = Options(lr=0.05, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=0.1, clip=0.5, interval=2)


@given(mlps(chosen=True), options, seeds, CURVATURES, st.sampled_from([{}, {"capturable": True}]))
def test_a_step_is_that_of_dense_inverses(
    mlp: Mlp, options: Options, seed: int, curvature: str, extra: dict[str, Any]
) -> None:
    steps_match_dense_inverses(SIMUOptimizer, mlp, options, seed, curvature, **extra)


@given(mlps(chosen=True), options, float_dtypes, seeds, CURVATURES)
def test_off_the_units_everything_is_bit_identical(
    mlp: Mlp, options: Options, dtype: torch.dtype, seed: int, curvature: str
) -> None:
    run = Run(SIMUOptimizer, mlp, options, curvature, dtype)
    before = copy.deepcopy(dict(run.net.named_parameters()))
    run.train(seed, 0, 2)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.train(seed, 2, 4)
    for name, mask in mlp.masks().items():
        assert torch.equal(run.net.get_parameter(name)[~mask], before[name][~mask])


@given(mlps(chosen=True), options, seeds, CURVATURES)
def test_the_state_is_compact(mlp: Mlp, options: Options, seed: int, curvature: str) -> None:
    """Law 2: no factor is of the size of a layer's neurons, but for the selected ones among themselves."""
    run = Run(SIMUOptimizer, mlp, options, curvature, torch.float32)
    run.train(seed, 0, 2)
    for name, mask in mlp.masks().items():
        held = {
            key: tuple(value.shape)
            for key, value in run.optimizer.state.get(run.net.get_parameter(name), {}).items()
            if value.dim()
        }
        rows, width = int(mask.any(1 - (mlp.layout == "conv")).sum()) if mask.dim() == 2 else 0, mlp.width
        if name == "down.weight":
            factors = {"neuron_factor": len(mlp.neurons)} | ({"output_factor": width} if run.both else {})
        elif mask.dim() == 2:
            factors = {"input_factor": width} | ({"neuron_factor": rows} if run.both else {})
        else:
            factors = {}
        assert {key: shape for key, shape in held.items() if key != "exp_avg"} == {
            key: (size, size) for key, size in factors.items()
        }
        assert torch.Size(held.get("exp_avg", (0,))).numel() == mask.sum()


@given(mlps(chosen=True), float_dtypes, seeds, CURVATURES)
def test_a_reload_continues_bit_by_bit(mlp: Mlp, dtype: torch.dtype, seed: int, curvature: str) -> None:
    run, other = (Run(SIMUOptimizer, mlp, OPTIONS, curvature, dtype) for _ in range(2))
    run.train(seed, 0, 3)
    other.net.load_state_dict(run.net.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.oracles = copy.deepcopy(run.oracles)
    for each in (run, other):
        each.train(seed, 3, 5)
    assert all(torch.equal(*pair) for pair in zip(run.net.parameters(), other.net.parameters(), strict=True))


@given(mlps(chosen=True), seeds, CURVATURES, st.sampled_from([0.0, 2.0]))
def test_rows_are_balanced_by_their_whitened_gradients(mlp: Mlp, seed: int, curvature: str, weight: float) -> None:
    """Layer by layer; of a bias, which nothing whitens, by the plain gradients of everything."""
    run = Run(SIMUOptimizer, mlp, OPTIONS, curvature)
    run.train(seed, 0, 2)
    balance, found = GradientBalance(run.optimizer), {}
    with balance.forget():
        run.backward(seed + 50)
        found["forget"] = {name: run.weight(name, grad=True) for name in run.oracles}
    run.backward(seed + 60)
    found["retain"] = {name: run.weight(name, grad=True) for name in run.oracles}
    balance.combine_(retain_weight=weight)
    norms = {
        side: sum(run.oracles[name].part(grad).square().sum() for name, grad in grads.items()).sqrt()
        for side, grads in found.items()
    }
    for name, oracle in run.oracles.items():
        forget, retain = (found[side][name] for side in ("forget", "retain"))
        ratio = norms["retain"] / norms["forget"]
        if forget.dim() == 2:
            ratio = oracle.whitened(retain).norm() / oracle.whitened(forget).norm()
        wanted = weight * oracle.part(retain) + ratio * max(1.0, 0.1 / norms["retain"]) * oracle.part(forget)
        torch.testing.assert_close(oracle.part(run.weight(name, grad=True)), wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_another_selection_needs_a_refresh_and_goes_on(curvature: str) -> None:
    mlp = Mlp("gated", 3, 5, True, (1, 3), 0)
    run = Run(SIMUOptimizer, mlp, OPTIONS, curvature)
    run.train(0, 0, 2)
    new = Mlp("gated", 3, 5, True, (0, 3, 4), 0)
    run.optimizer.change_selection(new.selection, run.net)
    run.backward(4)
    with pytest.raises(RuntimeError, match="was never refreshed for these neurons"):
        run.optimizer.step()
    run.mlp, run.oracles = new, {}
    before = copy.deepcopy(dict(run.net.named_parameters()))
    run.train(0, 2, 4)
    for name, mask in new.masks().items():
        after = run.net.get_parameter(name)
        assert torch.equal(after[~mask], before[name][~mask]) and (after != before[name])[mask].all()


CASES = [Mlp(layout, 3, 4, True, (0, 2), 1) for layout in LAYOUTS]


def swaps_the_sides(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Whitens rows by the gradients of their outputs alone."""
    return lambda group: ["neuron_factor"] if group.get("rows") else original(group)


def turns_the_outputs_around(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Takes the selected outputs in another order."""

    def places(trained: Any, hooks: NeuronHooks, *, outputs: bool) -> Tensor:
        found = original(trained, hooks, outputs=outputs)
        return found.flip(0) if outputs else found

    return places


@pytest.mark.parametrize(
    ("mutant", "curvature"),
    [
        (mutants.forgets_the_damping, "neurons"),
        (mutants.whitens_nothing, "neurons"),
        (mutants.whitens_the_outputs_with_the_neurons, "neurons"),
        (mutants.whitens_the_outputs_with_the_neurons, "both"),
        (mutants.moves_by_its_own_length, "neurons"),
        (mutants.forgets_the_covariance_before, "both"),
    ],
)
def test_a_wrong_step_is_seen(mutant: Any, curvature: str) -> None:
    with mutants.implementation(mutant) as implementation, pytest.raises(AssertionError):
        for mlp in CASES:
            steps_match_dense_inverses(implementation, mlp, OPTIONS, 0, curvature)


@pytest.mark.parametrize(("mutant", "name"), [(swaps_the_sides, "factor_keys"), (turns_the_outputs_around, "_places")])
def test_wrong_sides_are_seen(mutant: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_simu.optimizer.curvature import factors

    monkeypatch.setattr(factors, name, mutant(getattr(factors, name)))
    with pytest.raises(AssertionError):
        for mlp in CASES:
            steps_match_dense_inverses(SIMUOptimizer, mlp, OPTIONS, 0, "both")


class TestErrors:
    def test_a_group_that_says_otherwise_than_its_layer_is_refused(self) -> None:
        mlp = CASES[LAYOUTS.index("gated")]
        for mark, message in (({}, "selects outputs of layer 'up'"), ({"rows": True}, "selects inputs of layer 'up'")):
            net = mlp.make()
            group = {"params": [net.up.weight], "neurons": [[1]], "neuron_dim": -1 if mark else 0, **mark}
            optimizer = SIMUOptimizer([group], curvature="neurons")
            with register_neuron_hooks(net, ["up"], reduce="covariance") as hooks:
                net(torch.ones(2, 3)).sum().backward()
            with pytest.raises(ValueError, match=message):
                optimizer.update_curvature(hooks)

    def test_hooks_that_see_too_little_are_refused(self) -> None:
        mlp = CASES[LAYOUTS.index("gated")]
        run = Run(SIMUOptimizer, mlp, OPTIONS, "both")
        layers = {"down": mlp.selection["down"], "gate": torch.arange(3), "up": torch.arange(3)}
        for less, message in (
            ({"layers": {**layers, "up": torch.arange(2)}}, "layer 'up' see 2 of its 3 inputs, expected all"),
            ({"outputs": {"up": torch.tensor([1, 2])}}, "layer 'up' see 2 outputs, and not all that train"),
        ):
            options = {"layers": layers, "outputs": True, **less}
            hooks = register_neuron_hooks(run.net, options["layers"], reduce="covariance", outputs=options["outputs"])
            with hooks:
                run.backward(0)
            with pytest.raises(ValueError, match=message):
                run.optimizer.update_curvature(hooks)

    def test_outputs_of_a_layer_without_a_hook_are_refused(self) -> None:
        net = CASES[0].make()
        with pytest.raises(ValueError, match="outputs names layer 'up', expected layers that are hooked"):
            register_neuron_hooks(net, ["down"], reduce="covariance", outputs={"up": torch.tensor([0])})
