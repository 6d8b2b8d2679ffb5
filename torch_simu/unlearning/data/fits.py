"""Fits: whether a model can read the examples at all, asked before the work begins."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torch_simu._checks import problem
from torch_simu.unlearning.data.error import DataError
from torch_simu.unlearning.data.examples import Example


def num_positions(model: nn.Module) -> int | None:
    """Return how many tokens the model can read at once, or None where nothing bounds them.

    Learned positions and tables of fixed ones end, as in GPT-2, OPT and GPT-J. Rotary positions that are computed as
    they are needed do not, nor do biases by distance: beyond the trained length a model is worse, but not wrong.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 4, "n_positions": 16, "n_embd": 4, "n_layer": 1, "n_head": 1}
        >>> num_positions(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)))
        16
    """
    config = getattr(model, "config", None)
    if config is None or any(hasattr(module, "inv_freq") for module in model.modules()):
        return None
    text = config.get_text_config()
    positions = None if getattr(text, "alibi", False) else getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def num_embeddings(model: nn.Module) -> int | None:
    """Return how many token ids the model knows, or None where it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    count = getattr(find(), "num_embeddings", None) if find is not None else None
    return count if isinstance(count, int) else None


def check_fits(model: nn.Module, examples: Sequence[Example]) -> None:
    """Raise where an example has more tokens than the model has positions, or an id beyond its embeddings.

    Args:
        model: A model of transformers.
        examples: Encoded rows.

    Raises:
        DataError: The message names the row and what to do.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, bos_token_id=0, eos_token_id=0, **sizes))
        >>> check_fits(model, [Example((1, 5), (-100, 5), "rows.jsonl:3")])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_simu.unlearning.data.error.DataError: rows.jsonl:3: token id 5 is beyond the model's 4 embeddings, ...
    """
    positions, embeddings = num_positions(model), num_embeddings(model)
    for number, example in enumerate(examples):
        place, length = example.place or f"example {number}", len(example.input_ids)
        if positions is not None and length > positions:
            wrong = f"{place}: the row takes {length} tokens and the model has {positions} positions"
            advice = f"Shorten the row, or cut long prompts: max_length={positions}."
            raise DataError(problem(wrong, f"at most {positions} tokens", advice))
        if embeddings is not None and not 0 <= max(example.input_ids) < embeddings:
            wrong = f"{place}: token id {max(example.input_ids)} is beyond the model's {embeddings} embeddings"
            advice = "Take the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
            raise DataError(problem(wrong, f"ids below {embeddings}", advice))
