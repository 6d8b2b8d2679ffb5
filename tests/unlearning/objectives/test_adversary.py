"""The adversary relearns apart from the model, which is given back to the last bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.strategies import float_dtypes, layers, normal, seeds
from tests.unlearning.test_driver import FAST, _memorized, run
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.adversary import Adversary


def trained(layer, dtype, lr=0.1, interval=3):
    param = nn.Parameter(layer.weight(dtype))
    group = {"params": [param], "neurons": [list(layer.neurons)], "neuron_dim": layer.dim}
    return param, Adversary(SIMUOptimizer([group]), lr=lr, interval=interval)


@given(layers().filter(lambda layer: bool(layer.neurons)), float_dtypes, seeds)
def test_the_model_comes_back_to_the_last_bit_and_the_copy_differs_in_selected_entries_only(layer, dtype, seed):
    param, adversary = trained(layer, dtype)
    before = param.detach().clone()
    target = normal(seed, *param.shape, dtype=dtype)
    adversary.relearn(0, lambda: (param * target).sum())
    assert torch.equal(param, before) and param.grad is None
    with pytest.raises(ValueError, match="broken"), adversary.in_place():
        assert torch.equal(param[~layer.mask()], before[~layer.mask()])
        assert (param != before)[layer.mask()].any()
        raise ValueError("broken")
    assert torch.equal(param, before)


def test_its_steps_are_those_of_adamw_on_a_copy_that_starts_anew() -> None:
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    adversary = Adversary(torch.optim.SGD([param], lr=1.0), lr=0.1, interval=2)
    for number in range(5):
        if number % 2 == 0:
            twin = nn.Parameter(param.detach().clone())
            adam = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
        loss = twin.square().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([twin], 1.0)
        adam.step()
        adam.zero_grad()
        adversary.relearn(number, lambda param=param: param.square().sum())
        with adversary.in_place():
            torch.testing.assert_close(param.detach(), twin.detach())
        with torch.no_grad():
            # The run goes on.
            param += 1


@pytest.mark.parametrize("rate", [0.1, "auto"])
def test_a_step_whose_gradient_is_not_finite_is_left_out(rate) -> None:
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    adversary, twin = (Adversary(torch.optim.SGD([param], lr=1.0), lr=rate) for _ in range(2))
    for each in (adversary, twin):
        each.relearn(0, lambda: param.square().sum())
    adversary.relearn(1, lambda: (param * torch.tensor([math.inf, 1.0])).sum())
    for each in (adversary, twin):
        each.relearn(2, lambda: param.square().sum())
    with adversary.in_place():
        copied = param.detach().clone()
        assert copied.isfinite().all()
    with twin.in_place():
        assert torch.equal(param.detach(), copied)


def steps_take_three_tenths_of_the_loss(make, scale):
    """By hand: AdamW at a rate that a step along the signs of the gradient would take three tenths of the loss by."""
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    adversary = make(torch.optim.SGD([param], lr=1.0), lr="auto", interval=9)
    twin = nn.Parameter(param.detach().clone())
    adam = torch.optim.AdamW([twin], lr=1.0, weight_decay=0.0)
    for number in range(4):
        loss = scale * twin.square().sum()
        loss.backward()
        adam.param_groups[0]["lr"] = 0.3 * loss.item() / twin.grad.abs().sum().item()
        torch.nn.utils.clip_grad_norm_([twin], 1.0)
        adam.step()
        adam.zero_grad()
        adversary.relearn(number, lambda: scale * param.square().sum())
        with adversary.in_place():
            torch.testing.assert_close(param.detach(), twin.detach())


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_an_automatic_rate_is_that_which_takes_three_tenths_of_the_loss(scale) -> None:
    steps_take_three_tenths_of_the_loss(Adversary, scale)


class FollowsTheNorm(Adversary):
    """Takes the Euclidean norm for the sum of magnitudes."""

    def _pace(self, loss):
        norm = torch.nn.utils.get_total_norm([value.grad for value in self._values.values()]).item()
        self._steps.param_groups[0]["lr"] = 0.3 * loss.item() / norm


class KeepsOneRate(Adversary):
    """Takes a number for all models."""

    def _pace(self, loss):
        self._steps.param_groups[0]["lr"] = 0.2


@pytest.mark.parametrize("mutant", [FollowsTheNorm, KeepsOneRate])
def test_another_automatic_rate_is_seen(mutant) -> None:
    with pytest.raises(AssertionError):
        steps_take_three_tenths_of_the_loss(mutant, 1.0)


def test_an_automatic_rate_stands_still_where_there_is_nothing_to_learn() -> None:
    param = nn.Parameter(torch.zeros(2))
    adversary = Adversary(torch.optim.SGD([param], lr=1.0), lr="auto")
    adversary.relearn(0, lambda: param.square().sum())
    with adversary.in_place():
        assert torch.equal(param.detach(), torch.zeros(2))


def test_a_rate_that_is_none_is_refused() -> None:
    for rate, kind, message in (
        ("automatic", ValueError, "lr is 'automatic', expected a number above 0 or \"auto\""),
        (0.0, ValueError, 'lr is 0.0, .* Or take "auto"'),
        (float("nan"), ValueError, 'lr is nan, .* Or take "auto"'),
        (True, TypeError, 'lr is True .* Or take "auto"'),
    ):
        with pytest.raises(kind, match=message):
            Adversary(torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0), lr=rate)


def test_with_a_model_all_its_weights_relearn_and_what_requires_a_gradient_stays_so() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model.requires_grad_(False)
    model[1].weight.requires_grad_(True)
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model).requires_grad_(True)
    adversary = Adversary(torch.optim.SGD([model[1].weight], lr=1.0), lr=0.1, interval=9, model=model)
    adam = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.0)
    for number in range(3):
        twin(torch.ones(2, 3)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        adversary.relearn(number, lambda: model(torch.ones(2, 3)).square().sum())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, param in model.named_parameters() if param.requires_grad] == ["1.weight"]
    assert all(param.grad is None for param in model.parameters())
    with adversary.in_place():
        for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, expected)


def test_a_saved_adversary_goes_on_to_the_same_bits() -> None:
    whole, resumed = (nn.Parameter(torch.tensor([3.0, -2.0])) for _ in range(2))
    first, second = (Adversary(torch.optim.SGD([each], lr=1.0), lr=0.1, interval=9) for each in (whole, resumed))
    for number in range(2):
        first.relearn(number, lambda: whole.square().sum())
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    for each, param in ((first, whole), (second, resumed)):
        each.relearn(2, lambda param=param: param.square().sum())
    with first.in_place(), second.in_place():
        assert torch.equal(whole, resumed)
    second.load({})


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0.1, "interval": 0}])
def test_numbers_that_are_not_positive_are_refused(options) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[-1]} is 0"):
        Adversary(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), **options)


@pytest.mark.parametrize(
    ("curvature", "scope", "rate"),
    [("neurons", "trained", 1e-3), ("both", "trained", "auto"), ("both", "all", 1e-3), ("both", "all", "auto")],
)
def test_a_run_with_an_adversary_is_resumed_to_the_same_bits(curvature, scope, rate, tmp_path) -> None:
    model, examples = _memorized()
    relearning = {"adversary_lr": rate, "adversary_interval": 4, "adversary_scope": scope}
    config = FAST.updated(method="simu", lr=0.05, curvature=curvature, checkpoint_interval=3, **relearning)
    whole, killed, resumed, plain = (copy.deepcopy(model) for _ in range(4))
    expected = run(whole, examples, config)
    run(killed, examples, config.updated(max_steps=3), checkpoint=tmp_path / "run")
    done = run(resumed, examples, config, checkpoint=tmp_path / "run")
    assert done.log == expected.log
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    run(plain, examples, config.updated(adversary_lr=None))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", ["npo", "simnpo", "probability"])
@pytest.mark.parametrize("retain_term", ["nll", "kl"])
def test_every_objective_forgets_and_is_resumed_to_the_same_bits(name, retain_term, tmp_path) -> None:
    model, examples = _memorized()
    layers = [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    selection = NeuronSelection({layer: range(60) for layer in layers}, dict.fromkeys(layers, 64))
    config = FAST.updated(
        method="simu", paced=False, objective=name, retain_term=retain_term, lr=0.3, max_steps=12, checkpoint_interval=5
    )
    whole, killed, resumed = (copy.deepcopy(model) for _ in range(3))
    expected = run(whole, examples, config, selection=selection)
    assert expected.log[-1]["forget_probability"] < 0.9 * expected.log[0]["forget_probability"]
    run(killed, examples, config.updated(max_steps=5), checkpoint=tmp_path / "run", selection=selection)
    run(resumed, examples, config, checkpoint=tmp_path / "run", selection=selection)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_weights_that_are_spread_over_processes_are_refused() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="spread over processes, expected whole ones"):
            Adversary(torch.optim.SGD([spread], lr=1.0), lr=0.1)
    finally:
        distributed.destroy_process_group()
