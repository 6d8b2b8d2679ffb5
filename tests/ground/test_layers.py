"""The layers of a known model are found by name, and an unknown one gives an error that lists candidates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.models import D_MODEL, EXPERTS, NAMES, NUM_BLOCKS, VOCABULARY, tiny
from torch_simu.layers import (
    attention_projections,
    down_projections,
    is_neuron_layer,
    neuron_dim,
    neuron_weight,
    num_neurons,
    probed_projections,
    select_layers,
)

SEPARATE = [f"self_attn.{kind}_proj" for kind in "qkvo"]
# Model type -> (prefix of a block, its down projection, its attention projections).
EXPECTED = {
    **{
        name: ("model.layers", "mlp.down_proj", SEPARATE)
        for name in (
            *("llama", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3"),
            *("gemma", "gemma2", "gemma3_text", "cohere", "stablelm", "granite"),
        )
    },
    "phi3": ("model.layers", "mlp.down_proj", ["self_attn.qkv_proj", "self_attn.o_proj"]),
    "phi": ("model.layers", "mlp.fc2", [*SEPARATE[:3], "self_attn.dense"]),
    "starcoder2": ("model.layers", "mlp.c_proj", SEPARATE),
    "gpt2": ("transformer.h", "mlp.c_proj", ["attn.c_attn", "attn.c_proj"]),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", ["attention.query_key_value", "attention.dense"]),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h", ["self_attention.query_key_value", "self_attention.dense"]),
    "bloom": ("transformer.h", "mlp.dense_4h_to_h", ["self_attention.query_key_value", "self_attention.dense"]),
    "gptj": ("transformer.h", "mlp.fc_out", [f"attn.{kind}_proj" for kind in ("q", "k", "v", "out")]),
    "gpt_neo": ("transformer.h", "mlp.c_proj", [f"attn.attention.{kind}_proj" for kind in ("q", "k", "v", "out")]),
    "opt": ("model.decoder.layers", "fc2", [f"self_attn.{kind}_proj" for kind in ("q", "k", "v", "out")]),
    "mpt": ("transformer.blocks", "ffn.down_proj", ["attn.Wqkv", "attn.out_proj"]),
    **{name: ("model.layers", "mlp.experts", SEPARATE) for name in EXPERTS},
    "recurrent_gemma": ("model.layers", "mlp_block.down_proj", [f"temporal_block.{kind}_proj" for kind in "qkvo"]),
}
DENSE = [name for name in EXPECTED if name not in EXPERTS]
FOUR_TIMES = ("gpt2", "gptj", "gpt_neo", "falcon", "bloom", "mpt")


def expected(name: str, which: int) -> set[str]:
    """The names in the table above, for every block that has them."""
    prefix, down, attention = EXPECTED[name]
    found = {f"{prefix}.{block}.{end}" for block in range(NUM_BLOCKS) for end in ([down], attention)[which]}
    if name == "qwen3_moe" and which == 0:
        # Its first block is dense.
        return found - {"model.layers.0.mlp.experts"} | {"model.layers.0.mlp.down_proj"}
    # The first block of this one is recurrent.
    return {layer for layer in found if name != "recurrent_gemma" or which == 0 or ".1." in layer}


def found_by_behavior(model: nn.Module, prefix: str) -> tuple[set[str], set[str]]:
    """Down and attention projections by what their inputs depend on: the naive oracle, which reads no name.

    Every linear layer's output is cut loose, so that a gradient shows the layers directly before. The attention output
    depends on other positions of its predecessors, which are the attention inputs. The down projection depends on its
    own position of predecessors that are no attention output.
    """
    layers = {name: module for name, module in model.named_modules() if is_neuron_layer(module)}
    inputs, outputs, handles = {}, {}, []

    def cut(name):
        def hook(module, args, output):
            inputs[name], outputs[name] = args[0], output.detach().requires_grad_()
            return outputs[name].clone()

        return hook

    for name, module in layers.items():
        handles.append(module.register_forward_hook(cut(name)))
    model(torch.tensor([[3, 4, 5, 6]]))
    down, attention = set(), set()
    for block in range(NUM_BLOCKS):
        names = [name for name in layers if name.startswith(f"{prefix}.{block}.")]
        moves = {}
        for name in names:
            last = inputs[name].reshape(4, -1)[-1].square().sum()
            grads = torch.autograd.grad(last, [outputs[other] for other in names], allow_unused=True, retain_graph=True)
            moves[name] = {
                other: [bool(row.any()) for row in grad.reshape(4, -1)]
                for other, grad in zip(names, grads, strict=True)
                if grad is not None and grad.any()
            }
        ends = {name for name in names if any(True in rows[:-1] for rows in moves[name].values())}
        attention |= ends | {other for name in ends for other in moves[name]}
        down |= {name for name in names if name not in ends and moves[name].keys() - ends}
    for handle in handles:
        handle.remove()
    return down, attention


class TestKnownModels:
    def test_every_architecture_of_the_table_is_tested_here(self):
        assert set(NAMES) | {"granite"} == set(EXPECTED)

    @pytest.mark.parametrize("name", EXPECTED)
    def test_down_and_attention_projections_are_found_exactly(self, name):
        model = tiny(name)
        down, attention = down_projections(model), attention_projections(model)
        assert (set(down), set(attention)) == (expected(name, 0), expected(name, 1))
        if name in DENSE and name != "recurrent_gemma":
            assert (set(down), set(attention)) == found_by_behavior(model, EXPECTED[name][0])
        modules = dict(model.named_modules())
        assert all(modules[layer] is module for layer, module in {**down, **attention}.items())
        assert list(down) == [layer for layer in modules if layer in down]

    @pytest.mark.parametrize("name", EXPECTED)
    def test_a_run_on_a_few_tokens_finds_the_same_and_leaves_the_model_alone(self, name):
        model = tiny(name).train()
        random, before = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
        down, attention = probed_projections(model)
        assert down == expected(name, 0)
        # A recurrence mixes positions, too.
        assert {layer for layer in attention if ".linear_" not in layer} == expected(name, 1)
        assert torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(module.training and not module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("name", EXPERTS)
    def test_the_neurons_of_fused_experts_are_counted_expert_by_expert(self, name):
        for layer, module in down_projections(tiny(name)).items():
            if not layer.endswith("experts"):
                continue
            ff = 24 if name == "qwen3_moe" else 80
            assert num_neurons(module) == 4 * ff
            assert neuron_dim(module) == ((0, 1) if name == "gpt_oss" else (0, 2))
            assert tuple(neuron_weight(module).shape) == ((4, ff, D_MODEL) if name == "gpt_oss" else (4, D_MODEL, ff))

    @pytest.mark.parametrize("name", DENSE)
    def test_the_neurons_are_the_input_features(self, name):
        for module in down_projections(tiny(name)).values():
            # The last one halves its size.
            size = 4 * D_MODEL if name in FOUR_TIMES else 40 if name == "recurrent_gemma" else 80
            assert num_neurons(module) == size
            assert module.weight.shape[neuron_dim(module)] == size
            assert neuron_dim(module) == (0 if name == "gpt2" else -1)

    def test_one_neuron_moves_the_output_only_through_its_own_slice_of_the_weight(self):
        for name in ("llama", "gpt2"):
            module = next(iter(down_projections(tiny(name)).values()))
            one = torch.zeros(num_neurons(module))
            one[5] = 2.0
            moved = module(one) - module(torch.zeros_like(one))
            torch.testing.assert_close(moved, 2 * module.weight.select(neuron_dim(module), 5))

    def test_names_go_on_below_a_wrapper(self):
        wrapped = nn.Sequential(tiny("llama"))
        assert set(select_layers(wrapped, r"mlp\.down_proj")) == {f"0.{name}" for name in expected("llama", 0)}

    def test_a_vision_tower_is_no_part_of_the_language_model(self):
        def tower():
            names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
            return nest({f"layers.0.{name}": nn.Linear(2, 2) for name in names})

        model = nest({"model.language_model": tower(), "model.vision_tower.encoder": tower()})
        model.config = SimpleNamespace(model_type="gemma3")
        prefix = "model.language_model.layers.0"
        assert set(down_projections(model)) == {f"{prefix}.mlp.down_proj"}
        assert set(attention_projections(model)) == {f"{prefix}.self_attn.q_proj", f"{prefix}.self_attn.o_proj"}

    def test_a_tiny_model_is_the_same_for_the_same_seed_and_draws_nothing_else(self):
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        one, two, three = tiny("gpt2", 1), tiny("gpt2", 1), tiny("gpt2", 2)
        assert torch.equal(before, torch.random.get_rng_state())
        tokens = torch.arange(VOCABULARY)[None, :8]
        assert torch.equal(one(tokens).logits, two(tokens).logits)
        assert not torch.equal(one(tokens).logits, three(tokens).logits)


class TestUnknownModels:
    def test_an_unknown_architecture_is_refused_with_its_candidates(self):
        model = tiny("mamba")
        for find, what in ((down_projections, "MLP down"), (attention_projections, "attention")):
            with pytest.raises(ValueError, match=rf"The {what} projections of MambaForCausalLM \(model type 'mamba'\)"):
                find(model)
            with pytest.raises(ValueError, match=r"candidates are: .*backbone.layers.\*.mixer.out_proj \(64 inputs\)"):
                find(model)

    def test_a_module_without_configuration_is_refused_with_its_candidates(self):
        with pytest.raises(ValueError, match=r"Sequential \(model type None\) .* candidates are: \* \(4 inputs\)"):
            down_projections(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
        with pytest.raises(ValueError, match="candidates are: none"):
            down_projections(nn.ReLU())

    def test_an_unknown_architecture_is_known_by_its_behavior(self):
        model = tiny("llama")
        model.config.model_type = "unheard_of"
        model.config.base_model_tp_plan = None
        assert set(down_projections(model)) == expected("llama", 0)
        assert set(attention_projections(model)) == expected("llama", 1)

    @pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
    def test_answers_that_differ_are_refused_and_both_are_named(self, model_type):
        model = tiny("llama")
        model.config.model_type = model_type
        model.config.base_model_tp_plan = {"layers.*.mlp.up_proj": "rowwise"}
        other = "the table of known models" if model_type == "llama" else "a run on a few tokens"
        with pytest.raises(
            ValueError, match=f"(?i){other}.* differ on 4 MLP down projections .*down_proj' is in {other}"
        ):
            down_projections(model)

    def test_a_probe_of_a_model_without_blocks_or_weights_is_refused(self):
        with pytest.raises(ValueError, match="No ModuleList of Linear has as many modules as its num_hidden_layers"):
            probed_projections(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="LlamaForCausalLM has no token embeddings that it could be run with"):
            probed_projections(tiny("llama").to("meta"))

    def test_a_pattern_names_the_dense_layers_beside_fused_experts(self):
        assert list(down_projections(tiny("qwen3_moe"), r"mlp\.down_proj")) == ["model.layers.0.mlp.down_proj"]

    def test_a_pattern_finds_the_layers_of_any_module(self):
        model = nest({"a.out": nn.Linear(4, 2), "b.out": nn.Linear(3, 2), "c.in": nn.Linear(2, 2)})
        assert list(down_projections(model, "out")) == ["a.out", "b.out"]
        assert list(attention_projections(model, r"c\.in|b\.out")) == ["b.out", "c.in"]

    def test_a_pattern_that_matches_another_kind_of_layer_is_refused(self):
        with pytest.raises(TypeError, match=r"Layer '1' is a ReLU, expected nn.Linear, Conv1D or fused experts"):
            down_projections(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "1")

    def test_a_pattern_that_matches_nothing_is_refused(self):
        with pytest.raises(ValueError, match="No layer matches 'down' for MLP down projections, expected"):
            down_projections(nn.Sequential(nn.Linear(4, 2)), "down")


class TestSelectors:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def test_none_means_the_down_projections(self):
        model = tiny("llama")
        assert list(select_layers(model)) == list(down_projections(model))

    def test_a_pattern_matches_the_end_of_a_name_from_a_dot_on(self):
        names = ("mlp.down_proj", "xmlp.down_proj", "a.mlp.down_proj", "mlp.up")
        model = nest({name: nn.Linear(1, 1) for name in names})
        assert list(select_layers(model, r"mlp\.down_proj")) == ["mlp.down_proj", "a.mlp.down_proj"]
        assert list(select_layers(model, "a|up")) == ["mlp.up", "a"]

    @given(st.sets(st.sampled_from(["0", "1", "2"]), min_size=1))
    def test_names_predicates_and_patterns_agree_and_keep_the_order_of_the_model(self, names):
        by_name = select_layers(self.model, sorted(names, reverse=True))
        assert by_name == select_layers(self.model, lambda name, module: name in names)
        assert by_name == select_layers(self.model, "|".join(names))
        assert by_name == select_layers(self.model, iter(names))
        assert list(by_name) == sorted(names)
        assert all(module is self.model[int(name)] for name, module in by_name.items())

    def test_a_predicate_sees_the_module(self):
        assert list(select_layers(self.model, lambda name, module: isinstance(module, nn.ReLU))) == ["1"]

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(KeyError, match=r"Layer '7' is not in the model, expected a name from named_modules\(\)"):
            select_layers(self.model, ["0", "7"])

    @pytest.mark.parametrize(
        ("select", "message"),
        [
            ("mlp", r"The pattern 'mlp' matches no layer, expected at least one. Name .* \* \(8 inputs\)"),
            (lambda name, module: False, "The selector matches no layer"),
            ([], "The selector matches no layer"),
            ("(mlp", r"The pattern '\(mlp' is invalid \(missing \), .* expected a regular expression"),
        ],
    )
    def test_a_selector_that_matches_nothing_is_refused(self, select, message):
        with pytest.raises(ValueError, match=message):
            select_layers(self.model, select)


def test_the_dimension_of_the_neurons_of_another_kind_of_layer_is_refused():
    for ask in (neuron_dim, num_neurons):
        with pytest.raises(TypeError, match=r"The layer is a Embedding, expected nn\.Linear, Conv1D or fused experts"):
            ask(nn.Embedding(2, 2))
    assert not is_neuron_layer(nn.Conv1d(2, 2, 1))


def nest(leaves: dict[str, nn.Module]) -> nn.Module:
    """A module with the given modules at dotted names."""
    root = nn.Module()
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, leaf)
    return root
