"""Small models of several architectures, before anything is taught to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

POSITIONS = 256
SPECIAL: Mapping[str, int | None] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def llama(vocabulary: int, width: int, layers: int) -> PreTrainedModel:
    """A Llama; its head is a matrix of its own."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config)


def olmo2(vocabulary: int, width: int, layers: int) -> PreTrainedModel:
    """An OLMo 2: norms behind attention and MLP, and on queries and keys."""
    config = Olmo2Config(
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        **SPECIAL,
    )
    return Olmo2ForCausalLM(config)


def gpt2(vocabulary: int, width: int, layers: int) -> PreTrainedModel:
    """A GPT-2 without dropout: no gate, learned positions, weights stored the other way round, the embeddings as head.

    Half as many layers again, since a block without a gate has fewer weights.
    """
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=width,
        n_inner=4 * width,
        n_layer=3 * layers // 2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    )
    return GPT2LMHeadModel(config)


SHAPES: Mapping[str, Callable[[int, int, int], PreTrainedModel]] = {"llama": llama, "olmo2": olmo2, "gpt2": gpt2}
"""Name -> model of a vocabulary, a width and a number of layers."""
