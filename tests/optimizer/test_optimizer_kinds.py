"""Every kind of check that torch runs on its own optimizers (test/test_optim.py), over the configurations of ours."""

from __future__ import annotations

import copy
import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.strategies import generator, normal
from torch_simu import SIMUOptimizer
from torch_simu.optimizer import soul

pytestmark = pytest.mark.usefixtures("device")

CONFIGS = {
    "default": {},
    "lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "one-element lr": {"lr": torch.tensor([0.01])},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "maximize, weight decay": {"maximize": True, "weight_decay": 0.1},
    "no momentum": {"betas": (0.0, 0.0)},
    "clip": {"clip": 0.25},
    "rho, eps": {"rho": 0.1, "eps": 1e-8},
    "foreach": {"foreach": True},
    "foreach, maximize, decay": {"foreach": True, "maximize": True, "weight_decay": 0.1},
    "loop": {"foreach": False},
    "capturable": {"capturable": True},
    "capturable, foreach, tensor lr": {"capturable": True, "foreach": True, "lr": torch.tensor(0.01)},
    "capturable, one-element lr": {"capturable": True, "lr": torch.tensor([0.01]), "weight_decay": 0.1},
    "squared gradient": {"curvature": "squared_gradient", "hessian_interval": 2},
    "squared gradient, capturable": {"curvature": "squared_gradient", "capturable": True},
    "soul": soul(lr=0.1),
    "hutchinson": {"curvature": "hutchinson"},
    "bfloat16 state": {"state_dtype": torch.bfloat16},
    "float64 state": {"state_dtype": torch.float64},
    "master weights": {"master_weights": True},
    "stochastic rounding": {"stochastic_rounding": True},
    "stochastic rounding, capturable": {"stochastic_rounding": True, "capturable": True},
}
configs = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def problem(dtype=torch.float32, *, named=False, contiguous=True, **options):
    """A linear regression whose weight trains columns and whose bias trains whole."""
    weight, bias = normal(0, 10, 5, dtype=dtype), nn.Parameter(normal(1, 10, dtype=dtype))
    weight = nn.Parameter(weight if contiguous else weight.t().contiguous().t())
    params = [("weight", weight), ("bias", bias)] if named else [weight, bias]
    group = {"params": params, "neurons": [[0, 2, 3], None]}
    optimizer = SIMUOptimizer([group], **{"lr": 0.01, **copy.deepcopy(options)})
    inputs = normal(2, 5, dtype=dtype)
    sign = -1 if options.get("maximize") else 1

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).square().sum()
        (sign * loss).backward()
        return loss

    return [weight, bias], optimizer, closure


def train(optimizer, closure, steps=6, draw=None):
    """Steps with the refreshes that the configuration takes."""
    draw = draw or generator(0)
    for _ in range(steps):
        loss = optimizer.step(closure)
        if optimizer.hessian_due and optimizer.param_groups[0]["curvature"] == "hutchinson":
            params = optimizer.param_groups[0]["params"]
            optimizer.update_hutchinson(sum((param.float() ** 2).sum() for param in params), generator=draw)
        elif optimizer.hessian_due:
            closure()
            optimizer.update_hessian(3)
    return loss


def assert_equal(first, second):
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@configs
@dtypes
@pytest.mark.parametrize("contiguous", [True, False])
def test_steps_go_the_right_way(options, dtype, contiguous):
    _, optimizer, closure = problem(dtype, contiguous=contiguous, **options)
    before = closure().item()
    after = train(optimizer, closure, 20).item()
    assert after < before


@configs
@pytest.mark.parametrize("scheduler", ["step", "plateau", "exponential", "one cycle", "swa"])
def test_steps_go_the_right_way_under_a_scheduler(options, scheduler):
    _, optimizer, closure = problem(**options)
    made = {
        "step": lambda: lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.9),
        "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer),
        "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, 0.99),
        "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=40, cycle_momentum=False),
        "swa": lambda: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01),
    }[scheduler]()
    before = closure().item()
    for _ in range(20):
        loss = train(optimizer, closure, 1)
        made.step(loss.detach()) if scheduler == "plateau" else made.step()
    assert closure().item() < before


@configs
def test_a_step_without_gradients_changes_nothing(options):
    params, optimizer, closure = problem(**options)
    train(optimizer, closure, 2)
    before = [param.detach().clone() for param in params]
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(before, params)


@configs
def test_a_first_step_of_zero_gradients_only_decays(options):
    params, optimizer, _ = problem(**{**options, "weight_decay": 0.0})
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_equal(before, params)
    assert all(optimizer.state[param] for param in params)


@configs
@dtypes
def test_gradients_are_never_changed(options, dtype):
    params, optimizer, closure = problem(dtype, **options)
    train(optimizer, closure, 2)
    closure()
    grads = [param.grad.clone() for param in params]
    versions = [param.grad._version for param in params]
    optimizer.step()
    if optimizer.param_groups[0]["curvature"] == "gnb":
        optimizer.update_hessian(3)
    assert_equal(grads, [param.grad for param in params])
    assert versions == [param.grad._version for param in params]


