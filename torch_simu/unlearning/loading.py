"""Loading: a model and its tokenizer from a folder, without ever reading a pickle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from torch_simu._checks import check_choice, problem
from torch_simu.unlearning.data import load_tokenizer

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    source: str, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with its tokenizer.

    Args:
        source: A folder with `config.json`, safetensors weights and tokenizer files, or a name on the hub.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: Where the model goes; None: the GPU if there is one.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        ValueError: If `source` is no model with a tokenizer, or `dtype` or `device` is unknown.
    """
    check_choice("dtype", dtype, _DTYPES)
    place = _device(device)
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(problem(f"{source!r} holds no config.json", "the folder of a transformers model"))
    if not folder.exists() and (folder.is_absolute() or source.startswith(".") or source.count("/") != 1):
        raise FileNotFoundError(problem(f"Model folder {source!r} does not exist", "a folder, or a name on the hub"))
    tokenizer = load_tokenizer(source)
    with quiet_transformers():
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip() or "-").splitlines()[0]
            raise ValueError(problem(f"Model {source!r} cannot be loaded ({reason})", "safetensors weights")) from error
    vocabulary = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > vocabulary:
        wrong = f"The tokenizer of {source!r} has {len(tokenizer)} tokens and the model {vocabulary} embeddings"
        raise ValueError(problem(wrong, "a tokenizer of this model"))
    nn.Module.to(model, place)
    return model.eval(), tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the bars and notices of transformers, where the command line draws its own."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or "-").splitlines()[0]
        raise ValueError(
            problem(f"Device {name!r} cannot be used ({reason})", "cpu, or a device of this machine")
        ) from error
    return device
