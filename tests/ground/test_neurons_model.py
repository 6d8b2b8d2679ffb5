"""A selection of a model: drawn, full, and as groups of parameters of which nothing else trains."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.models import tiny
from tests.strategies import generator, seeds
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.layers import attention_projections, down_projections


class TestModels:
    @given(seeds, st.floats(0, 1))
    def test_random_selects_the_same_count_in_each_layer_and_the_same_neurons_for_a_seed(self, seed, fraction):
        model = nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 2))
        drawn = [NeuronSelection.random(model, fraction, generator(seed), select="[01]") for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert [len(drawn[0][layer]) for layer in ("0", "1")] == [round(fraction * 7), round(fraction * 10)]

    def test_random_draws_every_neuron_equally_often(self):
        model, draws = nn.Sequential(nn.Linear(5, 2)), generator(0)
        counts = sum(NeuronSelection.random(model, 0.4, draws, select="0").mask("0").int() for _ in range(500))
        assert counts.sum() == 1000 and (counts - 200).abs().max() < 50

    @pytest.mark.parametrize(("fraction", "error"), [(1.5, ValueError), (-0.1, ValueError), ("all", TypeError)])
    def test_random_refuses_what_is_no_fraction(self, fraction, error):
        with pytest.raises(error, match=rf"fraction is {fraction!r}.* in \[0, 1\]"):
            NeuronSelection.random(nn.Sequential(nn.Linear(5, 2)), fraction, select="0")

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_full_selects_every_neuron_of_the_down_projections(self, name):
        model = tiny(name)
        full = NeuronSelection.full(model)
        assert set(full) == set(down_projections(model)) and full.fraction == 1.0
        assert full == NeuronSelection.random(model, 1.0, generator(0))
        assert NeuronSelection.full(nn.Sequential(nn.Linear(3, 2)), "0") == NeuronSelection({"0": range(3)}, {"0": 3})


class TestParamGroups:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
    @pytest.mark.parametrize("attention", ["full", "frozen"])
    def test_the_selected_layers_and_the_chosen_attention_train_and_nothing_else(self, name, attention):
        model = tiny(name)
        selection = NeuronSelection.random(model, 0.3, generator(0))
        groups = selection.param_groups(model, attention)
        downs = [layer.weight for layer in down_projections(model).values()]
        trained = list(downs)
        if attention == "full":
            trained += [p for layer in attention_projections(model).values() for p in layer.parameters()]
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
        assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in trained]
        assert groups[0]["neurons"] == [selection[layer].tolist() for layer in selection]
        assert groups[0]["neuron_dim"] == (0 if name == "gpt2" else -1)
        assert all(set(group["neurons"]) == {None} for group in groups[1:])
        assert len(groups) == (2 if attention == "full" else 1)

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_the_optimizer_trains_exactly_the_selected_neurons(self, name):
        model = tiny(name)
        selection = NeuronSelection.random(model, 0.2, generator(1))
        before = copy.deepcopy(model.state_dict())
        optimizer = SIMUOptimizer(selection.param_groups(model, "frozen"), lr=1e-2)
        tokens = torch.arange(3, 11)[None]
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        for key, value in model.state_dict().items():
            moved = (value != before[key]).nonzero()
            layer = key.removesuffix(".weight")
            dim = 0 if name == "gpt2" else 1
            expected = set(selection[layer].tolist()) if layer in selection else set()
            assert set(moved[:, dim].tolist() if expected else moved.flatten().tolist()) == expected

    def test_layouts_have_a_group_each(self):
        model = tiny("gpt2")
        model.extra = nn.Linear(3, 2)
        down = "transformer.h.0.mlp.c_proj"
        selection = NeuronSelection({"extra": [1], down: [2]}, {"extra": 3, down: 128})
        groups = selection.param_groups(model, "frozen")
        assert [(group["neuron_dim"], group["neurons"]) for group in groups] == [(0, [[2]]), (-1, [[1]])]

    def test_without_layers_only_attention_trains(self):
        model = tiny("llama")
        (group,) = NeuronSelection({}, {}).param_groups(model, "full")
        assert len(group["params"]) == len(attention_projections(model))
        assert NeuronSelection({}, {}).param_groups(model) == []
        assert not any(param.requires_grad for param in model.parameters())

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda m: setattr(m, "0", nn.Linear(5, 4)), ValueError, "Layer '0' has 5 neurons, the selection counts 4"),
            (lambda m: m.__delattr__("2"), KeyError, "Layer '2' is not in the model"),
            (lambda m: setattr(m, "2", nn.ReLU()), TypeError, "Layer '2' is a ReLU"),
            (lambda m: setattr(m[2], "weight", m[0].weight), ValueError, "Layers '[02]' and '[02]' share one weight"),
            (lambda m: setattr(m[1], "weight", m[0].weight), ValueError, "Layers '0' and '1' share one weight"),
            (
                lambda m: setattr(m[2], "weight", nn.Parameter(torch.ones(4, 4, dtype=torch.int8), False)),
                ValueError,
                "The weight of layer '2' holds torch.int8 codes, expected a floating-point weight. Use attach_deltas",
            ),
        ],
    )
    def test_a_model_that_it_does_not_fit_is_refused_and_left_as_it_was(self, change, error, message):
        model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4))
        selection = NeuronSelection({"0": [1], "2": [2]}, {"0": 4, "2": 4})
        change(model)
        before = [param.requires_grad for param in model.parameters()]
        with pytest.raises(error, match=message):
            selection.param_groups(model, "frozen")
        assert [param.requires_grad for param in model.parameters()] == before

    def test_quantized_attention_is_refused_when_it_should_train(self):
        model = tiny("llama")
        codes = torch.zeros(32, 32, dtype=torch.int8)
        model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(codes, requires_grad=False)
        selection = NeuronSelection.full(model)
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj' holds torch.int8 codes.* attention='frozen'"):
            selection.param_groups(model, "full")
        assert len(selection.param_groups(model, "frozen")) == 1

    def test_selected_neurons_of_an_attention_projection_do_not_also_train_whole(self):
        model = tiny("llama")
        selection = NeuronSelection.full(model, r"self_attn\.o_proj")
        with pytest.raises(ValueError, match=r"o_proj' has selected neurons and is an attention projection.*'frozen'"):
            selection.param_groups(model, "full")
        assert len(selection.param_groups(model, "frozen")[0]["params"]) == 2

    def test_a_misspelled_choice_is_refused_with_the_nearest(self):
        with pytest.raises(ValueError, match=r"attention is 'frozn', expected .*Did you mean 'frozen'"):
            NeuronSelection({}, {}).param_groups(nn.Linear(2, 2), "frozn")
