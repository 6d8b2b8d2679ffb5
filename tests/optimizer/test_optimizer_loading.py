"""Loading goes by what the hooks of others make of a state, and leaves an optimizer as one that was just made."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from torch_simu import SIMUOptimizer

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def stepped(*, steps=1, **options):
    """A weight whose columns 0 and 2 made some steps."""
    param = nn.Parameter(torch.zeros(2, 4))
    optimizer = SIMUOptimizer([{"params": [param], "neurons": [[0, 2]]}], lr=0.1, **options)
    for _ in range(steps):
        param.grad = torch.ones(2, 4)
        optimizer.step()
    return param, optimizer


def test_a_pre_hook_says_what_is_loaded():
    def without_momentum(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["exp_avg"].zero_()
        return state_dict

    param, optimizer = stepped()
    optimizer.register_load_state_dict_pre_hook(without_momentum)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state[param]["exp_avg"].any()


def test_a_post_hook_has_the_last_word():
    param, optimizer = stepped()
    optimizer.register_load_state_dict_post_hook(lambda each: each.state[param].update(exp_avg=torch.full((2, 2), 7.0)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.state[param]["exp_avg"] == 7).all()


def test_a_pre_hook_may_repair_what_would_be_refused():
    _, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["neurons"] = [[1, 3]]

    def repair(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["neurons"] = [[0, 2]]
        return state_dict

    with pytest.raises(ValueError, match="has other neurons"):
        optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(repair)
    optimizer.load_state_dict(saved)
    assert not hasattr(optimizer, "found")


def test_a_pre_hook_may_match_parameters_by_name():
    """As torch's documentation loads the state of a model whose parameters are in another order."""

    def by_name(optimizer, saved):
        names, wanted = (
            each["param_groups"][0]["param_names"] for each in (saved, {"param_groups": optimizer.param_groups})
        )
        groups = copy.deepcopy(saved["param_groups"])
        groups[0]["param_names"] = list(wanted)
        return {
            "state": {n: saved["state"][names.index(name)] for n, name in enumerate(wanted)},
            "param_groups": groups,
        }

    first, second = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2, 4))
    optimizer = SIMUOptimizer([("a", first), ("b", second)])
    first.grad, second.grad = torch.ones(2, 4), torch.full((2, 4), 3.0)
    optimizer.step()
    one, other = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2, 4))
    turned = SIMUOptimizer([("b", other), ("a", one)])
    turned.register_load_state_dict_pre_hook(by_name)
    turned.load_state_dict(optimizer.state_dict())
    assert torch.equal(turned.state[one]["exp_avg"], optimizer.state[first]["exp_avg"])
    assert torch.equal(turned.state[other]["exp_avg"], optimizer.state[second]["exp_avg"])


@pytest.mark.parametrize("capturable", [False, True])
def test_hooks_of_saving_see_what_is_saved(capturable):
    _, optimizer = stepped(capturable=capturable)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append(saved["param_groups"][0]["num_steps"]))
    saved = optimizer.state_dict()
    assert seen == [1]
    assert {type(saved["param_groups"][0][key]) for key in ("num_steps", "next_refresh")} == {int}


@pytest.mark.parametrize("capturable", [False, True])
def test_a_loaded_optimizer_has_the_keys_of_one_that_was_just_made(capturable):
    _, optimizer = stepped(capturable=capturable)
    before = set(optimizer.state_dict()["param_groups"][0])
    saved = copy.deepcopy(optimizer.state_dict())
    # As versions saved it that had loaded something before.
    saved["param_groups"][0]["differentiable"] = False
    for _ in range(2):
        optimizer.load_state_dict(saved)
        assert set(optimizer.state_dict()["param_groups"][0]) == before


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("saved_by", [False, True])
@pytest.mark.parametrize("loaded_by", [False, True])
def test_a_distributed_checkpoint_loads_again_and_again(tmp_path, flat, saved_by, loaded_by):
    """Also where the counters are on the device in one run and not in the other."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def made(capturable):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = SIMUOptimizer(model.parameters(), lr=0.1, capturable=capturable)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made(saved_by)
    dcp.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path, no_dist=True)
    twin, resumed = made(loaded_by)
    for _ in range(3):
        state = {"o": get_optimizer_state_dict(twin, resumed, options=options)}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(twin, resumed, state["o"], options=options)
    assert torch.equal(resumed.state[twin.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert resumed.state_dict()["param_groups"][0]["num_steps"] == 1


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0])[0]])
def test_a_step_that_was_saved_as_a_number_counts_on(step, capturable):
    _, optimizer = stepped(capturable=capturable)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = step
    param, resumed = stepped(capturable=capturable)
    resumed.load_state_dict(saved)
    param.grad = torch.ones(2, 4)
    resumed.step()
    assert resumed.state[param]["step"] == 4
    assert resumed.state[param]["step"].dtype == torch.float32


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_rate_of_one_element_is_a_rate(foreach, capturable):
    results = []
    for rate in (0.125, torch.tensor(0.125), torch.tensor([0.125]), torch.tensor([[0.125]])):
        param, optimizer = stepped(steps=0, foreach=foreach, capturable=capturable, weight_decay=0.5)
        optimizer.param_groups[0]["lr"] = rate
        param.grad = torch.ones(2, 4)
        optimizer.step()
        results.append(param.detach())
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_state_of_a_parameter_without_dimensions_loads():
    param = nn.Parameter(torch.ones(()))
    optimizer = SIMUOptimizer([param])
    param.grad = torch.ones(())
    optimizer.step()
    resumed = SIMUOptimizer([nn.Parameter(torch.ones(()))])
    resumed.load_state_dict(optimizer.state_dict())
    (state,) = resumed.state.values()
    assert torch.equal(state["exp_avg"], optimizer.state[param]["exp_avg"])


@pytest.mark.parametrize("foreach", [False, True])
def test_the_rate_of_float64_steps_is_not_rounded_on_the_device(foreach):
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SIMUOptimizer([param], lr=0.1, capturable=True, foreach=foreach)
    param.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    assert param.tolist() == [-0.1, -0.1]


def test_a_wrapper_that_copies_the_attributes_counts_with_the_optimizer():
    """As Lightning's wrapper does, which hands the step to the optimizer itself."""
    param, optimizer = stepped()
    wrapper = SIMUOptimizer.__new__(SIMUOptimizer)
    wrapper.__dict__.update(optimizer.__dict__)
    for bad, each in ((True, optimizer), (True, wrapper), (False, optimizer)):
        param.grad = torch.full((2, 4), float("nan") if bad else 1.0)
        if bad:
            with pytest.warns(RuntimeWarning, match="not finite"):
                each.step()
        else:
            each.step()
    assert wrapper.diagnostics()["skipped_steps"] == optimizer.diagnostics()["skipped_steps"] == 2
    wrapper.update_hessian(3)
    assert not optimizer.hessian_due


def test_parameters_of_several_dtypes_are_fused_by_their_kind(monkeypatch):
    from torch_simu.optimizer.stepping import clipped

    params = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32)]
    calls = []
    fused = clipped.clipped_step_foreach_
    monkeypatch.setattr(
        clipped,
        "clipped_step_foreach_",
        lambda weights, *rest, **o: (calls.append(len(weights)), fused(weights, *rest, **o)),
    )
    optimizer = SIMUOptimizer(params, lr=0.125, foreach=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert calls == [2, 1]
    assert all(param.tolist() == [0.875, 0.875] for param in params)
