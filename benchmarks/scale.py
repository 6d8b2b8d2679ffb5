"""What attribution, steps, deltas and files take at a size, by formulas that a test checks at small sizes.

Usage: python -m benchmarks.pages tables
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BF16, FP32, FP64, INT64 = 2, 4, 8, 8
FRACTION = 0.05
TOKENS = 4096
"""Tokens of a micro-batch in one process."""
PATH_POINTS = 10
FLOPS = 4e14
"""Operations in a second of one GPU: 40 % of the 989 TFLOP/s that an H100 makes at most in bfloat16."""


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with gated MLPs, dense or of experts that are fused into one parameter."""

    name: str
    d_model: int
    d_ff: int
    layers: int
    vocabulary: int
    d_keys: int
    """Width of all keys of a layer: heads of keys and values times their width."""
    experts: int = 1
    active: int = 1

    def block(self, experts: int) -> int:
        """Parameters of a block with so many experts: attention, MLPs, two norms and the router."""
        attention = 2 * self.d_model * (self.d_model + self.d_keys)
        router = self.d_model * self.experts if self.experts > 1 else 0
        return attention + 3 * experts * self.d_model * self.d_ff + 2 * self.d_model + router

    @property
    def parameters(self) -> int:
        """All parameters; embeddings and head are not tied."""
        return self.layers * self.block(self.experts) + (2 * self.vocabulary + 1) * self.d_model

    @property
    def used(self) -> int:
        """Parameters that multiply one token: those of the experts that it takes, and the head."""
        return self.layers * self.block(self.active) + self.vocabulary * self.d_model

    @property
    def down(self) -> int:
        """Parameters of all down projections."""
        return self.layers * self.experts * self.d_model * self.d_ff

    def chosen(self, fraction: float) -> int:
        """Neurons that are selected in one layer."""
        return round(fraction * self.experts * self.d_ff)

    def selected(self, fraction: float) -> int:
        """Entries of the selected columns."""
        return self.layers * self.chosen(fraction) * self.d_model


MODELS = (
    Model("7 B", 4096, 11008, 32, 32000, 4096),
    Model("70 B", 8192, 28672, 80, 128256, 1024),
    Model("400 B, 32 experts", 8192, 6144, 80, 128256, 1024, experts=32, active=2),
)
GPUS = (8, 64, 512)


def state(model: Model, fraction: float) -> int:
    """Bytes of optimizer state in all processes: two compact moments in float32."""
    return 2 * FP32 * model.selected(fraction)


def dense_gradient(model: Model) -> int:
    """Bytes of the gradients of all down projections in bfloat16, where columns of the weights themselves train."""
    return BF16 * model.down


def deltas(model: Model, fraction: float) -> int:
    """Bytes of deltas and of their gradients in float32: no gradient of a weight is made beside them."""
    return 2 * FP32 * model.selected(fraction)


def transient(model: Model, fraction: float) -> int:
    """Bytes that a step makes and frees: the selected columns of all layers in float32, five times with `foreach`."""
    return 5 * FP32 * model.selected(fraction)


def gathered(model: Model) -> int:
    """Bytes of whole weights in one process under FSDP2: of one block, and of the next that is on its way."""
    return 2 * BF16 * model.block(model.experts)


def activations(model: Model) -> int:
    """Bytes between forward and backward with checkpointing: the input of every block, and the logits in float32."""
    return TOKENS * (BF16 * model.layers * model.d_model + 2 * FP32 * model.vocabulary)


def sent(model: Model) -> int:
    """Bytes that a process receives in a forward and backward pass under FSDP2, beside gradients: all weights twice."""
    return 2 * BF16 * model.parameters


def scores(model: Model) -> int:
    """Bytes of the scores of all neurons, which one all-reduce adds up."""
    return FP64 * model.layers * model.experts * model.d_ff


def attribution_flops(model: Model, samples: int) -> float:
    """Operations of packed attribution: of each sample, layer and path point a pass from the layer up, and back.

    The end at zero is a point without a way back.
    """
    above = model.block(model.active) * (model.layers + 1) / 2 + model.vocabulary * model.d_model
    return 4.0 * samples * (PATH_POINTS + 0.5) * model.layers * above


def step_flops(model: Model, tokens: int) -> float:
    """Operations of a forward pass, the same again by checkpointing, and a backward pass to the activations."""
    return 6.0 * tokens * model.used


def patch(model: Model, fraction: float) -> int:
    """Bytes of a patch: the selected columns in bfloat16, and which they are."""
    return BF16 * model.selected(fraction) + INT64 * model.layers * model.chosen(fraction)


def in_each(model: Model, gpus: int, fraction: float, *, with_deltas: bool) -> dict[str, float]:
    """Bytes in one process of a model sharded over some: what is sharded is divided, the rest is not."""
    trained = deltas(model, fraction) if with_deltas else dense_gradient(model)
    return {
        "weights": BF16 * model.parameters / gpus,
        "gradients": trained / gpus,
        "state": state(model, fraction) / gpus,
        "step": transient(model, fraction) / gpus,
        "gathered": gathered(model),
        "activations": activations(model),
    }


def giga(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


def models() -> Iterator[str]:
    """What does not depend on the number of GPUs, at 5 % of the neurons; attribution of 1000 scored tokens."""
    heads = ("model", "parameters", "used by a token", "state", "deltas and gradients", "patch", "scores")
    yield f"| {' | '.join(heads)} | attribution of 1000 tokens |"
    yield "|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        beside = giga(deltas(model, FRACTION)) if model.experts == 1 else ""
        sizes = [giga(state(model, FRACTION)), beside, giga(patch(model, FRACTION))]
        count = f"{model.parameters / 1e9:.1f} B | {model.used / 1e9:.1f} B"
        hours = f"{attribution_flops(model, 1000) / FLOPS / 60:.1f} GPU minutes"
        yield f"| {model.name} | {count} | {' | '.join(sizes)} | {scores(model) / 1e6:.1f} MB | {hours} |"


def memory() -> Iterator[str]:
    """Bytes in each process under FSDP2 at 5 % of the neurons, on the weights themselves and on deltas."""
    yield "| model | GPUs | weights | gradients | state | step | gathered | activations | in all | in all, deltas |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for model in MODELS:
        for gpus in GPUS:
            found = in_each(model, gpus, FRACTION, with_deltas=False)
            beside = in_each(model, gpus, FRACTION, with_deltas=True)
            cells = [giga(each) for each in (*found.values(), sum(found.values()))]
            # Experts that are fused into one parameter take no deltas.
            cells.append(giga(sum(beside.values())) if model.experts == 1 else "")
            yield f"| {model.name} | {gpus} | {' | '.join(cells)} |"
