"""One definition of attention projections and of down projections, in every family, listed or found by a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.models import NAMES, tiny
from tests.pages.architectures import made
from torch_simu import NeuronSelection
from torch_simu.layers import attention_projections, down_projections, probed_projections

PAGE = Path(__file__).parents[2] / "docs" / "api" / "layers.md"

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_HYBRID = {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16}
_STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj")
# Model type -> (configuration, arguments, down projections, attention projections), none of them in the table.
UNLISTED = {
    "deepseek_v3": (
        "DeepseekV3",
        _LATENT,
        {"mlp.down_proj", "mlp.experts", "mlp.shared_experts.down_proj"},
        {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")},
    ),
    "zamba2": (
        "Zamba2",
        {
            **_HYBRID,
            **{"num_mem_blocks": 1, "hybrid_layer_ids": [1, 3], "mamba_d_state": 8, "n_mamba_heads": 8},
            **{"mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8, "use_mem_eff_path": False, "adapter_rank": 4},
        },
        {"shared_transformer.feed_forward.down_proj"},
        {f"shared_transformer.self_attn.{name}" for name in _SPLIT},
    ),
    "zamba": (
        "Zamba",
        {
            **_HYBRID,
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "n_mamba_heads": 2},
            **{"use_mamba_kernels": False, "attention_hidden_size": 64},
        },
        {"shared_transf.feed_forward.down_proj"},
        {f"shared_transf.self_attn.{name}" for name in _SPLIT},
    ),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
        {"feed_forward.w2"},
        {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    ),
    "falcon_h1": (
        "FalconH1",
        {**_STATE, "mamba_d_ssm": 64, "head_dim": 8},
        {"feed_forward.down_proj"},
        {f"self_attn.{name}" for name in _SPLIT},
    ),
    "bamba": (
        "Bamba",
        {**_STATE, "attn_layer_indices": [1]},
        {"feed_forward.down_proj"},
        {f"self_attn.{name}" for name in _SPLIT},
    ),
}


def unlisted(name: str) -> nn.Module:
    config, options, _, _ = UNLISTED[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{config}Config")(**{**_SIZES, **options})
    return getattr(transformers, f"{config}ForCausalLM")(made).eval()


def ends(names) -> set[str]:
    """What follows the number of the block."""
    return {re.sub(r"^.*?\.\d+\.", "", name) for name in names}


def attended(model: nn.Module) -> set[str]:
    """Every linear layer inside a module that calls itself attention: what a reader of the model would name."""
    found = set()
    for name, module in model.named_modules():
        if re.search(r"Attention(?!Decoder)", type(module).__name__):
            inside = module.named_modules(prefix=name)
            found |= {key for key, layer in inside if isinstance(layer, nn.Linear | Conv1D)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_every_linear_layer_inside_it_in_every_family(name: str) -> None:
    model = tiny(name)
    assert set(attention_projections(model)) == attended(model)
    # The run on a few tokens answers what the table does.
    assert probed_projections(model) == (set(down_projections(model)), attended(model))


@pytest.mark.parametrize("name", list(UNLISTED))
def test_a_run_finds_attention_and_down_projections_behind_convolutions_recurrences_and_glue(name: str) -> None:
    try:
        model = unlisted(name)
    except ValueError as error:
        if "tie_weights_keys" not in str(error):
            raise
        pytest.skip(f"this version of transformers cannot make the model: {error}")
    _, _, down, attention = UNLISTED[name]
    assert ends(down_projections(model)) == down
    assert ends(attention_projections(model)) == attention
    assert set(attention_projections(model)) == attended(model)


def test_attention_whose_weights_are_not_all_linear_layers_is_refused_with_what_the_call_accepts() -> None:
    options = {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    model = transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**{**_SIZES, **options}))
    message = r"^The attention projections of JetMoe.* not known, .* for attention='full'\. Pass attention='frozen'\.$"
    with pytest.raises(ValueError, match=message):
        NeuronSelection({}, {}).param_groups(model, attention="full")


@pytest.mark.parametrize("kind", ["Bart", "Pegasus", "Marian"])
def test_a_model_with_an_encoder_and_a_decoder_is_refused_without_a_pattern(kind: str) -> None:
    sizes = {"d_model": 32, "vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_ffn_dim": 64, f"{part}_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, decoder_start_token_id=1)
    head = "MTModel" if kind == "Marian" else "ForConditionalGeneration"
    model = getattr(transformers, kind + head)(config)
    for find in (down_projections, attention_projections):
        with pytest.raises(ValueError, match=rf"{kind}{head} has an encoder and a decoder, expected .*decoder.layers"):
            find(model)
    assert len(down_projections(model, r"decoder\.layers\.\d+\.fc2")) == 2


def test_the_page_lists_what_attention_full_trains_in_every_family() -> None:
    trained: dict[str, list[str]] = {}
    for name in NAMES:
        layers = ", ".join(f"`{layer}`" for layer in sorted(ends(attention_projections(tiny(name)))))
        trained.setdefault(layers, []).append(name)
    rows = [f"| {', '.join(names)} | {layers} |" for layers, names in trained.items()]
    table = "\n".join(["| model type | layers |", "|---|---|", *rows])
    assert table in PAGE.read_text(), f"docs/api/layers.md should hold:\n{table}"


class Part(nn.Module):
    """Two layers, and what is between and behind them."""

    def __init__(self, between: Callable[[Tensor], Tensor], behind: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.between, self.behind = nn.Linear(8, 12), nn.Linear(12, 8), between, behind

    def forward(self, hidden: Tensor) -> Tensor:
        return self.behind * self.down(self.between(self.up(hidden)))


class Around(nn.Module):
    """A block that holds parts, and adds what they give."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + sum(part(hidden) for part in self.children())


