r"""Membership: whether the rows that a model learned can be told from rows that it never saw.

Five attacks give each row a value that is larger for what was learned. With $\ell$ the mean negative log-likelihood of
the scored tokens:

- `loss`: $-\ell$ (Yeom et al. 2018, arXiv 1709.01604);
- `zlib`: $-\ell$ over the bytes of the answer after compression (Carlini et al. 2021, arXiv 2012.07805);
- `min_k`: the mean log-probability of the 20 % least probable tokens (Shi et al. 2023, arXiv 2310.16789);
- `min_k_plus_plus`: the same of log-probabilities that are standardized over the vocabulary (Zhang et al. 2024,
  arXiv 2404.02936);
- `reference`: $\ell$ of a model that never saw the rows, less $\ell$.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_simu._checks import check_number, problem
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics.scoring import (
    TokenScores,
    mean_nll,
    mean_of_least,
    min_k_log_probability,
    score_answers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAST = 0.2


def membership_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Return how often a row of one set has a larger value than a row of another, ties as half: the area under the ROC.

    With the probability of the answer as value this is the loss attack: 1 where every learned row is told from every
    other one, 0.5 where it is guessing, and below that where forgotten rows stand out the other way.

    Args:
        members: Of rows that the model learned, or has forgotten.
        others: Of rows of the same kind that it never saw.

    Raises:
        ValueError: If one of them is empty.

    Examples:
        >>> membership_auc([0.9, 0.8], [0.8, 0.1])
        0.875
    """
    if not members or not others:
        wrong = f"There are {len(members)} members and {len(others)} others"
        raise ValueError(problem(wrong, "at least one of each"))
    ordered = sorted(others)
    above = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in members)
    return above / (2 * len(members) * len(others))


def membership_score(auc: float) -> float:
    """Return how little a membership attack tells, from 0 to 1: LUME's second part, 1 - |2 AUC - 1|.

    Examples:
        >>> membership_score(0.5), membership_score(1.0), membership_score(0.25)
        (1.0, 0.0, 0.5)
    """
    return 1.0 - abs(2.0 * check_number("auc", auc, high=1.0) - 1.0)


def min_k_plus_plus(tokens: TokenScores, share: float = _LEAST) -> Tensor:
    r"""Return the mean standardized log-probability of each row's labels where it is least. Shape: `(batch,)`.

    A label's $\log p$ less its mean over the vocabulary, over its standard deviation there, both weighted by $p$
    itself (Zhang et al. 2024, arXiv 2404.02936): a learned label stands above what else could be there.

    Args:
        tokens: Of a batch.
        share: Share of the labels that count, as in `min_k_log_probability`.

    Examples:
        >>> from torch_simu.unlearning.metrics.scoring import score_tokens
        >>> logits = torch.tensor([[[0.0, 1.0986], [0.0, 0.0]]])  # probabilities of 1/4 and 3/4
        >>> min_k_plus_plus(score_tokens(logits, torch.tensor([[-100, 1]])))
        tensor([0.5774])
    """
    log_probs = tokens.logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    # A token whose probability is zero has no share in either.
    logs = log_probs.masked_fill(probs == 0, 0.0)
    mean = (probs * logs).sum(dim=-1)
    deviation = (probs * (logs - mean[:, None]).square()).sum(dim=-1).sqrt()
    values = torch.zeros_like(tokens.nll)
    # A certain prediction has no deviation, and its label no surprise.
    values[tokens.scored] = (-tokens.nll[tokens.scored] - mean) / deviation.clamp(min=torch.finfo(mean.dtype).eps)
    return mean_of_least(values, tokens.scored, share)


def _min_k(tokens: TokenScores) -> Tensor:
    return min_k_log_probability(tokens, _LEAST)


_MEASURES: Mapping[str, Callable[[TokenScores], Tensor]] = MappingProxyType(
    {"nll": mean_nll, "min_k": _min_k, "min_k_plus_plus": min_k_plus_plus}
)


def membership_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 32,
) -> dict[str, list[float]]:
    """Return what each attack gives each row, larger for what was learned.

    Args:
        model: A causal language model; its training flags are restored.
        tokenizer: The model's.
        examples: Encoded rows, as `torch_simu.unlearning.data.examples.encode` makes them.
        reference: A model that never saw the rows, with the same tokens; None: there is no attack of that name.
        batch_size: Rows per forward pass.

    Raises:
        ValueError: If there is no example, or one has no scored position.
        DataError: If an example does not fit into a model.
    """
    pad = pad_id(tokenizer, model)
    found = score_answers(model, examples, batch_size=batch_size, pad_id=pad, measures=_MEASURES)
    losses = found.pop("nll")
    answers = (tokenizer.decode([each for each in row.labels if each != IGNORED]) for row in examples)
    sizes = [len(zlib.compress(str(text).encode())) for text in answers]
    values = {
        "loss": [-loss for loss in losses],
        "zlib": [-loss / size for loss, size in zip(losses, sizes, strict=True)],
        **found,
    }
    if reference is not None:
        others = score_answers(reference, examples, batch_size=batch_size, pad_id=pad, measures={"nll": mean_nll})[
            "nll"
        ]
        values["reference"] = [other - loss for other, loss in zip(others, losses, strict=True)]
    return values


def membership_attacks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    members: Sequence[Example],
    others: Sequence[Example],
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Return the area under the ROC of each attack; see `membership_auc` and `membership_values`.

    Args:
        model: As `membership_values`.
        tokenizer: The model's.
        members: Of rows that the model learned, or has forgotten.
        others: Of rows of the same kind that it never saw.
        reference: As `membership_values`.
        batch_size: Rows per forward pass.

    Raises:
        ValueError: If one of the two is empty, or as `membership_values`.
        DataError: As `membership_values`.
    """
    known, unseen = (
        membership_values(model, tokenizer, rows, reference=reference, batch_size=batch_size)
        for rows in (members, others)
    )
    return {name: membership_auc(values, unseen[name]) for name, values in known.items()}
