"""Time the methods of attribution on one sequence, and compare their scores with those of one pass per prefix.

Beside them captum's nearest method, integrated gradients of a layer's input (all positions at once, as "layerwise"),
and one-step gradient x activation by hooks. In the same run, what hooks add to a forward and backward pass of that
model.
Usage: python -m benchmarks.speed.attribution [--force] [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerIntegratedGradients
from scipy.stats import spearmanr
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import RESULTS, command, environment, write_result
from benchmarks.speed import hooks
from torch_simu import attribute_neurons, register_neuron_hooks
from torch_simu.attribution.attribute import MethodName
from torch_simu.layers import down_projections

METHODS: tuple[MethodName, ...] = ("packed", "auto", "decode", "prefix", "layerwise", "joint")
LENGTH, VOCABULARY, STEPS = 48, 1000, 10
LAYERS, D_MODEL, D_FF = 4, 192, 768


def model_of(seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def batch_of(seed: int, share: float) -> dict[str, Tensor]:
    """One sequence whose last positions are scored."""
    ids = torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : LENGTH - round(share * LENGTH)] = -100
    return {"input_ids": ids, "labels": labels}


def logprob(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """The log-likelihood of each row's scored labels."""
    found = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    scored = labels[:, 1:].clamp(min=0)
    kept = (labels[:, 1:] != -100).expand(len(ids), -1)
    return (found.gather(-1, scored.expand(len(ids), -1)[..., None])[..., 0] * kept).sum(-1)


def by_captum(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Integrated gradients of each layer's input from zero, at the same midpoints."""
    found = {}
    for name, layer in down_projections(model).items():
        method = LayerIntegratedGradients(lambda ids: logprob(model, ids, batch["labels"]), layer)
        values = method.attribute(
            batch["input_ids"], torch.zeros_like(batch["input_ids"]), n_steps=STEPS, method="riemann_middle",
            attribute_to_layer_input=True,
        )  # fmt: skip
        found[name] = values.detach()[0].double().sum(0)
    return found


def by_one_step(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient x activation at the clean activation, of all positions."""
    with register_neuron_hooks(model) as captured:
        logprob(model, batch["input_ids"], batch["labels"]).sum().backward()
    model.zero_grad()
    return {name: captured[name].double() for name in captured}


def agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The worst relative error over layers, and the worst rank correlation."""
    errors = [((found[layer] - scores).norm() / scores.norm()).item() for layer, scores in expected.items()]
    ranks = [float(spearmanr(found[layer], scores).statistic) for layer, scores in expected.items()]
    return {"relative_error": max(errors), "spearman": min(ranks)}


def rows_of(seed: int, repeats: int) -> list[dict[str, Any]]:
    """One row per method, share of scored positions and repeat; the methods take turns, so that all share any noise."""
    model = model_of(seed)
    rows: list[dict[str, Any]] = []
    ways = {
        name: lambda batch, name=name: dict(
            attribute_neurons(
                model, [batch], steps=STEPS, rule="midpoint", method=name, max_completeness_error=None
            ).scores
        )
        for name in METHODS
    }
    ways |= {
        "captum_integrated_gradients": lambda batch: by_captum(model, batch),
        "gradient_x_activation": lambda batch: by_one_step(model, batch),
    }
    for share in (1.0, 0.25):
        batch = batch_of(seed, share)
        expected = ways["prefix"](batch)
        for way in ways.values():
            way(batch)
        for repeat in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                found = way(batch)
                seconds = time.perf_counter() - start
                row = {"method": name, "scored_share": share, "repeat": repeat, "seconds": seconds}
                rows.append({**row, **agreement(found, expected)})
            sys.stderr.write(f"{share:.0%} scored, repeat {repeat + 1} of {repeats}\n")
    return rows


def hooks_of(repeats: int) -> list[dict[str, Any]]:
    """What hooks add to a pass of this model over 8 such sequences."""
    options = argparse.Namespace(
        layers=LAYERS,
        d_model=D_MODEL,
        d_ff=D_FF,
        vocab=VOCABULARY,
        batch=8,
        num_tokens=LENGTH,
        repeats=repeats,
        threads=torch.get_num_threads(),
    )
    return hooks.measured(options, "default", "trained")


def main() -> None:
    """Run the benchmark once and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "attribution_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = rows_of(options.seed, options.repeats)
    names = list(dict.fromkeys(row["method"] for row in rows))
    summary = []
    for share in (1.0, 0.25):
        best = {
            name: min(row["seconds"] for row in rows if (row["method"], row["scored_share"]) == (name, share))
            for name in names
        }
        summary.append(
            {
                "scored_share": share,
                "best_seconds": best,
                "prefix_over_packed": best["prefix"] / best["packed"],
                "packed_over_layerwise": best["packed"] / best["layerwise"],
            }
        )
        sys.stderr.write(f"{summary[-1]}\n")
    write_result(
        options.out,
        force=options.force,
        claim="attribution",
        command=command(),
        environment=environment(),
        seeds=[options.seed],
        rows=rows,
        summary=summary,
        hooks=hooks_of(20 * options.repeats),
    )


if __name__ == "__main__":
    main()
