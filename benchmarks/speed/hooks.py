"""Time and memory that hooks add to a forward and a backward of a small Llama, beside other ways to capture.

Each variant gives activation times gradient of every MLP neuron, summed over positions. Hooks ride on a backward that
is run anyway; captum runs a forward and a backward of its own, to the layers only and not to the weights.
Each pass, registration and removal included, is divided by its neighbor: a pass without hooks before or behind it, as
drawn. Passes without hooks have such neighbors too, which shows the noise. Processor time is kept beside the time on
the clock, because it does not count what other programs take.
All is timed twice, each in a process of its own: with the allocator as it is, which gives pages back to the system and
takes them again, and told to keep them. What the second does not show is the price of those pages.
Memory is counted in a pass of its own by a dispatch mode, which follows every storage from the operation that makes it
to its end: what autograd saves, what a hook keeps and what lives for a moment, but not the scratch space inside one
operation.
Usage: python -m benchmarks.speed.hooks [--repeats 40] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import RESULTS, command, environment, write_result
from benchmarks.speed.live_bytes import LiveBytes
from torch_simu import register_neuron_hooks
from torch_simu.layers import down_projections

ALLOCATORS = {
    "default": {},
    "keeps pages": {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)},
}
Scores = dict[str, Tensor]
Pass = Callable[[Callable[[], None]], Scores]
"""A forward and a backward, given what is called between them."""


class Task:
    """A model and one batch."""

    def __init__(self, options: argparse.Namespace, frozen: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=options.vocab,
                hidden_size=options.d_model,
                intermediate_size=options.d_ff,
                num_hidden_layers=options.layers,
                num_attention_heads=8,
                use_cache=False,
            )
            self.model = LlamaForCausalLM(config).requires_grad_(not frozen)
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, options.vocab, (options.batch, options.num_tokens), generator=draw)
        # Always trained, or a frozen model without hooks would have no graph to go back through.
        self.model.get_input_embeddings().requires_grad_(True)
        self.layers = down_projections(self.model)

    def loss(self, ids: Tensor | None = None) -> Tensor:
        """The mean next-token loss."""
        ids = self.ids if ids is None else ids
        return self.model(input_ids=ids, labels=ids).loss

    def run(self, hooks: Callable[[], AbstractContextManager[Scores | None]], held: Callable[[], None]) -> Scores:
        """One forward and one backward; `held` is called between them."""
        with hooks() as scores:
            loss = self.loss()
            held()
            loss.backward()
        self.model.zero_grad()
        return {name: scores[name] for name in self.layers} if scores is not None else {}


@contextmanager
def tensor_hooks(layers: dict[str, nn.Module]) -> Iterator[Scores]:
    """The usual recipe: keep the input in a forward pre-hook, meet its gradient in a hook on the tensor."""
    scores: Scores = {}

    def keep(name: str):
        def pre_hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            (activation,) = args

            def backward(gradient: Tensor) -> None:
                value = (activation.detach() * gradient).flatten(0, -2).sum(0)
                scores[name] = scores.get(name, 0) + value

            activation.register_hook(backward)

        return pre_hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    yield scores
    for handle in handles:
        handle.remove()


@contextmanager
def full_backward_hooks(layers: dict[str, nn.Module]) -> Iterator[Scores]:
    """Keep the input in a forward hook, meet its gradient in a full backward hook."""
    scores: Scores = {}
    inputs: Scores = {}
    handles = []
    for name, layer in layers.items():

        def forward(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            inputs[name] = args[0].detach()

        def backward(layer: nn.Module, gradients: tuple[Tensor], _: object, name: str = name) -> None:
            value = (inputs.pop(name) * gradients[0]).flatten(0, -2).sum(0)
            scores[name] = scores.get(name, 0) + value

        handles += [layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)]
    yield scores
    for handle in handles:
        handle.remove()


def captum_scores(task: Task) -> Scores:
    """A forward and a backward of captum, to the inputs of all layers."""
    attribution = LayerGradientXActivation(lambda ids: task.loss(ids)[None], list(task.layers.values()))
    found = attribution.attribute(task.ids, attribute_to_layer_input=True)
    return {name: values.detach().flatten(0, -2).sum(0) for name, values in zip(task.layers, found, strict=True)}


def variants(task: Task) -> dict[str, Pass]:
    """Name -> one pass."""
    return {
        "no hooks": lambda held: task.run(nullcontext, held),
        "register_neuron_hooks": lambda held: task.run(lambda: register_neuron_hooks(task.model), held),
        "tensor hooks": lambda held: task.run(lambda: tensor_hooks(task.layers), held),
        "full backward hooks": lambda held: task.run(lambda: full_backward_hooks(task.layers), held),
        "captum (its own pass)": lambda held: captum_scores(task),
    }


def assert_same_scores(task: Task) -> None:
    """Every variant captures the same, or the times compare different things."""
    found = {name: one(lambda: None) for name, one in variants(task).items() if name != "no hooks"}
    expected = found.pop("register_neuron_hooks")
    for scores in found.values():
        for layer, values in expected.items():
            torch.testing.assert_close(scores[layer], values, rtol=1e-3, atol=1e-6)


def timed(one: Pass) -> tuple[float, float]:
    """Milliseconds of one pass, on the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    one(lambda: None)
    return 1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processor)


