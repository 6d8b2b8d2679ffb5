"""Time the methods of attribution on one sequence, and compare their scores with those of one pass per prefix.

Run from the repository: `python benchmarks/attribution.py [--force] [--repeats 5] [--threads 1]`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from scipy.stats import spearmanr
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from torch_simu.attribution import Attribution, attribute_neurons
from torch_simu.attribution.attribute import MethodName

RESULT = Path(__file__).parent / "results" / "attribution_cpu_202611.json"
CLAIM = "Packed attribution equals one pass per prefix and is at least 10 times faster."
METHODS: tuple[MethodName, ...] = ("packed", "auto", "prefix", "layerwise", "joint")
LENGTH, VOCABULARY, STEPS = 48, 1000, 10


def model_of(seed: int) -> LlamaForCausalLM:
    """A Llama of 4 layers, width 192 and 768 neurons per layer, with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
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


def agreement(found: Attribution, expected: Attribution) -> dict[str, float]:
    """The worst relative error over layers, and the worst rank correlation."""
    errors, ranks = [], []
    for layer, scores in expected.scores.items():
        errors.append(((found.scores[layer] - scores).norm() / scores.norm()).item())
        ranks.append(float(spearmanr(found.scores[layer], scores).statistic))
    return {"relative_error": max(errors), "spearman": min(ranks)}


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def rows_of(seed: int, repeats: int) -> list[dict[str, Any]]:
    """One row per method, share of scored positions and repeat; the methods take turns, so that all share any noise."""
    model = model_of(seed)
    rows: list[dict[str, Any]] = []
    for share in (1.0, 0.25):
        batch = batch_of(seed, share)
        expected = attribute_neurons(model, [batch], steps=STEPS, method="prefix")
        for repeat in range(repeats):
            for method in METHODS:
                start = time.perf_counter()
                found = attribute_neurons(model, [batch], steps=STEPS, method=method)
                seconds = time.perf_counter() - start
                row = {"method": method, "scored_share": share, "repeat": repeat, "seconds": seconds}
                rows.append({**row, "num_samples": found.num_samples, **agreement(found, expected)})
    return rows


def main() -> None:
    """Run the benchmark once and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if RESULT.exists() and not options.force:
        parser.error(f"{RESULT.name} exists; give --force to replace it")
    torch.set_num_threads(options.threads)
    rows = rows_of(options.seed, options.repeats)
    result = {
        "claim": CLAIM,
        "command": " ".join(["python", "benchmarks/attribution.py", *sys.argv[1:]]),
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
        },
        "seeds": [options.seed],
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for share in (1.0, 0.25):
        seconds = {
            method: min(row["seconds"] for row in rows if (row["method"], row["scored_share"]) == (method, share))
            for method in METHODS
        }
        listed = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        print(f"{share:.0%} scored: {listed}; packed is {seconds['prefix'] / seconds['packed']:.1f} times faster")


if __name__ == "__main__":
    main()
