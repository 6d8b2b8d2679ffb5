"""Whitened steps go with what layers and loops come as: codes, half precision, experts, checkpoints, compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from tests.optimizer.whitened import whitened
from tests.quantized import eight_bit, four_bit
from tests.strategies import Layer, Options, normal
from torch_simu import NeuronSelection, SIMUOptimizer, attach_deltas, register_neuron_hooks
from torch_simu.bitsandbytes.layers import decoded_weight
from torch_simu.hooks import NeuronHooks
from torch_simu.whitening import damped_cholesky, whiten

NEURONS, WIDTH = 64, 16
CHOSEN = NeuronSelection({"0": [1, 4, 30, 63]}, {"0": NEURONS})
QUANTIZED = {"8bit": eight_bit, "4bit": four_bit}


def refreshed(optimizer: SIMUOptimizer, hooks: NeuronHooks) -> None:
    """Refresh where it is due, and step."""
    if optimizer.hessian_due:
        optimizer.update_curvature(hooks)
    optimizer.step()


def hooked(model: nn.Module, select: Any, curvature: str = "neurons") -> NeuronHooks:
    return register_neuron_hooks(model, select, reduce="covariance", outputs=curvature == "both")


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_deltas_beside_codes_take_the_steps_of_the_decoded_weight(kind: str, curvature: str) -> None:
    quantized = nn.Sequential(QUANTIZED[kind](0, NEURONS, WIDTH, bias=False)).train()
    decoded = nn.Sequential(nn.Linear(NEURONS, WIDTH, bias=False))
    with torch.no_grad():
        decoded[0].weight.copy_(decoded_weight(quantized[0]))
    start = decoded[0].weight.detach().clone()
    delta = attach_deltas(quantized, CHOSEN)["0"]
    codes = {name: value.clone() for name, value in quantized.state_dict().items() if not name.endswith("delta")}
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.8), "hessian_interval": 2, "curvature": curvature}
    runs = (
        (quantized, SIMUOptimizer([delta], **options)),
        (decoded, SIMUOptimizer(CHOSEN.param_groups(decoded), **options)),
    )
    for step in range(5):
        for model, optimizer in runs:
            optimizer.zero_grad()
            with hooked(model, CHOSEN, curvature) as hooks:
                (model(normal(2 * step, 8, NEURONS)) * normal(2 * step + 1, 8, WIDTH)).sum().backward()
            refreshed(optimizer, hooks)
    change = (decoded[0].weight.detach() - start)[:, CHOSEN["0"]]
    torch.testing.assert_close(delta.detach(), change, rtol=1e-3, atol=1e-5)
    assert change.norm() > 0.1 * start[:, CHOSEN["0"]].norm()
    after = quantized.state_dict()
    assert all(torch.equal(after[name], value) for name, value in codes.items())


class Half:
    """A bfloat16 weight, and a float32 one of the same values, with the same gradients and factors."""

    def __init__(self, **options: Any) -> None:
        layer = nn.Linear(NEURONS, WIDTH, bias=False, dtype=torch.bfloat16)
        self.short, self.wide = nn.Sequential(layer), nn.Sequential(nn.Linear(NEURONS, WIDTH, bias=False))
        with torch.no_grad():
            # Between one and two, so that all have the same spacing.
            layer.weight.copy_(1 + normal(0, WIDTH, NEURONS).sigmoid())
            self.wide[0].weight.copy_(layer.weight)
        common = {"hessian_interval": 100, "curvature": "neurons"}
        own = {key: options.pop(key) for key in ("master_weights", "stochastic_rounding") if key in options}
        self.optimizer = SIMUOptimizer(CHOSEN.param_groups(self.short), **common, **options, **own)
        self.reference = SIMUOptimizer(CHOSEN.param_groups(self.wide), **common, **options)
        for model, optimizer in ((self.short, self.optimizer), (self.wide, self.reference)):
            inputs = normal(1, 8, NEURONS).bfloat16()
            with hooked(model, CHOSEN) as hooks:
                model(inputs.to(model[0].weight.dtype)).sum().backward()
            optimizer.update_curvature(hooks)

    def step(self, number: int) -> None:
        grad = normal(number, WIDTH, NEURONS).bfloat16()
        self.short[0].weight.grad, self.wide[0].weight.grad = grad, grad.float()
        self.optimizer.step()
        self.reference.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_master_weights_take_the_steps_of_float32_weights(decay: float) -> None:
    run = Half(lr=1e-3, weight_decay=decay, master_weights=True)
    for number in range(4):
        run.step(10 + number)
    wide = run.wide[0].weight.detach()[:, CHOSEN["0"]]
    assert torch.equal(run.optimizer.state[run.short[0].weight]["master"], wide)
    assert torch.equal(run.short[0].weight.detach()[:, CHOSEN["0"]], wide.bfloat16())


def test_stochastic_rounding_moves_weights_by_steps_below_their_spacing() -> None:
    moved = {}
    for rounds in (False, True):
        run = Half(lr=5e-4, betas=(0.0, 0.9), stochastic_rounding=rounds)
        before = run.short[0].weight.detach().clone()
        run.step(10)
        after, exact = run.short[0].weight.detach(), run.wide[0].weight.detach()
        moved[rounds] = int((after != before).sum())
        assert ((after.float() - exact).abs() < 2.0**-7).all()
    assert moved[False] == 0
    assert moved[True] > 0


def test_an_expert_that_no_token_reached_keeps_its_factor() -> None:
    experts = nn.ModuleDict({name: nn.Linear(6, 3, bias=False) for name in ("called", "idle")})
    selection = NeuronSelection({"called": [0, 2], "idle": [1, 3, 5]}, {"called": 6, "idle": 6})
    optimizer = SIMUOptimizer(selection.param_groups(experts), lr=0.1, betas=(0.5, 0.5), curvature="both")
    factors = []
    for number, names in enumerate((("called", "idle"), ("called",), ("called", "idle"))):
        optimizer.zero_grad()
        with hooked(experts, selection, "both") as hooks:
            sum(experts[name](normal(number, 5, 6)).square().sum() for name in names).backward()
        optimizer.update_curvature(hooks)
        kept = optimizer.state[experts["idle"].weight]
        factors.append([kept[key].clone() for key in ("neuron_factor", "output_factor", "weight_norm")])
        before = experts["idle"].weight.detach().clone()
        optimizer.step()
        assert torch.equal(experts["idle"].weight, before) == ("idle" not in names)
    assert torch.equal(factors[0][0], factors[1][0]) and torch.equal(factors[0][1], factors[1][1])
    assert not torch.equal(factors[1][0], factors[2][0])


def test_an_expert_that_is_reached_late_is_whitened_by_what_was_seen_then() -> None:
    experts = nn.ModuleDict({name: nn.Linear(6, 3, bias=False) for name in ("called", "idle")})
    selection = NeuronSelection({"called": [0, 2], "idle": [1, 3, 5]}, {"called": 6, "idle": 6})
    optimizer = SIMUOptimizer(selection.param_groups(experts), lr=0.1, betas=(0.0, 0.9), curvature="neurons")
    weight = experts["idle"].weight
    for number, names in enumerate((("called",), ("called", "idle"))):
        optimizer.zero_grad()
        with hooked(experts, selection) as hooks:
            sum(experts[name](normal(number, 5, 6)).square().sum() for name in names).backward()
        optimizer.update_curvature(hooks)
        before = weight.detach().clone()
        optimizer.step()
    neurons = selection["idle"]
    rows = normal(1, 5, 6)[:, neurons]
    direction = whiten(weight.grad[:, neurons], damped_cholesky(rows.T @ rows / 5, damping=0.1))
    expected = -0.1 * before[:, neurons].norm() * direction / direction.norm()
    torch.testing.assert_close((weight.detach() - before)[:, neurons], expected, rtol=1e-3, atol=1e-5)


def test_a_step_of_size_zero_before_the_first_refresh_makes_room_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = SIMUOptimizer(
        [{"params": [model[0].weight], "neurons": [[1, 4]]}, {"params": [model[0].bias]}], curvature="both"
    )
    model(normal(0, 4, 6)).sum().backward()
    before = model[0].weight.detach().clone()
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    shapes = {key: tuple(value.shape) for key, value in optimizer.state[model[0].weight].items()}
    assert shapes == {
        "step": (),
        "exp_avg": (3, 2),
        "neuron_factor": (2, 2),
        "output_factor": (3, 3),
        "weight_norm": (),
    }
    assert optimizer.hessian_due
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    with pytest.raises(RuntimeError, match="never refreshed for these neurons"):
        optimizer.step()
    selection = NeuronSelection({"0": [1, 4]}, {"0": 6})
    with hooked(model, selection, "both") as hooks:
        model(normal(0, 4, 6)).sum().backward()
    optimizer.update_curvature(hooks)
    rows = normal(0, 4, 6)[:, selection["0"]]
    expected = damped_cholesky(rows.T @ rows / 4, damping=0.1)
    # The room is no covariance to average with.
    torch.testing.assert_close(optimizer.state[model[0].weight]["neuron_factor"], expected, rtol=1e-5, atol=1e-6)
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


class Block(nn.Module):
    """A layer that a forward calls as often as it is told, perhaps under activation checkpointing."""

    def __init__(self, times: int, reentrant: bool | None) -> None:
        super().__init__()
        self.down, self.times, self.reentrant = nn.Linear(6, 6, bias=False), times, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x.tanh() if self.reentrant is None else checkpoint(torch.tanh, x, use_reentrant=self.reentrant)
            x = self.down(x) if self.reentrant is None else checkpoint(self.down, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_activation_checkpointing_changes_no_step(reentrant: bool, times: int, curvature: str) -> None:
    selection = NeuronSelection({"down": [1, 4, 5]}, {"down": 6})
    runs = []
    for each in (None, reentrant):
        model = Block(times, each)
        with torch.no_grad():
            model.down.weight.copy_(normal(0, 6, 6))
        optimizer = SIMUOptimizer(selection.param_groups(model), lr=0.1, curvature=curvature, hessian_interval=1)
        for step in range(3):
            optimizer.zero_grad()
            with hooked(model, selection, curvature) as hooks:
                model(normal(1 + step, 4, 6).requires_grad_()).square().sum().backward()
            refreshed(optimizer, hooks)
        runs.append((model.down.weight.detach(), optimizer.state[model.down.weight]["neuron_factor"]))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_a_layer_that_is_called_twice_is_whitened_by_both_calls() -> None:
    layer, selection = nn.Linear(6, 3, bias=False), NeuronSelection({"0": [0, 2, 3]}, {"0": 6})
    model = nn.Sequential(layer)
    optimizer = SIMUOptimizer(selection.param_groups(model), curvature="neurons")
    first, second = normal(0, 4, 6), normal(1, 7, 6)
    with hooked(model, selection) as hooks:
        (model(first).square().sum() + model(second).square().sum()).backward()
    optimizer.update_curvature(hooks)
    rows = torch.cat([first, second])[:, selection["0"]]
    expected = damped_cholesky(rows.T @ rows / 11, damping=0.1)
    torch.testing.assert_close(optimizer.state[layer.weight]["neuron_factor"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("curvature", ["neurons", "both"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_compiled_step_is_whole_graphs_and_the_same(curvature: str, decay: float, capturable: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    options = Options(lr=0.05, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=decay, clip=0.5, interval=2)
    # More neurons and outputs than one block of a triangular solve has.
    layer = Layer(num_neurons=80, width=70, dim=-1, contiguous=True, neurons=tuple(range(70)), seed=3)
    compiled, eager = (
        whitened.Run(SIMUOptimizer, layer, options, torch.float32, curvature, capturable=capturable) for _ in range(2)
    )
    step = torch.compile(compiled.optimizer.step, backend=counter, fullgraph=capturable)
    for number in range(6):
        for run, make in ((compiled, step), (eager, eager.optimizer.step)):
            with run.hooks() as hooks:
                run.backward(2 * number)
            if run.optimizer.hessian_due:
                run.optimizer.update_curvature(hooks)
            make()
    assert torch.equal(compiled.net.down.weight, eager.net.down.weight)
    # Once with the counters as constants and once with them as variables; not once a step.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_solves_by_blocks_are_those_of_the_whole_factor(size: int, rows: int) -> None:
    seen = normal(0, 2 * size, size).double()
    factor = damped_cholesky(seen.T @ seen / size, damping=0.1)
    inverse = torch.cholesky_inverse(factor)
    for grad in (normal(1, rows, size).double(), normal(1, size, rows).double().T):
        torch.testing.assert_close(whiten(grad, factor), grad @ inverse, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(whiten(grad.T, None, factor), inverse @ grad.T, rtol=1e-9, atol=1e-9)
