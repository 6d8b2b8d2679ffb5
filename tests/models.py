"""Tiny causal language models of many architectures, seeded, for tests that must hold on all of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tests.devices.placing import here

VOCABULARY = 97
NUM_BLOCKS = 2
D_MODEL = 32

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_COMMON = {
    "hidden_size": D_MODEL,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEADS = {**_COMMON, "head_dim": 8}
_GPT = {"n_embd": D_MODEL, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 64}
_OLD = {"hidden_size": D_MODEL, "num_attention_heads": 4}

# Model type -> (configuration class, its arguments).
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "mistral": ("MistralConfig", _COMMON),
    "olmo": ("OlmoConfig", _COMMON),
    "olmo2": ("Olmo2Config", _COMMON),
    "olmo3": ("Olmo3Config", _COMMON),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _HEADS),
    "gemma": ("GemmaConfig", _HEADS),
    "gemma2": ("Gemma2Config", _HEADS),
    "gemma3_text": ("Gemma3TextConfig", _HEADS),
    "phi": ("PhiConfig", {**_COMMON, "num_key_value_heads": 4}),
    "phi3": ("Phi3Config", _COMMON),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": D_MODEL,
            "num_layers": NUM_BLOCKS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            **_OLD,
            "ffn_dim": 80,
            "num_hidden_layers": NUM_BLOCKS,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": D_MODEL,
        },
    ),
    "falcon": ("FalconConfig", {**_OLD, "num_hidden_layers": NUM_BLOCKS}),
    "bloom": ("BloomConfig", {"hidden_size": D_MODEL, "n_layer": NUM_BLOCKS, "n_head": 4}),
    "starcoder2": ("Starcoder2Config", _COMMON),
    "stablelm": ("StableLmConfig", _COMMON),
    "cohere": ("CohereConfig", _COMMON),
    "mpt": ("MptConfig", {"d_model": D_MODEL, "n_layers": NUM_BLOCKS, "n_heads": 4, "max_seq_len": 64}),
    # Not in the table of layers: known by their tensor-parallel plan, or refused.
    "granite": ("GraniteConfig", _COMMON),
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_COMMON, "block_types": ["recurrent", "attention"], "lru_width": 32},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **_HEADS,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        },
    ),
    "mamba": (
        "MambaConfig",
        {"hidden_size": D_MODEL, "num_hidden_layers": NUM_BLOCKS, "state_size": 4, "use_mambapy": False},
    ),
}

NAMES = tuple(name for name in _CONFIGS if name not in ("granite", "mamba"))
"""The architectures in the table of `torch_simu.layers`."""

EXPERTS = ("mixtral", "olmoe", "gpt_oss", "qwen3_moe")
"""Those whose experts are fused into one parameter."""


def tiny(name: str, seed: int = 0, **config: Any) -> nn.Module:
    """A causal model of the named type with 2 blocks of width 32, in eval mode, the same for the same seed.

    Args:
        name: One of `NAMES`, or a model type that the table leaves out: granite, mamba.
        seed: Seed of the initialization; the global generator is left as it was.
        config: Arguments of the configuration that replace the tiny ones.
    """
    kind, arguments = _CONFIGS[name]
    chosen = getattr(transformers, kind)(**{"vocab_size": VOCABULARY, **_SPECIAL, **arguments, **config})
    # The same weights on every device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(chosen).eval().to(here())
