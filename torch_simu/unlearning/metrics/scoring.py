r"""Scoring: how surely a model says an answer, token by token, given the right tokens before (teacher forcing).

With $p_t$ the probability of the answer's token $t$ of $T$, and a position *right* when its token is the most probable:

- probability $\exp(\frac1T \sum_t \log p_t)$, the geometric mean of the $p_t$;
- exact memorization EM, the share of right positions;
- extraction strength ES $= 1 - k/T$, with $k$ the length of the shortest prefix of the answer after which all positions
  are right. So ES is the share of the longest right ending: 1 when all is right, 0 when the last position is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torch_simu._checks import check_number, problem
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.data.batches import batches_of_similar_length
from torch_simu.unlearning.data.examples import Example, collate
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What each position of a batch says of the label after it.

    Args:
        nll: Negative log-likelihood of the label in nats, fp32; 0 where not scored. Shape: `(batch, length - 1)`.
        right: Whether the label is the most probable token; False where not scored. Shape: as `nll`.
        scored: Whether there is a label. Shape: as `nll`.
        logits: Those of the scored positions alone, row by row, fp32. Shape: `(num_scored, vocabulary)`.
    """

    nll: Tensor
    right: Tensor
    scored: Tensor
    logits: Tensor


def score_tokens(logits: Tensor, labels: Tensor) -> TokenScores:
    """Score each label from the logits of the position before it.

    Args:
        logits: Shape: `(batch, length, vocabulary)`.
        labels: Token ids, -100 where not scored. The first position has no logits before it. Shape: `(batch, length)`.

    Raises:
        ValueError: If the shapes do not fit, or a row has no scored position.

    Examples:
        >>> tokens = score_tokens(torch.zeros(1, 3, 4), torch.tensor([[-100, 0, 3]]))
        >>> tokens.right
        tensor([[ True, False]])
        >>> tokens.nll.exp()
        tensor([[4., 4.]])
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        wrong = f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(problem(wrong, "(batch, length, vocabulary) and (batch, length)"))
    return _scored(logits[:, :-1], labels[:, 1:])


def _scored(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score labels from logits that stand at the same places."""
    scored = targets != IGNORED
    if not bool(scored.any(dim=1).all()):
        empty = (~scored.any(dim=1)).nonzero()[:, 0].tolist()
        raise ValueError(problem(f"Rows {empty} of the batch have no scored label", "a label other than -100 in each"))
    # Only the scored positions are raised to fp32: all of them would be the largest tensor of the evaluation.
    chosen = logits[scored].float()
    nll = torch.zeros(targets.shape, device=logits.device)
    nll[scored] = cross_entropy(chosen, targets[scored], reduction="none")
    right = torch.zeros_like(scored)
    right[scored] = chosen.argmax(dim=-1) == targets[scored]
    return TokenScores(nll, right, scored, chosen)


def mean_nll(tokens: TokenScores) -> Tensor:
    """Return the mean negative log-likelihood of each row's scored positions, in nats. Shape: `(batch,)`.

    Examples:
        >>> mean_nll(score_tokens(torch.zeros(1, 3, 4), torch.tensor([[-100, 0, 3]]))).exp()
        tensor([4.])
    """
    return tokens.nll.sum(dim=1) / tokens.scored.sum(dim=1)


def probability(tokens: TokenScores) -> Tensor:
    """Return the probability of each row's answer per token, `exp(-mean_nll)`, in [0, 1]. Shape: `(batch,)`.

    Examples:
        >>> probability(score_tokens(torch.zeros(1, 3, 4), torch.tensor([[-100, 0, 3]])))
        tensor([0.2500])
    """
    return (-mean_nll(tokens)).exp()


def exact_memorization(tokens: TokenScores) -> Tensor:
    """Return the share of each row's scored positions that are right, in [0, 1]. Shape: `(batch,)`.

    Examples:
        >>> exact_memorization(score_tokens(torch.zeros(1, 3, 4), torch.tensor([[-100, 0, 3]])))
        tensor([0.5000])
    """
    return tokens.right.sum(dim=1) / tokens.scored.sum(dim=1)


def extraction_strength(tokens: TokenScores) -> Tensor:
    """Return the share of each row's answer that is right to its end, in [0, 1]. Shape: `(batch,)`.

    This is 1 - k/T with k from 0 to T: a wrong last position gives 0, where the code of open-unlearning, which stops at
    k = T - 1, gives 1/T.

    Examples:
        >>> labels = torch.tensor([[-100, 0, 3, 0], [-100, 0, 0, 3]])
        >>> extraction_strength(score_tokens(torch.zeros(2, 4, 4), labels))
        tensor([0.3333, 0.0000])
    """
    wrong = tokens.scored & ~tokens.right
    wrong_from_here = wrong.flip(1).cumsum(dim=1).flip(1)
    return (tokens.scored & (wrong_from_here == 0)).sum(dim=1) / tokens.scored.sum(dim=1)


