"""SIMUOptimizer through the checks that torch runs on its own optimizers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import lr_scheduler

from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer

pytestmark = pytest.mark.usefixtures("device")

VARIANTS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "tensor lr, foreach, capturable": {"lr": torch.tensor(0.01), "foreach": True, "capturable": True},
    "squared gradient": {"curvature": "squared_gradient", "hessian_interval": 1, "rho": 10.0},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "master weights": {"master_weights": True},
}
"""As torch's OptimizerInfo lists the options that an optimizer must be right with."""

variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def params(seed=0, dtype=torch.float32):
    """A column-selected weight, a row-selected one, a whole one, one that trains nothing, and an empty one."""
    shapes = ((4, 6), (5, 3), (3,), (2, 2), (0, 3))
    return [nn.Parameter(normal(seed + number, *shape, dtype=dtype)) for number, shape in enumerate(shapes)]


def make(weights, **options):
    groups = [
        {"params": weights[:1], "neurons": [[0, 2, 5]]},
        {"params": weights[1:2], "neurons": [[1, 4]], "neuron_dim": 0},
        {"params": weights[2:], "neurons": [None, [], None]},
    ]
    return SIMUOptimizer(groups, **{"lr": 0.01, "rho": 1.0, "hessian_interval": 2, **copy.deepcopy(options)})


def train(weights, optimizer, start=0, stop=4):
    for number in range(start, stop):
        for place, weight in enumerate(weights):
            weight.grad = normal(100 * number + place, *weight.shape, dtype=weight.dtype)
        optimizer.step()
        if optimizer.hessian_due:
            optimizer.update_hessian(3)
        optimizer.zero_grad()


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def trained(dtype=torch.float32, **options):
    weights = params(dtype=dtype)
    optimizer = make(weights, **options)
    train(weights, optimizer)
    return weights, optimizer


@variants
def test_a_deepcopy_goes_on_like_the_original(options):
    pair = trained(**options)
    twin = copy.deepcopy(pair)
    for weights, optimizer in (pair, twin):
        train(weights, optimizer, 4, 7)
    assert_equal(pair[0], twin[0])


@variants
def test_a_pickled_optimizer_goes_on_like_the_original(options):
    pair = trained(**options)
    twin = pickle.loads(pickle.dumps(pair))
    for weights, optimizer in (pair, twin):
        train(weights, optimizer, 4, 7)
    assert_equal(pair[0], twin[0])


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_saved_state_loads_safely_and_goes_on_bit_for_bit(options, dtype):
    weights, optimizer = trained(dtype, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = make(twins, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for weight, twin in zip(weights, twins, strict=True):
        for key, value in optimizer.state[weight].items():
            assert resumed.state[twin][key].dtype == value.dtype
            assert torch.equal(resumed.state[twin][key], value)
    train(weights, optimizer, 4, 7)
    train(twins, resumed, 4, 7)
    assert_equal(weights, twins)


@variants
def test_foreach_and_capturable_take_the_same_steps_as_the_loop(options):
    expected, _ = trained(**{**options, "foreach": False, "capturable": False})
    for foreach in (False, True):
        for capturable in (False, True):
            found, _ = trained(**{**options, "foreach": foreach, "capturable": capturable})
            assert_equal(found, expected)


def test_a_tensor_learning_rate_takes_the_same_steps_as_a_float():
    weights, _ = trained(lr=0.125)
    assert_equal(trained(lr=torch.tensor(0.125))[0], weights)


def test_every_option_is_a_default_of_every_group_and_comes_back():
    optimizer = make(params())
    assert all(set(optimizer.defaults) <= set(group) for group in optimizer.param_groups)
    # An optimizer pickled by a version that knew fewer options.
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["curvature"]
    optimizer.__setstate__(state)
    assert all(group["curvature"] == "gnb" for group in optimizer.param_groups)


def test_a_group_overrides_the_defaults():
    weights = params()
    groups = [{"params": [weights[0]], "lr": 0.5, "clip": 2.0}, {"params": [weights[1]]}]
    optimizer = SIMUOptimizer(groups, lr=0.1)
    assert [(group["lr"], group["clip"]) for group in optimizer.param_groups] == [(0.5, 2.0), (0.1, 1.0)]
    before = [weight.detach().clone() for weight in weights[:2]]
    for weight in weights[:2]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight, old, moved in zip(weights, before, (1.0, 0.1), strict=False):
        torch.testing.assert_close(old - weight, torch.full_like(weight, moved))


def test_how_groups_are_split_does_not_matter():
    together, apart = params(), params()
    first = SIMUOptimizer([{"params": together[:3], "neurons": [[1, 2], [0], None]}], lr=0.1)
    second = SIMUOptimizer(
        [{"params": [apart[place]], "neurons": [n]} for place, n in enumerate([[1, 2], [0], None])], lr=0.1
    )
    train(together, first)
    train(apart, second)
    assert_equal(together, apart)


def test_a_tied_weight_is_one_parameter_with_one_state():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)])
    model[1].weight = model[0].weight
    lone = nn.Parameter(model[0].weight.detach().clone())
    selection = NeuronSelection({"0": [1, 3]}, {"0": 4})
    tied = SIMUOptimizer(model.named_parameters(), lr=0.1, selection=selection)
    other = SIMUOptimizer([{"params": [lone], "neurons": [[1, 3]]}], lr=0.1)
    inputs = torch.randn(5, 4)
    for _ in range(3):
        model[1](model[0](inputs) @ model[1].weight).square().sum().backward()
        (inputs @ lone.T @ lone @ lone.T).square().sum().backward()
        for optimizer in (tied, other):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model[1].weight, lone)
    assert len(tied.state) == 1


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler_sets_the_bound_of_the_step(scheduler, as_tensor):
    weight = nn.Parameter(torch.zeros(3))
    optimizer = SIMUOptimizer([weight], lr=torch.tensor(0.1) if as_tensor else 0.1, betas=(0.0, 0.0))
    schedule = scheduler(optimizer)
    rates = []
    for _ in range(6):
        before = weight.detach().clone()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        weight.grad = torch.ones(3)
        optimizer.step()
        # Without curvature every entry is clipped: it moves by the rate exactly.
        torch.testing.assert_close(before - weight, torch.full((3,), rates[-1]))
        schedule.step(1.0) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()
    assert len(set(rates)) > 1