class Listed(Around):
    """A part that adds what the experts in its list give."""

    def __init__(self, *experts: nn.Module) -> None:
        super().__init__()
        self.members, self.router = nn.ModuleList(experts), nn.Linear(8, len(experts))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen = self.router(hidden).softmax(-1)
        return sum(expert(hidden) * chosen[..., [each]] for each, expert in enumerate(self.members))


class Toy(nn.Module):
    """A model without a known type, of the blocks that it is given."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(num_hidden_layers=len(blocks), hidden_size=8)
        self.embed, self.layers = nn.Embedding(17, 8), nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for block in self.layers:
            hidden = block(hidden)
        return hidden


def toy(make: Callable[[], nn.Module]) -> Toy:
    torch.manual_seed(0)
    return Toy(make(), make())


@pytest.mark.parametrize("inside", [True, False], ids=["in a part", "in the block"])
@pytest.mark.parametrize("between", [torch.relu, nn.functional.silu, torch.tanh])
def test_a_layer_behind_a_nonlinearity_of_each_position_is_a_down_projection(
    between: Callable[[Tensor], Tensor], inside: bool
) -> None:
    model = toy(lambda: Around(mlp=Part(between), glue=nn.Linear(8, 8)) if inside else Part(between))
    assert ends(probed_projections(model)[0]) == {"mlp.down" if inside else "down"}


@pytest.mark.parametrize("inside", [True, False], ids=["in a part", "in the block"])
def test_the_second_of_two_linear_layers_without_a_nonlinearity_is_no_down_projection(inside: bool) -> None:
    model = toy(lambda: Around(pair=Part(nn.Identity()), glue=nn.Linear(8, 8)) if inside else Part(nn.Identity()))
    assert probed_projections(model) == (set(), set())


def test_a_layer_that_gets_what_other_positions_made_is_attention_or_refused_and_never_an_mlp() -> None:
    down, attention = probed_projections(
        toy(lambda: Around(mixer=Part(partial(torch.cumsum, dim=-2)), mlp=Part(torch.relu)))
    )
    assert (ends(down), ends(attention)) == ({"mlp.down"}, {"mixer.up", "mixer.down"})
    inlined = toy(lambda: Part(partial(torch.cumsum, dim=-2)))
    with pytest.raises(ValueError, match="does not tell what Part is, expected attention or an MLP"):
        probed_projections(inlined)
    with pytest.raises(ValueError, match=r"of Toy .* are not known, .* candidates are: layers.\*.up \(8 inputs\)"):
        down_projections(inlined)


@pytest.mark.parametrize(
    ("part", "kind"), [(lambda: Part(torch.relu, 0.0), "Part"), (lambda: Listed(*(Part(torch.relu),) * 2), "Listed")]
)
def test_a_part_whose_behavior_tells_nothing_is_refused(part: Callable[[], nn.Module], kind: str) -> None:
    with pytest.raises(ValueError, match=f"does not tell what {kind} is"):
        probed_projections(toy(lambda: Around(part=part(), glue=nn.Linear(8, 8))))


@pytest.mark.parametrize(
    ("name", "down"), [("xlm", "lin2"), ("cpmant", "ffn.ffn.w_out"), ("prophetnet", "feed_forward.output")]
)
def test_attention_is_told_from_an_mlp_in_models_with_other_lists_and_with_tokens_of_their_own(
    name: str, down: str
) -> None:
    model = made(name)
    found, attention = down_projections(model), attention_projections(model)
    assert ends(found) == {down}
    assert not found.keys() & attended(model)
    assert set(attention) == {layer for layer in attended(model) if "cross_attn" not in layer}


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "qwen2_moe": {"mlp.experts", "mlp.shared_expert.down_proj"},
        "aria_text": {"mlp.experts", "mlp.shared_experts.down_proj"},
        "llama4_text": {"feed_forward.experts", "feed_forward.shared_expert.down_proj"},
        "afmoe": {"mlp.down_proj", "mlp.experts", "mlp.shared_experts.down_proj"},
        "glm4_moe_lite": {"mlp.down_proj", "mlp.experts", "mlp.shared_experts.down_proj"},
        "hunyuan_v1_moe": {"mlp.experts", "mlp.shared_mlp.down_proj"},
        "nemotron_h": {"mixer.down_proj", "mixer.experts", "mixer.shared_experts.down_proj"},
    }.items(),
)
def test_shared_experts_are_found_beside_routed_ones_whichever_of_them_the_plan_leaves_out(
    name: str, expected: set[str]
) -> None:
    model = made(name)
    found = down_projections(model)
    assert ends(found) == expected
    assert set(found) == {layer for layer, _ in model.named_modules() if layer.endswith(tuple(expected))}


def test_a_run_that_adds_to_the_plan_in_another_part_of_the_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"differ on 3 .*'model.layers.0.input_layernorm.mlp.fc2' is in a run"):
        down_projections(made("axk2"))
