"""Does it stay forgotten? Round unlearned models to 8 and 4 bits, and let them relearn.

The demo's model forgets by first- and second-order GradDiff and by SIMU in float, and by SIMU on 8-bit and on NF4
codes, where the change stays in 32 bits beside the codes. Beside them the model before, and one that never saw the
forget set. Then each, as one float model, is rounded as a whole (8 bits per row, or NF4), or relearns with AdamW on all
weights: from a third of the forget people, whose rows are not measured, or from people that no model has seen.
Usage: python -m benchmarks.forgetting.robustness --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu.bitsandbytes.layers import eight_bit_codes, is_4bit
from torch_simu.bitsandbytes.packing import keep_codes_as_loaded
from torch_simu.deltas import attached_layers
from torch_simu.deltas.layer import DeltaLayer
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.demo.demo import DemoRecipe, Fiction, make_fiction, train_base
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import mean_answer_nll

RELEARN_STEPS = (5, 10, 20, 40)
RELEARN_LR = 2e-4
METHODS = {
    "fo_graddiff": ("fo_graddiff", None),
    "so_graddiff": ("so_graddiff", None),
    "simu_graddiff": ("simu_graddiff", None),
    "simu on 8-bit codes": ("simu_graddiff", "8bit"),
    "simu on NF4 codes": ("simu_graddiff", "4bit"),
}


def corpus_of(seed: int) -> tuple[Fiction, DemoRecipe]:
    """The demo's sets, and as many people as are forgotten that no model is shown: the set "unseen"."""
    recipe = DemoRecipe()
    more = dataclasses.replace(recipe, retain_per_forget=recipe.retain_per_forget + 1)
    fiction = make_fiction(more, seed)
    parts: dict[str, dict] = {"rows": dict(fiction.rows), "examples": dict(fiction.examples)}
    for part in parts.values():
        size = len(part["forget"])
        part["retain"], part["unseen"] = part["retain"][:-size], part["retain"][-size:]
    return Fiction(parts["rows"], parts["examples"], fiction.tokenizer), recipe


def quantized(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A copy whose linear layers, the head aside, hold codes."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        sizes = (layer.in_features, layer.out_features, False)
        if kind == "8bit":
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*sizes, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        model.set_submodule(name, new.to("cpu"))
    keep_codes_as_loaded(model)
    return model


def as_float(model: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    """The same model with float weights: codes decoded, deltas added."""
    found = copy.deepcopy(base)
    for name, layer in model.named_modules():
        weight = decoded(layer)
        if weight is not None:
            if isinstance(layer, DeltaLayer):
                weight[:, layer.idx] += layer.delta.detach()
            found.get_submodule(name).weight.data.copy_(weight)
        elif isinstance(layer, nn.Linear):
            found.get_submodule(name).weight.data.copy_(layer.weight.data)
    return found


def decoded(layer: nn.Module) -> Tensor | None:
    """The float weight of a layer with codes; None for others."""
    if is_4bit(layer):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if hasattr(layer, "SCB"):
        return layer.weight.float() * (layer.SCB / 127)[:, None]
    if type(layer).__name__ == "Linear8bitLt":
        codes, scales = eight_bit_codes(layer)
        return codes.float() * (scales / 127)[:, None]
    return None


def rounded(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """A copy with its weights as they are after 8 or 4 bits."""
    return as_float(quantized(model, kind), model)


def relearned(
    model: PreTrainedModel, examples: Sequence[Example], seed: int, pad: int
) -> Iterator[tuple[int, PreTrainedModel]]:
    """The model after some steps on examples, the same for every method."""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RELEARN_LR)
    batches = Batches(examples, min(24, len(examples)), seed, pad)
    for step in range(max(RELEARN_STEPS)):
        mean_answer_nll(model, batches.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in RELEARN_STEPS:
            yield step + 1, model


def rows_of(seed: int) -> Iterator[dict[str, object]]:
    """Measure each method of one seed under each attack."""
    fiction, recipe = corpus_of(seed)
    pad, sets = pad_id(fiction.tokenizer), fiction.examples
    # People have four rows each, one after the other.
    shown = [row for number, row in enumerate(sets["forget"]) if number // 4 % 3 == 0]
    hidden = [row for number, row in enumerate(sets["forget"]) if number // 4 % 3]

    def measured(model: PreTrainedModel) -> dict[str, dict[str, float]]:
        found = {}
        for name, rows in (("forget", hidden), ("retain", sets["retain"]), ("world", sets["world"])):
            scores = score_answers(model, rows, batch_size=128, pad_id=pad)
            found[name] = {key: mean(scores[key]) for key in ("es", "em", "probability")}
        return found

    def attacked(method: str, model: PreTrainedModel, **more: object) -> Iterator[dict[str, object]]:
        common = {"seed": seed, "method": method, **more}
        yield {**common, "attack": "none", **measured(model)}
        for kind in ("8bit", "4bit"):
            yield {**common, "attack": f"rounded to {kind}", **measured(rounded(model, kind))}
        for name, examples in (("a third of the forget people", shown), ("unseen people", sets["unseen"])):
            for step, changed in relearned(model, examples, seed, pad):
                yield {**common, "attack": f"relearned from {name}", "relearn_steps": step, **measured(changed)}

    base = train_base(fiction, recipe, seed, ("forget", "retain", "world"))
    yield from attacked("before", base)
    for label, (method, codes) in METHODS.items():
        model = copy.deepcopy(base) if codes is None else quantized(base, codes)
        config = recipe.unlearning.updated(method=method, seed=seed, **recipe.tuned[method])
        done = unlearn(model, sets["forget"], sets["retain"], config=config, pad_id=pad)
        assert codes is None or attached_layers(model)
        own = {"steps": done.steps, "reached": done.reached}
        yield from attacked(label, model if codes is None else as_float(model, base), **own)
    yield from attacked("retrained", train_base(fiction, recipe, seed, ("retain", "world")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "robustness_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: Callable[[dict], object] = lambda row: sys.stderr.write(  # noqa: E731
        f"{row['seed']} {row['method']} {row['attack']} {row.get('relearn_steps', '')} {row['forget']}\n"
    )
    rows = []
    for number, seed in enumerate(options.seeds):
        for row in rows_of(seed):
            report(row)
            rows.append(row)
        # After every seed, so that a run that is stopped leaves what it has.
        write_result(
            options.out,
            force=options.force or number > 0,
            claim="robustness",
            command=command(),
            environment=environment(),
            seeds=options.seeds[: number + 1],
            rows=rows,
        )


if __name__ == "__main__":
    main()
