"""The sources of a layer are the projections whose rows make its neurons: proved by a run, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from tests.models import EXPERTS, NAMES, VOCABULARY, tiny
from tests.strategies import generator
from torch_simu import NeuronSelection
from torch_simu.layers import Source, down_projections, proved_sources, sources_beside

DENSE = [*(name for name in NAMES if name not in EXPERTS), "granite"]


def inputs_of(model: nn.Module, layer: str) -> Tensor:
    """What a layer gets in a run on random tokens. Shape: `(num_tokens, num_neurons)`."""
    found: list[Tensor] = []
    tokens = torch.randint(1, VOCABULARY, (3, 7), generator=generator(5))
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(input_ids=tokens.to(next(model.parameters()).device))
    handle.remove()
    return found[0].reshape(21, -1)


def zeroed_rows_silence_their_neurons_alone(model: nn.Module, layers: list[str]) -> None:
    """Zero rows of one layer's sources, weight and bias: the chosen neurons are constant, the others what they were.

    The gradient of the chosen neurons is in all of those rows, and nowhere else.
    """
    for layer, sources in proved_sources(model, layers).items():
        size = model.get_submodule(layer).weight.shape[0 if sources[0].dim else 1]
        before = inputs_of(model, layer)
        # A ReLU may be silent on all tokens.
        drawn = torch.randperm(size, generator=generator(3))[: size // 3].tolist()
        chosen = [neuron for neuron in drawn if before[:, neuron].any()]
        other = [neuron for neuron in range(size) if neuron not in chosen]
        model.zero_grad()
        before[:, chosen].sum().backward()
        for source in sources:
            reached = (source.layer.weight.grad != 0).any(1 + source.dim).nonzero()[:, 0]
            assert reached.tolist() == sorted(source.rows(sorted(chosen)))
        kept = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for source in sources:
                source.layer.weight.index_fill_(source.dim, torch.tensor(source.rows(chosen)), 0.0)
                if source.layer.bias is not None:
                    source.layer.bias[source.rows(chosen)] = 0.0
        after = inputs_of(model, layer)
        model.load_state_dict(kept)
        assert torch.equal(after[:, other], before[:, other])
        assert torch.equal(after[:, chosen], after[:1, chosen].expand(21, -1))
        assert not torch.equal(before[:, chosen], after[:, chosen])


@pytest.mark.parametrize("name", DENSE)
def test_zeroing_the_rows_silences_their_neurons_and_no_others(name: str) -> None:
    model = tiny(name)
    # Biases of new models are zero, and would not tell.
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            if param.dim() == 1:
                param.add_(0.1 * torch.randn(param.shape, generator=generator(number)))
    zeroed_rows_silence_their_neurons_alone(model, list(down_projections(model)))


def test_parts_of_an_mlp_may_be_modules_of_their_own() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    layers = [f"bert.encoder.layer.{block}.output.dense" for block in range(2)]
    assert [source.name for source in sources_beside(model, layers)[layers[1]]] == [
        "bert.encoder.layer.1.intermediate.dense"
    ]
    zeroed_rows_silence_their_neurons_alone(model, layers)


@pytest.mark.parametrize(
    "rows",
    [
        lambda self, neurons: list(neurons),
        lambda self, neurons: [2 * neuron + part for part in range(2) for neuron in neurons],
        lambda self, neurons: [part * self.num_neurons + each - 1 for part in range(2) for each in neurons],
    ],
    ids=["the gate alone", "interleaved", "the neuron before"],
)
def test_wrong_rows_of_fused_projections_are_seen(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "rows", rows)
    model = tiny("phi3")
    with pytest.raises(AssertionError):
        zeroed_rows_silence_their_neurons_alone(model, list(down_projections(model)))


class Mixed(nn.Module):
    """An MLP whose neurons something happens to on their way."""

    def __init__(self, between: nn.Module | None = None, beside: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(3, 6), nn.Linear(6, 2), between
        self.beside = nn.Linear(3, 1) if beside else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        if self.between is not None:
            hidden = self.between(hidden)
        if self.beside is not None:
            hidden = hidden + self.beside(x)
        return self.down(hidden)


class Turned(nn.Module):
    """Brings neurons into another order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.order]