def min_k_log_probability(tokens: TokenScores, share: float = 0.4) -> Tensor:
    """Return the mean log-probability of each row's least probable scored labels. Shape: `(batch,)`.

    Min-K% (Shi et al. 2023, arXiv 2310.16789): a row that was learned has no label that surprises. Of n scored labels
    the least probable `share * n` count, rounded down, but at least one.

    Args:
        tokens: Of a batch.
        share: Share of the labels that count; 0.4 in MUSE.

    Examples:
        >>> logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]]])
        >>> min_k_log_probability(score_tokens(logits, torch.tensor([[-100, 0, 0]]))).exp()
        tensor([0.5000])
    """
    return mean_of_least(-tokens.nll, tokens.scored, share)


def mean_of_least(values: Tensor, scored: Tensor, share: float) -> Tensor:
    """Return the mean of the least values of each row, of its scored positions. Shape: `(batch,)`.

    Args:
        values: Shape: `(batch, length)`.
        scored: Which of them are there, some in each row. Shape: as `values`.
        share: Of n values the least `share * n` count, rounded down, but at least one.

    Examples:
        >>> mean_of_least(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, False, True]]), 0.5)
        tensor([2.])
    """
    check_number("share", share, high=1.0, low_open=True)
    counts = (share * scored.sum(dim=1)).long().clamp(min=1)
    ordered = values.masked_fill(~scored, torch.inf).sort(dim=1).values
    chosen = torch.arange(ordered.shape[1], device=ordered.device) < counts[:, None]
    return ordered.masked_fill(~chosen, 0.0).sum(dim=1) / counts


MEASURES: Mapping[str, Callable[[TokenScores], Tensor]] = MappingProxyType(
    {"nll": mean_nll, "probability": probability, "em": exact_memorization, "es": extraction_strength}
)
"""Measure -> its value for each row of a batch."""


def score_answers(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    measures: Mapping[str, Callable[[TokenScores], Tensor]] = MEASURES,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Score the answer of each example on the model's device, in eval mode and without gradients.

    Args:
        model: A causal language model; its training flags are restored.
        examples: Encoded rows, as `torch_simu.unlearning.data.examples.encode` makes them.
        batch_size: Examples per forward pass.
        pad_id: The token id to pad with.
        measures: Name -> what is measured of each row.
        progress: Told of the stage "score" after each batch, in rows.

    Returns:
        Each measure with one value per example, in order: "nll" (mean per token, in nats), "probability", "em" and
        "es" unless others are asked for.

    Raises:
        ValueError: If there is no example, or one has no scored position.
        DataError: If an example does not fit into the model.
    """
    if not examples:
        raise ValueError(problem("There is no example to score", "at least one"))
    check_fits(model, examples)
    values = {name: [0.0] * len(examples) for name in measures}
    device = next(model.parameters()).device
    done = 0
    with evaluating(model):
        for indices in batches_of_similar_length([len(example.input_ids) for example in examples], batch_size):
            batch = {name: part.to(device) for name, part in collate([examples[i] for i in indices], pad_id).items()}
            labels = batch.pop("labels")
            tokens = _answered(model, batch, labels)
            for name, measure in measures.items():
                for index, value in zip(indices, measure(tokens).tolist(), strict=True):
                    values[name][index] = value
            done += len(indices)
            if progress is not None:
                progress("score", done, len(examples))
    return values


def _answered(model: PreTrainedModel, batch: dict[str, Tensor], labels: Tensor) -> TokenScores:
    """Score the labels of a batch.

    Where a model lets one choose, logits are made only where some row of the batch has a label behind: those of all
    positions would be the largest tensor by far, and take a fifth of the time where the vocabulary is large.
    """
    places = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    # A wrapper takes anything and says nothing of what it passes on.
    known = {"logits_to_keep": places} if "logits_to_keep" in signature(model.forward).parameters else {}
    # Without a cache, which would only hold memory here.
    logits = model(**batch, use_cache=False, **known).logits
    return _scored(logits, labels[:, 1 + places]) if known else score_tokens(logits, labels)


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every submodule in training or eval mode, and restore each one's flag afterwards.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
        >>> with mode(model, training=False):
        ...     model[0].training
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode without gradients, and restore each one's training flag afterwards.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> with evaluating(model):
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> model.training
        True
    """
    with mode(model, training=False), torch.no_grad():
        yield
