"""Another selection keeps the state of the neurons in both, and drops the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.strategies import normal, seeds
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.columns import Columns

pytestmark = pytest.mark.usefixtures("device")

SIZE = 6
indices = st.sets(st.integers(0, SIZE - 1))


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, SIZE), nn.ReLU(), nn.Linear(SIZE, 4), nn.Linear(4, SIZE), nn.Linear(SIZE, 2)).to(
        dtype
    )


def select(**neurons):
    names = {"first": "2", "second": "4"}
    return NeuronSelection({names[key]: value for key, value in neurons.items()}, {names[key]: SIZE for key in neurons})


def train(model, optimizer, seed, steps):
    for number in range(steps):
        for place, param in enumerate(model.parameters()):
            param.grad = (
                normal(seed + 10 * number + place, *param.shape, dtype=param.dtype) if param.requires_grad else None
            )
        optimizer.step()
        if optimizer.hessian_due:
            optimizer.update_hessian(3)
        optimizer.zero_grad()


@given(indices, indices, seeds, st.sampled_from([torch.float32, torch.bfloat16]))
def test_state_follows_its_neuron(old, new, seed, dtype):
    model = make_model(dtype)
    optimizer = SIMUOptimizer(select(first=old).param_groups(model, attention="frozen"), lr=0.1, master_weights=True)
    train(model, optimizer, seed, 3)
    weight = model[2].weight
    # The oracle: dense tensors with zeros, or the weight itself, off the old selection.
    before = {}
    for key, value in optimizer.state[weight].items():
        if key != "step":
            before[key] = weight.detach().float().clone() if key == "master" else torch.zeros(4, SIZE)
            before[key][:, sorted(old)] = value
            kept = torch.zeros(SIZE, dtype=torch.bool)
            kept[sorted(old & new)] = True
            before[key] = torch.where(kept, before[key], weight.detach().float() if key == "master" else 0.0)
    optimizer.change_selection(select(first=new), model)
    for key, dense in before.items():
        value = optimizer.state[weight][key]
        assert value.dtype == torch.float32
        assert torch.equal(value, dense[:, sorted(new)])
    assert optimizer.hessian_due
    frozen = weight.detach().clone()
    # One step: two of opposite signs would cancel exactly.
    train(model, optimizer, seed + 1000, 1)
    changed = (weight != frozen).any(0).nonzero()[:, 0].tolist()
    assert set(changed) <= new
    assert new == set(changed) or dtype != torch.float32


def test_the_same_selection_changes_no_state():
    models = [make_model() for _ in range(2)]
    runs = [(model, SIMUOptimizer(select(first=[1, 4]).param_groups(model, attention="frozen"))) for model in models]
    for run in runs:
        train(*run, 0, 3)
    runs[0][1].change_selection(select(first=[1, 4]), models[0])
    # Only the refresh comes earlier; without refreshes the runs are the same.
    for model, optimizer in runs:
        optimizer.param_groups[0]["next_refresh"] = 10**6
        train(model, optimizer, 100, 3)
    assert torch.equal(models[0][2].weight, models[1][2].weight)


def test_layers_come_and_go():
    model = make_model()
    optimizer = SIMUOptimizer(select(first=[1, 4]).param_groups(model, attention="frozen"), lr=0.1)
    train(model, optimizer, 0, 2)
    optimizer.change_selection(select(second=[0, 5]), model)
    assert [param.requires_grad for param in (model[2].weight, model[4].weight)] == [False, True]
    assert optimizer.state[model[2].weight]["exp_avg"].numel() == 0
    frozen = model[2].weight.detach().clone()
    before = model[4].weight.detach().clone()
    train(model, optimizer, 50, 2)
    assert torch.equal(model[2].weight, frozen)
    assert (model[4].weight != before).any(0).nonzero()[:, 0].tolist() == [0, 5]


@pytest.mark.parametrize("named", [False, True])
def test_a_new_layer_has_the_options_of_the_group_it_joins(named):
    model = make_model()
    if named:
        optimizer = SIMUOptimizer(model.named_parameters(), lr=0.1, selection=select(first=[1]))
    else:
        optimizer = SIMUOptimizer(select(first=[1]).param_groups(model, attention="frozen"), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, 0, 1)
    schedule.step()
    optimizer.change_selection(select(first=[1], second=[2]), model)
    before = model[4].weight.detach().clone()
    train(model, optimizer, 50, 1)
    # Without curvature every entry is clipped: it moves by the scheduled rate exactly.
    torch.testing.assert_close((model[4].weight - before)[:, 2].abs(), torch.full((2,), 0.01))
    schedule.step()
    assert len(optimizer.param_groups) == 1


def test_parameters_that_train_whole_go_on():
    model = make_model()
    groups = select(first=[1]).param_groups(model, attention="frozen")
    model[3].weight.requires_grad_(True)
    optimizer = SIMUOptimizer([*groups, {"params": [model[3].weight]}], lr=0.1)
    train(model, optimizer, 0, 2)
    momentum = optimizer.state[model[3].weight]["exp_avg"].clone()
    optimizer.change_selection(select(first=[2]), model)
    assert model[3].weight.requires_grad
    assert torch.equal(optimizer.state[model[3].weight]["exp_avg"], momentum)


class Conv1D(nn.Module):
    """GPT-2's linear layer: its neurons are the rows."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(normal(0, nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Experts in one parameter: (experts, d_model, d_ff)."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(normal(1, 2, 3, SIZE))