@configs
@pytest.mark.parametrize("named", [False, True])
def test_a_state_dict_is_enough_to_go_on(options, named):
    params, optimizer, closure = problem(named=named, **options)
    draws = generator(0), generator(0)
    train(optimizer, closure, 5, draws[0])
    twins, resumed, other = problem(named=named, **options)
    train(resumed, other, 1)
    draws[1].set_state(draws[0].get_state())
    with torch.no_grad():
        for twin, param in zip(twins, params, strict=True):
            twin.copy_(param)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, closure, 4, draws[0])
    train(resumed, other, 4, draws[1])
    assert_equal(params, twins)


@configs
def test_a_state_of_a_version_without_the_newer_options_loads(options):
    _, optimizer, closure = problem(**options)
    train(optimizer, closure, 3)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        for option in ("foreach", "maximize", "capturable", "curvature", "stochastic_rounding"):
            del group[option]
    _, resumed, other = problem(**options)
    resumed.load_state_dict(older)
    for option in ("foreach", "maximize", "capturable", "curvature"):
        assert resumed.param_groups[0][option] == optimizer.defaults[option]
    resumed.step(other)


@configs
def test_states_load_with_and_without_names(options):
    for named in ((False, True), (True, False), (True, True)):
        _, optimizer, closure = problem(named=named[0], **options)
        train(optimizer, closure, 2)
        _, resumed, other = problem(named=named[1], **options)
        resumed.load_state_dict(optimizer.state_dict())
        train(resumed, other, 2)
        assert ("param_names" in resumed.param_groups[0]) == any(named)


@configs
def test_a_saved_file_holds_what_was_saved(options):
    _, optimizer, closure = problem(**options)
    train(optimizer, closure, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    saved = optimizer.state_dict()
    assert str(loaded["param_groups"]) == str(saved["param_groups"])
    for number, state in saved["state"].items():
        assert all(torch.equal(loaded["state"][number][key], value) for key, value in state.items())


@configs
def test_a_deepcopy_has_all_public_attributes_and_can_be_printed(options):
    _, optimizer, closure = problem(**options)
    train(optimizer, closure, 2)
    twin = copy.deepcopy(optimizer)
    assert "hessian_interval" in repr(twin)
    public = [{name for name in vars(each) if not name.startswith("_")} for each in (optimizer, twin)]
    assert public[0] == public[1]
    assert vars(optimizer).keys() - vars(twin).keys() <= {
        "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured",
    }


@configs
def test_all_hooks_run_once_in_order(options):
    _, optimizer, closure = problem(**options)
    seen = Counter()
    order = []

    def hook(name):
        return lambda *_: (order.append(name), seen.update([name]), None)[-1]

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    optimizer.register_step_pre_hook(hook("pre"))
    optimizer.register_step_post_hook(hook("post"))
    for name in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        getattr(optimizer, f"register_{name}_hook")(hook(name))
        getattr(optimizer, f"register_{name}_hook")(hook(f"first {name}"), prepend=True)
    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    optimizer.step(closure)
    steps = ["global pre", "pre", "post", "global post"]
    names = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    assert order == [*steps, *(each for name in names for each in (f"first {name}", name)), "pre", "post"]


@pytest.mark.parametrize("impl", [{"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_parameters_of_many_dtypes_step_as_each_alone(impl):
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    together = [nn.Parameter(normal(n, 3, dtype=dtype)) for n, dtype in enumerate(kinds)]
    alone = [nn.Parameter(param.detach().clone()) for param in together]
    optimizers = [SIMUOptimizer(together, lr=0.01, **impl), *(SIMUOptimizer([each], lr=0.01) for each in alone)]
    for number in range(4):
        for one, other in zip(together, alone, strict=True):
            one.grad = normal(10 * number, 3, dtype=one.dtype)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            if optimizer.hessian_due:
                optimizer.update_hessian(3)
    assert_equal(together, alone)


@configs
def test_another_default_dtype_changes_nothing(options):
    runs = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            params, optimizer, closure = problem(**options)
            train(optimizer, closure, 4)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(params)
    assert_equal(*runs)


def test_groups_of_wrong_kinds_are_refused():
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        SIMUOptimizer(param)
    with pytest.raises(ValueError, match="empty parameter list"):
        SIMUOptimizer([])
    with pytest.raises(TypeError, match="parameters need to be organized in ordered collections"):
        SIMUOptimizer([{"params": {param}}])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        SIMUOptimizer([{"params": [param]}, {"params": [param]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        SIMUOptimizer([{"params": [param, param]}])
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        SIMUOptimizer([("a", param), nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        state = SIMUOptimizer([{"params": [param]}, {"params": [nn.Parameter(torch.zeros(2))]}]).state_dict()
        SIMUOptimizer([param]).load_state_dict(state)
