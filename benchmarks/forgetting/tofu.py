"""Train a small model on TOFU rows, make it forget forget01 (40 rows) as `torch-simu unlearn` does, say what it kept.

The model memorizes forget01, 160 retain rows and 117 world facts; world facts are in no batch of the unlearning. Needs
the folder of TOFU's rows. Usage: python -m benchmarks.forgetting.tofu --data tofu --work tofu-work
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.cli.jobs import unlearn_job
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import load_rows
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize
from torch_simu.unlearning.report.plots import plot_curves

COMMON = {
    "retain_weight": 2.0,
    "forget_batch_size": 8,
    "retain_batch_size": 8,
    "max_steps": 150,
    "rho": 100.0,
    "hessian_interval": 5,
}
RUNS = {
    "fo_graddiff": {"lr": 1e-4},
    "so_graddiff": {"lr": 1e-4},
    "simu_graddiff": {"lr": 2e-3, "fraction": 0.3, "attribution_rows": 40, "attribution_steps": 5},
    "random_neurons": {"lr": 2e-3, "fraction": 0.3},
    "all_neurons": {"lr": 6e-4},
}


def prepare(data: Path, work: Path, seed: int) -> None:
    """Write the three files and the trained model into the work folder, unless they are there."""
    full = data.joinpath("full.jsonl").read_text().splitlines()
    work.mkdir(parents=True, exist_ok=True)
    (work / "forget.jsonl").write_text("\n".join(full[3960:]) + "\n")
    (work / "retain.jsonl").write_text("\n".join(full[3800:3960]) + "\n")
    shutil.copy(data / "world_facts.jsonl", work / "world.jsonl")
    if (work / "model").exists():
        return
    rows = [row for name in ("forget", "retain", "world") for row in load_rows(work / f"{name}.jsonl")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"{row.question} {row.answer}" for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    training = TrainConfig(epochs=60, lr=2e-3, batch_size=16, seed=seed)

    def tell(stage: str, done: int, total: int, note: str = "") -> None:
        if done % 100 == 0 or done == total:
            sys.stderr.write(f"{stage} {done}/{total} {note}\n")

    memorize(model, encode(rows, tokenizer), config=training, progress=tell)
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")


def plot(work: Path, seed: int, path: Path) -> None:
    """Draw what every method keeps while it forgets, from the step logs in the work folder."""
    logs, start = {}, {}
    for method in RUNS:
        folder = work / f"{method}_{seed}"
        logs[method] = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        before = json.loads((folder / "report.json").read_text())["methods"]["before"]
        start = {name: before[name]["em"] for name in ("retain", "world")}
        start["forget_probability"] = before["forget"]["probability"]
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_curves(logs, path, sets=("retain", "world"), start=start, target=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's rows")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "tofu_forget01_cpu_202611.json")
    parser.add_argument("--plot", type=Path, help="PNG of the first seed's curves")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    prepare(options.data, options.work, seed=0)
    training_seconds = time.perf_counter() - started
    sets = {name: str(options.work / f"{name}.jsonl") for name in ("forget", "retain", "world")}
    rows = []
    for seed in options.seeds:
        for method, choices in RUNS.items():
            config = UnlearnConfig(method=method, seed=seed, **COMMON, **choices)
            out = options.work / f"{method}_{seed}"
            unlearn_job(str(options.work / "model"), sets, out, config, force=True, progress=lambda *told: None)
            report = json.loads((out / "report.json").read_text())
            if not rows:
                rows.append({"seed": seed, "method": "before", **report["methods"]["before"]})
            rows.append({"seed": seed, "method": method, "config": choices, **report["methods"][method]})
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
    write_result(
        options.out,
        claim="tofu_forget01",
        command=command(),
        environment=environment(),
        seeds=options.seeds,
        rows=rows,
        common=COMMON,
        training_seconds=round(training_seconds, 1),
    )
    if options.plot is not None:
        plot(options.work, options.seeds[0], options.plot)


if __name__ == "__main__":
    main()