class TestRefusals:
    @pytest.mark.parametrize(
        "model",
        [
            Mixed(Turned([1, 0, 2, 3, 4, 5])),
            Mixed(Turned([0, 1, 2, 3, 5, 4])),
            Mixed(nn.LayerNorm(6)),
            Mixed(beside=True),
            nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 2)),
        ],
        ids=["first swapped", "last swapped", "normalized", "something else beside", "two MLPs in a row"],
    )
    def test_neurons_that_other_things_make_too(self, model: nn.Module) -> None:
        layer = "2" if isinstance(model, nn.Sequential) else "down"
        assert sources_beside(model, [layer])
        with pytest.raises(ValueError, match=rf"neurons of layer '{layer}' are not proved to be made by the rows of"):
            proved_sources(model, [layer])

    @pytest.mark.parametrize("name", EXPERTS)
    def test_fused_experts(self, name: str) -> None:
        model = tiny(name)
        with pytest.raises(ValueError, match="are made inside experts that are fused .*: units=False"):
            proved_sources(model, list(down_projections(model)))

    def test_a_layer_without_a_projection_of_its_size(self) -> None:
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(6, 2))
        with pytest.raises(ValueError, match="layer '2' are made by no projection beside it with 6 or 12 outputs"):
            proved_sources(model, ["2"])

    def test_a_model_that_cannot_be_run(self) -> None:
        model = nn.ModuleDict({"up": nn.Linear(3, 6), "down": nn.Linear(6, 2)})
        assert [source.name for source in sources_beside(model, ["down"])["down"]] == ["up"]
        with pytest.raises(ValueError, match="layer 'down' are not proved: the model cannot be run on tokens"):
            proved_sources(model, ["down"])

    def test_a_proof_leaves_the_model_as_it_was(self) -> None:
        model = Mixed(nn.LayerNorm(6)).train()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError):
            proved_sources(model, ["down"])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(module.training and not module._forward_hooks for module in model.modules())


class TestParamGroups:
    @pytest.mark.parametrize(
        ("name", "dims"), [("llama", (-1, 0)), ("phi3", (-1, 0)), ("opt", (-1, 0)), ("gpt2", (0, -1))]
    )
    def test_rows_and_columns_have_a_group_each(self, name: str, dims: tuple[int, int]) -> None:
        model = tiny(name)
        selection = NeuronSelection.random(model, 0.2, generator(0))
        plain = selection.param_groups(model)
        columns, rows = selection.param_groups(model, units=True)
        assert columns == plain[0] and "rows" not in columns and rows["rows"]
        assert (columns["neuron_dim"], rows["neuron_dim"]) == dims
        trained = {id(param) for group in (columns, rows) for param in group["params"]}
        assert {id(param) for param in model.parameters() if param.requires_grad} == trained
        names = {id(param): key for key, param in model.named_parameters()}
        for layer, sources in sources_beside(model, selection).items():
            for source in sources:
                for key, param in source.layer.named_parameters():
                    place = next(i for i, each in enumerate(rows["params"]) if each is param)
                    assert names[id(param)] == f"{source.name}.{key}"
                    assert rows["neurons"][place] == source.rows(selection[layer].tolist())

    def test_an_attention_projection_or_a_shared_weight_is_refused(self) -> None:
        model = tiny("llama")
        selection = NeuronSelection.random(model, 0.2, generator(0))
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        before = [param.requires_grad for param in model.parameters()]
        with pytest.raises(ValueError, match="'model.layers.0.mlp.up_proj' and 'model.layers.1.mlp.up_proj' share one"):
            selection.param_groups(model, units=True)
        assert [param.requires_grad for param in model.parameters()] == before

    def test_quantized_sources_are_refused(self) -> None:
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        selection = NeuronSelection({"2": [1]}, {"2": 6})
        model[0].weight = nn.Parameter(torch.ones(6, 3, dtype=torch.int8), requires_grad=False)
        model[0].forward = lambda x: x @ model[0].weight.T.float()
        with pytest.raises(
            ValueError, match=r"layer '0' holds torch.int8 codes, .* Train deltas: \S+trained_groups, or un"
        ):
            selection.param_groups(model, units=True)
