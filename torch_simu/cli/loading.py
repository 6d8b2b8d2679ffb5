"""Loading: a model and its tokenizer from a folder, without ever reading a pickle."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import cached_file

from torch_simu._checks import check_choice, problem
from torch_simu.bitsandbytes.installed import require_bitsandbytes
from torch_simu.bitsandbytes.packing import keep_codes_as_loaded
from torch_simu.deltas import load_deltas
from torch_simu.deltas.files import DELTAS as DELTAS
from torch_simu.layers import attention_projections
from torch_simu.patch.weights import INDEX, indexed_files, weight_files
from torch_simu.unlearning.data.tokenizer import load_tokenizer

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CODES = ("8bit", "4bit")

_MERGE = "Merge the adapter into the model (merge_and_unload) and save the whole."

BASE_STILL_KNOWS = (
    "The weights in this folder are the untouched quantized base, which still knows the forget set; what makes it "
    f"forget is {DELTAS} beside it. The figures hold for both together: load them with "
    "torch_simu.cli.loading.load_model or torch-simu. Other loaders open the base alone; for a folder that forgets "
    "in any loader, use --save-as float."
)
"""What a report says of the folder of a quantized model."""


def load_model(
    source: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    load_in: str | None = None,
    float_attention: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with its tokenizer.

    Args:
        source: A folder with `config.json`, safetensors weights and tokenizer files, or a name on the hub.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: Where the model goes; None: the GPU if there is one.
        load_in: "8bit" or "4bit" (NF4) codes of bitsandbytes for the linear layers but the head; None: as saved.
        float_attention: Whether the attention projections keep their weights then, so that they can be trained.

    Returns:
        The model in eval mode, and the tokenizer. Deltas that are saved beside the model are attached.

    Raises:
        ValueError: If `source` is no model with a tokenizer, its weights are not all of the model and nothing else (the
            message names them), it holds an adapter, or `dtype` or `device` is unknown.
    """
    place, folder = _device(device), Path(source)
    tokenizer = _checked(source, dtype, load_in)
    with quiet_transformers():
        options: dict[str, Any] = {} if load_in is None else _quantized(source, load_in, float_attention, place)
        try:
            # Shapes that do not fit are reported with the other weights that do not.
            options |= {
                "trust_remote_code": False,
                "use_safetensors": True,
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,
            }
            options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
            loaded = cast("Any", AutoModelForCausalLM.from_pretrained(source, **options))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or "-").splitlines()[0]
            raise ValueError(problem(f"Model {source!r} cannot be loaded ({reason})", "safetensors weights")) from error
    model: PreTrainedModel = loaded[0]
    _check_whole(source, loaded[1])
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(problem(f"{source!r} holds an adapter", "the weights of a whole model", _MERGE))
    if getattr(model, "hf_quantizer", None) is None:
        nn.Module.to(model, place)
    # How bitsandbytes' tensors were read has no way back in transformers 5.23, which save_pretrained asks for: they
    # are written as they are.
    if conversions := cast("Any", model).__dict__.get("_weight_conversions"):
        cast("Any", model)._weight_conversions = [each for each in conversions if not _is_of_bitsandbytes(each)]
    keep_codes_as_loaded(model)
    if (deltas := folder / DELTAS).is_file():
        load_deltas(model, deltas)
    return model.eval(), tokenizer


@dataclass(frozen=True, slots=True)
class Loading:
    """How the models of a job are loaded.

    Args:
        dtype: As in `load_model`, like the others.
        device: Where the model goes.
        load_in: Codes of bitsandbytes.
    """

    dtype: str = "auto"
    device: str | None = None
    load_in: str | None = None

    def check(self, source: str) -> None:
        """Raise what `load` of this source would, as far as it can be told without reading the weights."""
        _device(self.device)
        _checked(source, self.dtype, self.load_in)

    def load(self, source: str, *, float_attention: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer from a source; `float_attention` and the errors are as in `load_model`."""
        return load_model(
            source, dtype=self.dtype, device=self.device, load_in=self.load_in, float_attention=float_attention
        )


def _checked(source: str, dtype: str, load_in: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, after all checks that need none of its weights."""
    check_choice("dtype", dtype, _DTYPES)
    if load_in is not None:
        check_choice("load_in", load_in, _CODES)
        require_bitsandbytes(f"load_in {load_in!r}")
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(problem(f"{source!r} holds no config.json", "the folder of a transformers model"))
    if not folder.exists() and (folder.is_absolute() or source.startswith(".") or source.count("/") != 1):
        raise FileNotFoundError(problem(f"Model folder {source!r} does not exist", "a folder, or a name on the hub"))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(problem(f"{source!r} holds an adapter", "the weights of a whole model", _MERGE))
    _check_files(source)
    return load_tokenizer(source)


def _check_files(source: str) -> None:
    """Raise where an index names anything but safetensors: transformers would read it by what its name says."""
    if Path(source).exists():
        weight_files(source)
        return
    index = None
    # What cannot be fetched is said where the model itself is.
    with suppress(OSError, ValueError):
        index = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        indexed_files(index)


def _check_whole(source: str, found: Mapping[str, Collection[Any]]) -> None:
    """Raise unless the weights are the model's, all of them and nothing else.

    transformers draws what it does not find at random and leaves what it does not know, with a notice only.
    """
    lacking, unknown = sorted(found["missing_keys"]), sorted(filter(_is_weight, found["unexpected_keys"]))
    misfits = sorted(f"{name} of shape {tuple(has)}" for name, has, _ in found["mismatched_keys"])
    sides = (("lack", lacking), ("do not fit the model in", misfits), ("hold beside the model", unknown))
    said = [f"{verb} {_listed(names)}" for verb, names in sides if names]
    if not said:
        return
    if unknown and (prefix := re.match(r"(_orig_mod|module|_forward_module)\.", unknown[0])):
        advice = f"They were saved from a wrapped model; save the model inside (its `{prefix[1]}`)."
    elif any(name.endswith((".delta", ".idx")) for name in unknown):
        advice = "They hold deltas: save those with torch_simu.deltas.save_deltas, and the model after detach_deltas."
    elif any(re.search(r"\.(lora_|base_layer\.)", name) for name in unknown):
        advice = _MERGE
    else:
        advice = "Are config.json and the weights of one model, and is none of the files missing?"
    raise ValueError(problem(f"The weights of {source!r} {' and '.join(said)}", "all of the model's", advice))


def _is_of_bitsandbytes(conversion: object) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(type(each).__module__.endswith(".bitsandbytes") for each in operations)


def _is_weight(name: str) -> bool:
    # Masks and tables that older versions of transformers saved; models make them anew.
    return not re.search(r"(?:^|\.)(?:inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$", name)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _quantized(source: str, load_in: str, float_attention: bool, place: torch.device) -> dict[str, Any]:
    kept = None
    if float_attention:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
        # With a list of one's own, the head that transformers keeps without one must be in it.
        head, tied = empty.get_output_embeddings(), getattr(empty, "all_tied_weights_keys", None) or {}
        heads = {name for name, module in empty.named_modules() if module is head}
        heads |= {name.removesuffix(".weight") for name in (*tied, *tied.values())}
        kept = sorted(heads | {name.rsplit(".", 1)[-1] for name in attention_projections(empty)})
    if load_in == "8bit":
        # Without a threshold for outliers, by which a row's result would depend on the other rows of the batch.
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=kept)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept)
    return {"quantization_config": config, "device_map": {"": place}}


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
