"""Every causal language model that transformers names, made small: where its neurons are, and how they are attributed.

The page of supported models is written from these measurements, by `python -m benchmarks.pages`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models import NAMES, tiny
from torch_simu import attribute_neurons
from torch_simu.layers import down_projections, probed_projections
from torch_simu.layers.projections import _FAMILIES, _planned

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_PARAMETERS = 5_000_000

# Arguments of a configuration that make a model small, where it has them.
_SMALL = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    **{
        "n_positions": 64,
        "n_layers": 2,
        "n_heads": 4,
        "d_model": 32,
        "max_seq_len": 64,
        "ffn_dim": 80,
        "num_layers": 2,
    },
    **{"word_embed_proj_dim": 32, "num_heads": 4, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1},
    **{"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 4, "state_size": 4, "ffn_hidden_size": 80},
    **{f"{part}_layers": 2 for part in ("decoder", "encoder")},
    **{f"{part}_ffn_dim": 80 for part in ("decoder", "encoder")},
    **{f"{part}_attention_heads": 4 for part in ("decoder", "encoder")},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True},
}


class Measured(NamedTuple):
    """What came of a model: where the neurons are, by which source, and the exact method; or why not."""

    layers: str = ""
    source: str = ""
    method: str = ""
    refused: str = ""
    unmade: str = ""


def made(model_type: str) -> nn.Module:
    """A small model of a type, as its configuration allows."""
    if model_type in NAMES:
        return tiny(model_type)
    kind = transformers.CONFIG_MAPPING[model_type]
    known = {*kind().to_dict(), *getattr(kind, "attribute_map", {})}
    sizes = {name: value for name, value in _SMALL.items() if name in known}
    if "qk_rope_head_dim" in sizes:
        sizes.pop("head_dim", None)
    config = kind(**sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if sum(weight.numel() for weight in model.parameters()) > MOST_PARAMETERS:
        raise ValueError("its parts have configurations of their own")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def measured(model_type: str) -> Measured:
    """Find the neurons of a small model of that type, and attribute them."""
    tokens = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = made(model_type)
            model(input_ids=tokens)
        # A configuration may refuse these sizes in any way.
        except Exception as error:
            return Measured(unmade=type(error).__name__)
        try:
            found = down_projections(model)
        except ValueError as error:
            return Measured(refused=_clause(error))
        named = dict.fromkeys(re.sub(r"[.]\d+(?=[.])", ".*", name) for name in found)
        layers = ", ".join(f"`{name}`" for name in named)
        source = _source(model_type, model)
        try:
            scores = attribute_neurons(model, [batch], steps=2, max_completeness_error=None)
        except (ValueError, RuntimeError, IndexError) as error:
            return Measured(layers, source, refused=_clause(error))
    return Measured(layers, source, str(scores.provenance["method"]))


def _source(model_type: str, model: nn.Module) -> str:
    """What answers where the neurons of a model are."""
    if model_type in _FAMILIES:
        return "table"
    planned = bool(_planned(model))
    try:
        run = bool(probed_projections(model)[0])
    # Models fail in many ways on a call that they do not foresee.
    except Exception:
        run = False
    return " and ".join(name for name, there in (("plan", planned), ("run", run)) if there)


def _clause(error: Exception) -> str:
    """What an error says of the kind of model, without the names in it."""
    text = " ".join(str(error).split())
    for known, told in (
        ("differ on", "the plan and a run differ"),
        ("are not known", "no layer is found"),
        ("encoder and a decoder", "it has an encoder and a decoder"),
        ("by name, expected arguments by position", "experts are called with arguments by name"),
        ("in one pass has input shape", "a layer gets another shape than rows x tokens"),
    ):
        if known in text:
            return told
    return type(error).__name__


HEAD = """\
# Supported models

Every model type that transformers {version} names as a causal language model, made small (two blocks, width 32, random
weights), on a CPU: where the neurons are found without a pattern, by which source, and by which method
`attribute_neurons` is exact. `python -m benchmarks.pages` writes this page anew, and a test measures rows of it.

Sources: the **table** of known models, the tensor-parallel **plan** of transformers, a **run** on a few tokens; where
two answer, they must agree ([layers](../api/layers.md)). Any other model, and any that is refused, takes a pattern for
the names of its layers: `down_projections(model, r"mlp\\.fc2")`, `--layers` on the command line. What
`attention="full"` trains is on the page of [layers](../api/layers.md#what-attentionfull-trains).

Versions: Python 3.11 or later, torch 2.8 or later, transformers 5.0 or later. Tested are those in `constraints.txt`, by
`make test`, and the lowest ones, in `floors.txt`, by `make floors`.
"""


def page(rows: Iterable[tuple[str, Measured]]) -> Iterator[str]:
    """The lines of the page of supported models."""
    rows = dict(rows)
    yield from HEAD.format(version=transformers.__version__).splitlines()
    good = {name: row for name, row in rows.items() if row.method}
    yield from ("", f"## Found and exact: {len(good)}", "")
    yield from ("| model type | layers with neurons | known by | exact by |", "|---|---|---|---|")
    yield from (f"| {name} | {row.layers} | {row.source} | {row.method} |" for name, row in good.items())
    bad = {name: row for name, row in rows.items() if name not in good and not row.unmade}
    yield from ("", f"## Refused, or to be named by a pattern: {len(bad)}", "", "| model type | why |", "|---|---|")
    yield from (f"| {name} | {row.refused} |" for name, row in bad.items())
    left = [name for name, row in rows.items() if row.unmade]
    yield from ("", f"## Not measured: {len(left)}", "")
    yield "No small model could be made by these sizes, mostly because its parts have configurations of their own:"
    yield ", ".join(left) + "."
