"""The formulas of scale give the bytes that are measured at small sizes, and the parameters of the large models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks import scale
from benchmarks.speed.live_bytes import LiveBytes
from torch_simu import NeuronPatch, NeuronSelection, SIMUOptimizer, attach_deltas, attribute_neurons
from torch_simu.columns import Columns
from torch_simu.layers import neuron_dim, neuron_weight

SMALL = scale.Model("small", 32, 160, 3, 97, 16)
EXPERTS = scale.Model("experts", 32, 40, 2, 97, 16, experts=4, active=2)
FRACTION = 0.1


def made(model: scale.Model, device: str, **options: object) -> torch.nn.Module:
    """The model of transformers with these sizes."""
    heads = model.d_model // 8 if model in (SMALL, EXPERTS) else model.d_model // 128
    shared = {
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.layers,
        "vocab_size": model.vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": model.d_keys * heads // model.d_model,
        **options,
    }
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        if model.experts == 1:
            return LlamaForCausalLM(LlamaConfig(**shared)).eval()
        counts = {"num_local_experts": model.experts, "num_experts_per_tok": model.active}
        return MixtralForCausalLM(MixtralConfig(**shared, **counts)).eval()


@pytest.mark.parametrize("model", [*scale.MODELS, SMALL, EXPERTS], ids=lambda model: model.name)
def test_parameters_are_those_of_the_model_of_transformers(model):
    found = made(model, "meta")
    assert sum(param.numel() for param in found.parameters()) == model.parameters
    down = [param.numel() for name, param in found.named_parameters() if "down_proj" in name]
    assert sum(down) == model.down


def test_the_largest_model_has_the_size_that_it_is_called_by():
    assert [round(model.parameters / 1e9) for model in scale.MODELS] == [7, 71, 401]


@pytest.mark.parametrize("model", [SMALL, EXPERTS], ids=lambda model: model.name)
def test_state_and_gradients_of_trained_columns_are_as_large_as_the_formula_says(model):
    found = made(model, "cpu").bfloat16()
    selection = NeuronSelection.random(found, FRACTION, torch.Generator().manual_seed(0))
    assert {len(selection[layer]) for layer in selection} == {model.chosen(FRACTION)}
    optimizer = SIMUOptimizer(selection.param_groups(found, attention="frozen"), foreach=True, capturable=True)
    ids = torch.arange(3, 15)[None]
    found(input_ids=ids, labels=ids).loss.backward()
    gradients = [param.grad.nbytes for param in found.parameters() if param.grad is not None]
    assert sum(gradients) == scale.dense_gradient(model)
    optimizer.step()
    with LiveBytes() as live:
        optimizer.step()
    assert 0.5 < live.peak / scale.transient(model, FRACTION) <= 1.1
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert sum(value.nbytes for value in kept if value.dim()) == scale.state(model, FRACTION)


def test_deltas_and_their_gradients_are_as_large_as_the_formula_says():
    found = made(SMALL, "cpu").requires_grad_(False)
    selection = NeuronSelection.random(found, FRACTION, torch.Generator().manual_seed(0))
    attach_deltas(found, selection)
    ids = torch.arange(3, 15)[None]
    found(input_ids=ids, labels=ids).loss.backward()
    trained = [param for param in found.parameters() if param.grad is not None]
    assert sum(param.nbytes + param.grad.nbytes for param in trained) == scale.deltas(SMALL, FRACTION)


def test_a_patch_is_as_large_as_the_formula_says_and_a_header(tmp_path):
    base, model = (made(SMALL, "cpu").bfloat16() for _ in range(2))
    selection = NeuronSelection.random(base, FRACTION, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in selection:
            module = model.get_submodule(layer)
            weight, columns = neuron_weight(module), Columns(neuron_dim(module), selection[layer])
            columns.add_(weight, torch.ones(columns.shape_in(weight.shape), dtype=weight.dtype))
    NeuronPatch.between(base, model, selection).save(tmp_path / "patch.safetensors")
    size = (tmp_path / "patch.safetensors").stat().st_size
    assert 0 <= size - scale.patch(SMALL, FRACTION) < 5000


def test_attribution_takes_the_operations_of_the_formula():
    found = made(SMALL, "cpu")
    ids = torch.arange(3, 15)[None]
    labels = torch.where(torch.arange(12) < 4, -100, ids)
    options = {"method": "packed", "steps": scale.PATH_POINTS, "max_completeness_error": None}
    with FlopCounterMode(display=False) as counter:
        scores = attribute_neurons(found, [{"input_ids": ids, "labels": labels}], **options).scores
    assert sum(each.nbytes for each in scores.values()) == scale.scores(SMALL)
    # The clean pass and the check of the method on four samples add to those of these eight.
    assert 1 < counter.get_total_flops() / scale.attribution_flops(SMALL, 8) < 1.3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_training_step_takes_the_operations_of_the_formula():
    found = made(SMALL, "cpu").train().requires_grad_(False)
    selection = NeuronSelection.random(found, FRACTION, torch.Generator().manual_seed(0))
    attach_deltas(found, selection)
    found.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(3, 15)[None]
    with FlopCounterMode(display=False) as counter:
        found(input_ids=ids, labels=ids).loss.backward()
    # The selected columns add a little, and neither the head nor the first block is made twice or gone back through.
    assert 0.7 < counter.get_total_flops() / scale.step_flops(SMALL, 12) < 1.2


def test_what_is_sharded_is_divided_and_the_rest_is_not():
    for model in scale.MODELS:
        one, eight = (scale.in_each(model, gpus, FRACTION, with_deltas=True) for gpus in (1, 8))
        ratios = {name: one[name] / eight[name] for name in one}
        assert ratios == {name: 1 if name in ("gathered", "activations") else 8 for name in one}
