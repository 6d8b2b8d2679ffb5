"""Balanced and whitened runs of a Trainer, and the naive loop that they must equal."""

from __future__ import annotations

import torch

from tests.reference import DenseWhitened
from tests.strategies import Options
from tests.unlearning.trainer.trainer_runs import (
    FORGET,
    RETAIN,
    SEED,
    STEPS,
    answer_logits_of,
    make_selection,
    make_trainer,
)
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.objectives import Probability

INTERVAL, RETAIN_WEIGHT = 2, 2.0
WHITENED = Options(lr=0.04, beta1=0.9, beta2=0.8, rho=1.0, weight_decay=0.1, clip=1.0, interval=INTERVAL)
OPTIONS = {"lr": WHITENED.lr, "betas": (WHITENED.beta1, WHITENED.beta2), "hessian_interval": INTERVAL}
TOLERANCE = 3e-8
"""Of steps near 1e-3, because hooks add up in float32."""


def make_whitened_trainer(model, folder, curvature, callbacks=(), options=None, **arguments):
    return make_trainer(
        model,
        folder,
        callbacks,
        objective=arguments.pop("objective", Probability(RETAIN_WEIGHT)),
        options={**OPTIONS, "curvature": curvature, **(options or {})},
        **{"balance": True, **arguments},
    )


def whitened_loop(model, curvature, steps=STEPS, rows="both"):
    """One row at a time, unpadded; inverses of dense covariances, and gradients balanced behind them."""
    selection = make_selection(model)
    layers = {name: model.get_submodule(name) for name in selection}
    columns = {name: selection[name].tolist() for name in selection}
    outputs = curvature == "both"
    oracles = {
        name: DenseWhitened(layer.weight.detach(), columns[name], WHITENED, outputs=outputs, damping=0.1)
        for name, layer in layers.items()
    }
    for step in range(steps):
        forget, seen = summed_gradients(model, layers, FORGET, step, 3 * SEED, token_probability)
        retain, beside = summed_gradients(model, layers, RETAIN, step, 3 * SEED + 1, token_nll)
        if rows == "both":
            seen = {name: [torch.cat(pair) for pair in zip(seen[name], beside[name], strict=True)] for name in seen}
        # How far the floor lifts a forget gradient beside a retain gradient that has faded.
        lift = max(1.0, 0.1 / torch.cat([retain[name][:, columns[name]].flatten() for name in layers]).norm().item())
        for name, oracle in oracles.items():
            if step % INTERVAL == 0:
                oracle.refresh(*seen[name])
            lengths = [oracle.whitened(each[name]).norm() for each in (forget, retain)]
            oracle.step(lift * lengths[1] / lengths[0] * forget[name] + RETAIN_WEIGHT * retain[name])
            layers[name].weight.data.copy_(oracle.weight)


def token_probability(logits, labels):
    return logits.softmax(-1)[range(len(labels)), labels]


def token_nll(logits, labels):
    return -logits.log_softmax(-1)[range(len(labels)), labels]


def summed_gradients(model, layers, examples, step, seed, loss_of):
    """The gradient of a mean over all tokens of a batch, and what each layer saw: inputs and gradients of outputs."""
    rows = [examples[i] for i in Batches(examples, 4, seed).indices(step)]
    num_tokens = sum(row.num_scored for row in rows)
    model.zero_grad()
    calls = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(
            lambda _, args, output, name=name: calls[name].append((args[0], output.retain_grad() or output))
        )
        for name, layer in layers.items()
    ]
    for row in rows:
        labels = torch.tensor(row.labels[-row.num_scored :])
        (loss_of(answer_logits_of(model, row), labels).sum() / num_tokens).backward()
    for handle in handles:
        handle.remove()
    seen = {
        name: (
            torch.cat([inputs.detach().flatten(0, 1) for inputs, _ in found]),
            torch.cat([output.grad.flatten(0, 1) for _, output in found]),
        )
        for name, found in calls.items()
    }
    return {name: layer.weight.grad.clone() for name, layer in layers.items()}, seen


def largest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


def num_hooks(model):
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.modules())
