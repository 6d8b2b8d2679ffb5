"""Membership: each attack gives a row what a loop made from its definition gives it, and tells what was learned."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.language import ROWS, memorizing_model, tiny_model, word_tokenizer
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics import membership
from torch_simu.unlearning.metrics.lume import final_score
from torch_simu.unlearning.metrics.membership import (
    membership_attacks,
    membership_score,
    membership_values,
    min_k_plus_plus,
)
from torch_simu.unlearning.metrics.scoring import mean_of_least, score_tokens

UNSEEN = [Row("Where does Bob live ?", "Bob lives in Rome ."), Row("What does Ada grow ?", "tall peas and beans")]


def tokens_of(seed: int):
    """Logits of three rows, and labels of which some are not scored."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 8, 5, generator=draw)
    labels = torch.randint(0, 5, (3, 8), generator=draw)
    labels[torch.rand(3, 8, generator=draw) < 0.4] = -100
    labels[:, 5] = 1
    return logits, labels


def standardized(logits: torch.Tensor, label: int) -> float:
    """A label's log-probability less the mean over the vocabulary, over the standard deviation there."""
    probs = logits.double().softmax(-1).tolist()
    center = sum(p * math.log(p) for p in probs)
    spread = math.sqrt(sum(p * (math.log(p) - center) ** 2 for p in probs))
    return (math.log(probs[label]) - center) / spread


def is_the_mean_of_the_least_standardized(measure, seed: int, share: float) -> None:
    """Min-K%++ of each row is that of a loop over its scored positions."""
    logits, labels = tokens_of(seed)
    for row, value in enumerate(measure(score_tokens(logits, labels), share).tolist()):
        places = [place for place in range(1, 8) if labels[row, place] != -100]
        values = sorted(standardized(logits[row, place - 1], int(labels[row, place])) for place in places)
        count = max(1, int(torch.tensor(len(values)) * share))
        assert value == pytest.approx(sum(values[:count]) / count, rel=1e-3, abs=1e-3)


@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_min_k_plus_plus_is_the_mean_of_the_least_standardized_labels(seed: int, share: float) -> None:
    is_the_mean_of_the_least_standardized(min_k_plus_plus, seed, share)


def plain(tokens, share):
    """Without the vocabulary's mean and deviation: Min-K%."""
    return membership.min_k_log_probability(tokens, share)


def unweighted(tokens, share):
    """Mean and deviation over the vocabulary without the probabilities as weights."""
    logs = tokens.logits.log_softmax(-1)
    values = torch.zeros_like(tokens.nll)
    values[tokens.scored] = (-tokens.nll[tokens.scored] - logs.mean(-1)) / logs.std(-1, correction=0)
    return mean_of_least(values, tokens.scored, share)


@pytest.mark.parametrize("mutant", [plain, unweighted])
def test_another_standardization_is_seen(mutant) -> None:
    with pytest.raises(AssertionError):
        is_the_mean_of_the_least_standardized(mutant, 0, 0.5)


@pytest.mark.parametrize("kind", ["certain", "uniform", "impossible"])
def test_predictions_without_a_deviation_give_finite_values(kind: str) -> None:
    logits = torch.zeros(1, 3, 4)
    if kind != "uniform":
        logits[..., 2] = 1e4
    label = 1 if kind == "impossible" else 2
    value = min_k_plus_plus(score_tokens(logits, torch.tensor([[-100, label, label]])))
    assert value.isfinite().all()
    assert (value < 0) == (kind == "impossible")


def test_values_are_those_of_their_definitions() -> None:
    tokenizer = word_tokenizer()
    model, reference = memorizing_model(tokenizer), tiny_model(tokenizer)
    examples = encode(ROWS, tokenizer)
    found = membership_values(model, tokenizer, examples, reference=reference, batch_size=4)
    for number, row in enumerate(examples):
        losses = []
        for each in (model, reference):
            logits = each(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            places = [place for place, label in enumerate(row.labels) if label != -100]
            losses.append(-sum(logits[place - 1, row.labels[place]].item() for place in places) / len(places))
        text = tokenizer.decode([label for label in row.labels if label != -100])
        assert found["loss"][number] == pytest.approx(-losses[0], abs=1e-4)
        assert found["zlib"][number] == pytest.approx(-losses[0] / len(zlib.compress(text.encode())), abs=1e-6)
        assert found["reference"][number] == pytest.approx(losses[1] - losses[0], abs=1e-4)


def test_every_attack_tells_what_was_learned_and_none_what_was_not() -> None:
    tokenizer = word_tokenizer()
    learned, ignorant = memorizing_model(tokenizer), tiny_model(tokenizer)
    members, others = encode(ROWS, tokenizer), encode(UNSEEN, tokenizer)
    found = membership_attacks(learned, tokenizer, members, others, reference=ignorant)
    assert set(found) == {"loss", "zlib", "min_k", "min_k_plus_plus", "reference"}
    assert all(auc > 0.8 for auc in found.values()), found
    assert set(membership_attacks(ignorant, tokenizer, members, members).values()) == {0.5}


def test_no_rows_are_refused() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="no example to score"):
        membership_attacks(tiny_model(tokenizer), tokenizer, [], encode(UNSEEN, tokenizer))


@pytest.mark.parametrize("auc", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_what_an_attack_does_not_tell_is_as_far_below_one_as_the_area_is_from_guessing(auc: float) -> None:
    assert membership_score(auc) == membership_score(1 - auc) == 1 - 2 * abs(auc - 0.5)
    assert final_score(0.3, auc, 0.6) == pytest.approx((0.3 + membership_score(auc) + 0.6) / 3)


@pytest.mark.parametrize("parts", [(1.5, 0.5, 0.5), (0.5, -0.1, 0.5), (0.5, 0.5, float("nan"))])
def test_parts_of_a_final_score_are_in_bounds(parts: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        final_score(*parts)
