"""The Gauss-Newton-Bartlett estimate is unbiased, counts scored positions, and ignores the true labels."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import sampled_diagonal
from tests.strategies import generator, normal, seeds
from torch_simu import gauss_newton_loss
from torch_simu.curvature import bartlett_diagonal, scored_logits

pytestmark = pytest.mark.usefixtures("device")


@given(seeds, st.integers(1, 3))
def test_the_estimate_is_unbiased(seed, tokens):
    inputs, weight = normal(seed, tokens, 3), normal(seed + 1, 4, 3).requires_grad_()
    logits = inputs @ weight.T
    probabilities = logits.detach().softmax(-1)
    expected = sampled_diagonal(inputs, logits.detach(), weight.detach())
    total = torch.zeros(4, 3)
    # Every outcome of the draw with its probability, instead of many draws: exact, however rare a label is.
    for drawn in itertools.product(range(4), repeat=tokens):
        with mock.patch("torch_simu.curvature.torch.multinomial", return_value=torch.tensor(drawn)[:, None]):
            loss, num_tokens = gauss_newton_loss(logits, torch.zeros(tokens, dtype=torch.long))
        gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        total += probabilities[range(tokens), drawn].prod() * bartlett_diagonal(gradient, num_tokens)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


def test_labels_are_drawn_with_the_model_s_probabilities():
    chances = torch.tensor([0.7, 0.2, 0.1])
    with mock.patch("torch_simu.curvature.functional.cross_entropy") as loss:
        gauss_newton_loss(
            chances.log().expand(20_000, 3), torch.zeros(20_000, dtype=torch.long), generator=generator(0)
        )
    drawn = loss.call_args.args[1].bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn, chances, rtol=0, atol=0.02)


@given(seeds, st.integers(1, 3), st.integers(2, 5))
def test_labels_only_say_which_positions_count(seed, batch, tokens):
    logits = normal(seed, batch, tokens, 7)
    labels = torch.randint(0, 7, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    labels[:, 0] = -100
    other = torch.where(labels == -100, labels, (labels + 1) % 7)
    draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
    first, second = (
        gauss_newton_loss(logits, chosen, generator=g) for chosen, g in zip((labels, other), draws, strict=True)
    )
    assert first == second
    assert first[1] == (labels != -100).sum()


@given(seeds)
def test_logits_are_paired_with_the_label_one_position_later(seed):
    logits = normal(seed, 2, 5, 3)
    labels = torch.randint(0, 3, (2, 5), generator=torch.Generator().manual_seed(seed))
    labels[0, 2] = -100
    found, targets = scored_logits(logits, labels)
    pairs = [(logits[b, t - 1], labels[b, t]) for b in range(2) for t in range(1, 5) if labels[b, t] != -100]
    assert torch.equal(found, torch.stack([pair[0] for pair in pairs]))
    assert torch.equal(targets, torch.stack([pair[1] for pair in pairs]))


def test_shapes_that_do_not_match_and_labels_without_scored_positions_are_refused():
    with pytest.raises(ValueError, match=r"logits have shape \(1, 3, 5\) and labels \(1, 4\)"):
        gauss_newton_loss(torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="Every label is -100"):
        gauss_newton_loss(torch.zeros(1, 3, 5), torch.full((1, 3), -100))
