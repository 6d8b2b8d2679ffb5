"""SIMUOptimizer refuses what it cannot do rightly, and says what to do instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import laws
from tests.strategies import Layer, Options
from torch_simu import NeuronSelection, SIMUOptimizer

PLAIN = Options(lr=0.1, beta1=0.5, beta2=0.5, rho=1.0, weight_decay=0.1, clip=1.0, interval=2)


class TestErrors:
    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("lr", -1.0, r"lr is -1.0, expected a finite number in \[0, inf\)"),
            ("lr", torch.ones(2), "lr is a tensor of 2 elements"),
            ("lr", "fast", "lr is 'fast' of type str"),
            ("betas", (1.0, 0.9), r"betas\[0\] is 1.0"),
            ("rho", float("nan"), "rho is nan"),
            ("eps", 0.0, "eps is 0.0"),
            ("clip", 0, "clip is 0"),
            ("weight_decay", -0.1, "weight_decay is -0.1"),
            ("hessian_interval", 0, "hessian_interval is 0"),
            ("hessian_interval", 1.5, "hessian_interval is 1.5 of type float"),
            ("state_dtype", torch.int8, "state_dtype is 'int8'"),
        ],
    )
    def test_options_out_of_bounds_are_refused(self, option, value, message):
        with pytest.raises((ValueError, TypeError), match=message):
            SIMUOptimizer([nn.Parameter(torch.ones(2))], **{option: value})

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            ({"neurons": [0, 1]}, r"neurons is \[0, 1\], expected a list of 1 entries"),
            ({"neurons": [[0], [1]]}, "expected a list of 1 entries"),
            ({"neurons": [[4]]}, r"selects neuron 4, expected 0 <= index < 4"),
            ({"neurons": [[-1]]}, r"selects neuron -1, expected 0 <= index < 4"),
            ({"neurons": [[0.5]]}, r"selects neuron 0.5, expected whole numbers"),
            ({"neurons": [[0]], "neuron_dim": 2}, r"neuron_dim is 2, expected a dimension of parameter 0, \(3, 4\)"),
        ],
    )
    def test_misaligned_neurons_are_refused(self, group, message):
        with pytest.raises((ValueError, TypeError), match=message):
            SIMUOptimizer([{"params": [nn.Parameter(torch.ones(3, 4))], **group}])

    def test_complex_parameters_and_sparse_gradients_are_refused(self):
        with pytest.raises(ValueError, match="dtype torch.complex64"):
            SIMUOptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
        embedding = nn.Embedding(3, 2, sparse=True)
        optimizer = SIMUOptimizer(embedding.parameters())
        embedding(torch.tensor([0])).sum().backward()
        with pytest.raises(RuntimeError, match="gradient is sparse"):
            optimizer.step()

    def test_another_selection_or_shape_is_refused_and_nothing_changes(self):
        layer = Layer(num_neurons=4, width=2, dim=-1, contiguous=True, neurons=(0, 2), seed=0)
        other = Layer(num_neurons=4, width=2, dim=-1, contiguous=True, neurons=(1, 2), seed=0)
        wider = Layer(num_neurons=4, width=3, dim=-1, contiguous=True, neurons=(0, 2), seed=0)
        param, optimizer = laws.make(SIMUOptimizer, layer, PLAIN)
        laws.train(param, optimizer, 0, 0, 1)
        saved = optimizer.state_dict()
        for wrong, message in ((other, "has other neurons"), (wider, r"exp_avg of parameter 0 has shape \(2, 2\)")):
            _, fresh = laws.make(SIMUOptimizer, wrong, PLAIN)
            with pytest.raises(ValueError, match=message):
                fresh.load_state_dict(saved)
            assert not fresh.state

    def test_a_selection_needs_names_and_its_own_model(self):
        model = nn.Sequential(nn.Linear(4, 3))
        selection = NeuronSelection({"0": [1]}, {"0": 4})
        with pytest.raises(TypeError, match="unnamed params"):
            SIMUOptimizer(model.parameters(), selection=selection)
        with pytest.raises(KeyError, match="'9.weight' of the selection is missing"):
            SIMUOptimizer(model.named_parameters(), selection=NeuronSelection({"9": [1]}, {"9": 4}))
        with pytest.raises(ValueError, match=r"has shape \(3, 4\), expected 7 neurons"):
            SIMUOptimizer(model.named_parameters(), selection=NeuronSelection({"0": [1]}, {"0": 7}))

    @pytest.mark.parametrize("shape", [(4, 4), (5, 3, 4), (4,)])
    def test_a_weight_whose_shape_does_not_say_what_its_neurons_are_is_refused(self, shape):
        named = [("0.weight", nn.Parameter(torch.zeros(shape)))]
        with pytest.raises(ValueError, match=r"Parameter '0.weight' has shape .*, expected"):
            SIMUOptimizer(named, selection=NeuronSelection({"0": [1]}, {"0": 4}))

    def test_parameters_without_data_are_refused_where_they_would_train(self):
        layers = [nn.Linear(4, 3, bias=False, device=device) for device in ("meta", "cpu")]
        for groups in ([layers[0].weight], [{"params": [layers[0].weight], "neurons": [[1]]}]):
            with pytest.raises(ValueError, match="Parameter 0 is on the meta device, expected data"):
                SIMUOptimizer(groups)
        model = nn.Sequential(*layers)
        with pytest.raises(ValueError, match="The weight of layer '0' is on the meta device, expected data"):
            NeuronSelection({"0": [1]}, {"0": 4}).param_groups(model, attention="frozen")
        SIMUOptimizer(model.named_parameters(), selection=NeuronSelection({"1": [1]}, {"1": 4}))

    def test_a_refresh_needs_a_positive_number_of_tokens(self):
        optimizer = SIMUOptimizer([nn.Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match="num_tokens is 0"):
            optimizer.update_hessian(0)
        with pytest.raises(ValueError, match="grad_scale is -1"):
            optimizer.update_hessian(1, grad_scale=-1)