def pairs(task: Task, repeats: int) -> dict[str, list[tuple[float, float, float, float]]]:
    """Name -> clock and processor milliseconds of a pass and of its neighbor without hooks, after two that warm up."""
    passes, draw = variants(task), random.Random(0)
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in passes}
    order = list(passes)
    for repeat in range(repeats + 2):
        draw.shuffle(order)
        for name in order:
            couple = [passes[name], passes["no hooks"]]
            behind = draw.random() < 0.5
            times = [timed(one) for one in (reversed(couple) if behind else couple)]
            if repeat >= 2:
                mine, bare = reversed(times) if behind else times
                found[name].append(tuple(round(value, 3) for value in (*mine, *bare)))
    return found


def quartiles(ratios: list[float]) -> dict[str, float]:
    """The median and the quarters around it."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"low": round(low, 4), "median": round(median, 4), "high": round(high, 4)}


def live_bytes(one: Pass) -> tuple[int | None, int]:
    """Bytes alive between forward and backward, where a pass lets one in, and at the peak of the whole pass."""
    seen = []
    with LiveBytes() as live:
        one(lambda: seen.append(live.now))
    return (seen[0] if seen else None), live.peak


def measured(options: argparse.Namespace, allocator: str, parameters: str) -> list[dict[str, object]]:
    """A row for each variant, in this process."""
    torch.set_num_threads(options.threads)
    task = Task(options, frozen=parameters == "frozen")
    assert_same_scores(task)
    times = pairs(task, options.repeats)
    rows = []
    for name, one in variants(task).items():
        held, peak = live_bytes(one)
        row = {
            "allocator": allocator,
            "parameters": parameters,
            "variant": name,
            "median_ms": statistics.median(mine for mine, *_ in times[name]),
            "ratio": quartiles([mine / bare for mine, _, bare, _ in times[name]]),
            "processor_ratio": quartiles([mine / bare for _, mine, _, bare in times[name]]),
            "held_bytes": held,
            "peak_bytes": peak,
        }
        sys.stderr.write(f"{row}\n")
        rows.append({**row, "milliseconds": times[name]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ff", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "hooks_cpu_202611.json")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        sys.stdout.write(json.dumps(measured(options, *options.alone)))
        return
    rows = []
    for allocator, settings in ALLOCATORS.items():
        for parameters in ("trained", "frozen"):
            call = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--alone", allocator, parameters]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **settings})
            rows += json.loads(done.stdout)
    torch.set_num_threads(options.threads)
    write_result(
        options.out,
        force=options.force,
        claim="hooks",
        command=command(),
        environment=environment(),
        seeds=[0],
        rows=rows,
    )


if __name__ == "__main__":
    main()