KINDS = {
    "columns": (lambda: nn.Linear(SIZE, 4, bias=False), "weight", -1, SIZE),
    "rows": (lambda: Conv1D(4, SIZE), "weight", 0, SIZE),
    "experts": (Experts, "down_proj", (0, 2), 2 * SIZE),
}


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("second", KINDS)
@given(st.sets(st.integers(0, SIZE - 1), min_size=1), st.sets(st.integers(0, SIZE - 1), min_size=1), seeds)
def test_named_parameters_of_any_layout_take_over(first, second, old, new, seed):
    """Law 1 for a layer whose neurons are another dimension than those of the first one."""
    made, names, dims, sizes = zip(*(KINDS[kind] for kind in (first, second)), strict=True)
    model = nn.ModuleList([made[0](), made[1](), nn.Linear(2, 3)])
    weights = [model[place].get_parameter(names[place]) for place in (0, 1)]
    optimizer = SIMUOptimizer(model.named_parameters(), lr=0.1, selection=NeuronSelection({"0": old}, {"0": sizes[0]}))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, seed, 1)
    schedule.step()
    optimizer.change_selection(NeuronSelection({"1": new}, {"1": sizes[1]}), model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, optimizer, seed + 1000, 1)
    chosen = Columns(dims[1], torch.tensor(sorted(new)))
    # Without curvature every entry is clipped: it moves by the scheduled rate, and nothing else moves.
    moved = chosen.gather(weights[1] - before[f"1.{names[1]}"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01))
    for name, param in model.named_parameters():
        if param is weights[1]:
            chosen.write_(before[name], chosen.gather(param.detach()))
        assert torch.equal(param, before[name])
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == len(set(held)) == sum(len(group["param_names"]) for group in optimizer.param_groups)


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("second", ["columns", "rows"])
@pytest.mark.parametrize("kept", [False, True], ids=["moved", "joined"])
@given(st.sets(st.integers(0, SIZE - 1), min_size=1), st.sets(st.integers(0, SIZE - 1), min_size=1), seeds)
def test_named_parameters_continue_from_the_state_of_a_changed_selection(first, second, kept, old, new, seed):
    """Law 5, where the change moved layers from group to group; rounding draws go by the places in them."""
    options = {"lr": 0.1, "hessian_interval": 2, "stochastic_rounding": True}

    def made():
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(2, 3), KINDS[first][0](), KINDS[second][0](), nn.Linear(3, 2)]).bfloat16()

    before = NeuronSelection({"1": old}, {"1": SIZE})
    after = NeuronSelection({"2": new, **({"1": old} if kept else {})}, {"1": SIZE, "2": SIZE})
    model, resumed = made(), made()
    optimizer = SIMUOptimizer(model.named_parameters(), selection=before, **options)
    train(model, optimizer, seed, 2)
    optimizer.change_selection(after, model)
    train(model, optimizer, seed + 100, 3)
    resumed.load_state_dict(model.state_dict())
    again = SIMUOptimizer(resumed.named_parameters(), selection=after, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.hessian_due == optimizer.hessian_due
    for each in (model, resumed):
        torch.manual_seed(seed)
        train(each, optimizer if each is model else again, seed + 200, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    for layer in after:
        states = [each.state[run[int(layer)].weight] for each, run in ((optimizer, model), (again, resumed))]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_named_parameters_of_another_selection_are_refused_and_keep_their_groups():
    model = nn.ModuleList([nn.Linear(SIZE, 4), Conv1D(4, SIZE)])
    optimizer = SIMUOptimizer(model.named_parameters(), selection=NeuronSelection({"0": [1]}, {"0": SIZE}))
    optimizer.change_selection(NeuronSelection({"1": [2]}, {"1": SIZE}), model)
    other = SIMUOptimizer(model.named_parameters(), selection=NeuronSelection({"1": [3]}, {"1": SIZE}))
    names = [group["param_names"] for group in other.param_groups]
    with pytest.raises(ValueError, match="of the saved state has other neurons than this optimizer"):
        other.load_state_dict(optimizer.state_dict())
    assert [group["param_names"] for group in other.param_groups] == names


def test_a_layer_that_trained_along_another_dimension_is_refused_and_nothing_changes():
    model = nn.ModuleList([Conv1D(SIZE, SIZE)])
    optimizer = SIMUOptimizer([{"params": [model[0].weight], "neurons": [[1]]}])
    with pytest.raises(
        ValueError, match=r"The neurons of parameter '0.weight' are another dimension in this optimizer"
    ):
        optimizer.change_selection(NeuronSelection({"0": [2]}, {"0": SIZE}), model)
    assert optimizer.param_groups[0]["neurons"] == [[1]]
    assert model[0].weight.requires_grad


def test_what_cannot_be_changed_is_refused():
    model = make_model()
    optimizer = SIMUOptimizer(select(first=[1]).param_groups(model, attention="frozen"))
    with pytest.raises(ValueError, match="The model holds none of the optimizer's parameters"):
        optimizer.change_selection(select(first=[2]), make_model())
    whole, flags = SIMUOptimizer([model[2].weight]), [param.requires_grad for param in model.parameters()]
    with pytest.raises(ValueError, match="A layer of the selection trains whole in this optimizer"):
        whole.change_selection(select(first=[2]), model)
    assert [param.requires_grad for param in model.parameters()] == flags
    with pytest.raises(TypeError, match="selection is of type str, expected a NeuronSelection"):
        optimizer.change_selection("2", model)
    with pytest.raises(TypeError, match="model is of type NoneType, expected a Module"):
        optimizer.change_selection(select(first=[2]), None)


def test_a_state_without_its_parts_is_refused():
    optimizer = SIMUOptimizer([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"The state has no \['param_groups'\], expected what state_dict\(\) returned"):
        optimizer.load_state_dict({"state": {}})