def test_step_hooks_run_around_the_step():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SIMUOptimizer([weight], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.tolist()))
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.tolist()))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert seen[0] == [0.0, 0.0]
    assert seen[1] == pytest.approx([-0.1, -0.1])


def test_gradients_are_zeroed_as_asked():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SIMUOptimizer([weight])
    weight.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert weight.grad.tolist() == [0.0, 0.0]
    optimizer.zero_grad()
    assert weight.grad is None


def test_gradients_that_no_optimizer_takes_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = SIMUOptimizer(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="A gradient is sparse, expected dense gradients. Use sparse=False."):
        optimizer.step()
    with pytest.raises(ValueError, match=r"Parameter 0 has dtype torch.complex64"):
        SIMUOptimizer([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@given(seeds, st.sampled_from([0.1, 1.0, 100.0]))
def test_clip_grad_norm_scales_what_the_step_sees(seed, bound):
    weights, twins = params(seed), params(seed)
    clipped, by_hand = make(weights), make(twins)
    grads = [normal(seed + 50 + place, *weight.shape) for place, weight in enumerate(weights)]
    for weight, twin, grad in zip(weights, twins, grads, strict=True):
        weight.grad, twin.grad = grad.clone(), grad.clone()
    total = torch.nn.utils.clip_grad_norm_(weights, bound)
    for twin in twins:
        twin.grad *= (bound / (total + 1e-6)).clamp(max=1.0)
    clipped.step()
    by_hand.step()
    assert_equal(weights, twins)


def test_a_grad_scaler_unscales_skips_and_never_touches_the_refresh():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SIMUOptimizer([weight], lr=0.1, betas=(0.0, 0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.detach(), torch.full((2,), -0.1))
    assert optimizer.state[weight]["exp_avg"].tolist() == [1.0, 1.0]
    optimizer.zero_grad()
    (3 * weight.sum()).backward()
    optimizer.update_hessian(2)
    assert optimizer.state[weight]["hessian"].tolist() == [18.0, 18.0]
    optimizer.zero_grad()
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.full((2,), -0.1))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_a_compiled_step_is_whole_graphs_and_the_same(capturable):
    torch._dynamo.reset()
    counter = CompileCounter()
    weights, twins = params(), params()
    options = {"lr": torch.tensor(0.01), "capturable": capturable, "hessian_interval": 10}
    compiled, eager = make(weights, **options), make(twins, **options)
    step = torch.compile(compiled.step, backend=counter, fullgraph=capturable)
    for number in range(6):
        for run in (weights, twins):
            for place, weight in enumerate(run):
                weight.grad = normal(10 * number + place, *weight.shape)
        step()
        eager.step()
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["lr"].mul_(0.9)
    assert_equal(weights, twins)
    # Once with the counters as constants and once with them as variables; not once a step.
    assert counter.frame_count <= 2
