"""RepSelect: steps along one gradient of the forget set whose leading components are collapsed, without retain rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.contenders import linear_layers
from torch_simu.layers import down_projections, neuron_weight
from torch_simu.unlearning.attack.low_rank import low_rank
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.objectives import mean_answer_nll

SHARE = 1 / 8
"""Of a side's directions those are components that are collapsed: 512 of 4096 in the source."""
LESSON, RANK = 0.01, 8
"""Step size and rank of the LoRA matrices that relearn the forget set first."""


def collapsed(gradient: Tensor, rank: int) -> Tensor:
    r"""A gradient whose leading components are brought to the size of the smallest of them, on both of its sides.

    RepSelect (Sondej et al. 2026, arXiv 2606.17168), softly: with $G \approx U S V^T$ of that rank,
    $G \leftarrow G - G V (1 - s_\min / S) V^T$, and the same from the left with $U$.
    """
    left, sizes, right = torch.svd_lowrank(gradient, q=rank, niter=4)
    shares = 1 - sizes.min() / sizes
    gradient = gradient - (gradient @ right * shares) @ right.T
    return gradient - left @ (shares[:, None] * (left.T @ gradient))


def mlp_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of all linear layers of the MLPs: those beside a down projection."""
    parents = {name.rpartition(".")[0] for name in down_projections(model)}
    names = [name for name in linear_layers(model) if name.rpartition(".")[0] in parents]
    return [neuron_weight(model.get_submodule(name)) for name in names]


def collapsing(model: PreTrainedModel, case: Case, config: UnlearnConfig) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The weights that train, and the gradient of each, along which all steps go.

    Gradients are of the whole forget set, where LoRA matrices taught it once more, and together as long as the weights,
    so that a step size is a share of their norm.
    """
    weights = mlp_weights(model)
    batches = [
        {name: part.to(model.device) for name, part in batch.items()}
        for batch in batches_in_order(case.sets["forget"], case.batch_size)
    ]
    with low_rank(model, rank=RANK, seed=config.seed) as matrices:
        lesson = SGD(matrices, lr=LESSON)
        for batch in batches:
            mean_answer_nll(model, batch).backward()
            lesson.step()
            lesson.zero_grad()
        for param in model.parameters():
            param.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            (-mean_answer_nll(model, batch)).backward()
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            found = [collapsed(weight.grad, max(1, int(SHARE * min(weight.shape)))) for weight in weights]
    norms = [torch.stack([each.detach().norm() for each in tensors]).norm() for tensors in (weights, found)]
    return weights, [each * (norms[0] / norms[1]) for each in found]
