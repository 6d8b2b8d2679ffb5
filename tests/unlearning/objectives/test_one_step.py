"""The update rules of one step on whole sets, as the page on objectives has them, are their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.unlearning.objectives.bigram import FORGET, REFUSALS, RETAIN, Bigram, moved, scored_pairs
from torch_simu import SIMUOptimizer, gauss_newton_loss
from torch_simu.unlearning.objectives import GradDiff, answer_logits, mean_answer_nll, refused


def gradient(table: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Of the mean negative log-likelihood, position by position: softmax less one-hot, in the row of the last token."""
    pairs = scored_pairs(batch)
    found = torch.zeros_like(table)
    for last, token in pairs:
        found[last] += table[last].softmax(0)
        found[last, token] -= 1
    return found / len(pairs)


def table_of(model: Bigram) -> Tensor:
    return model.table.detach().clone()


def test_iau_steps_along_the_difference_of_both_gradients() -> None:
    _, model, _ = moved()
    before = table_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for term in GradDiff(retain_weight=1.0).terms(model, FORGET, RETAIN):
        (term.weight * term.loss).backward()
    optimizer.step()
    expected = before - 0.3 * (gradient(before, RETAIN) - gradient(before, FORGET))
    torch.testing.assert_close(table_of(model), expected)


@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_features_and_labels_takes_a_newton_step_to_the_corrected_rows(eps: float) -> None:
    _, model, _ = moved()
    before = table_of(model)
    optimizer = SIMUOptimizer(model.parameters(), lr=1.0, betas=(0.0, 0.0), rho=1.0, eps=eps, clip=1e6)
    logits = answer_logits(model, RETAIN)
    loss, count = gauss_newton_loss(logits, RETAIN["labels"], generator=torch.Generator().manual_seed(0))
    loss.backward()
    drawn = model.table.grad.clone()
    optimizer.update_hessian(count)
    optimizer.zero_grad()
    share = 0.25
    corrected = refused(FORGET, REFUSALS)
    (share * (mean_answer_nll(model, corrected) - mean_answer_nll(model, FORGET))).backward()
    optimizer.step()
    direction = share * (gradient(before, corrected) - gradient(before, FORGET))
    torch.testing.assert_close(table_of(model), before - direction / (count * drawn.square()).clamp(min=eps))


def test_the_drawn_gradient_is_that_of_labels_at_the_scored_positions() -> None:
    _, model, _ = moved()
    loss, count = gauss_newton_loss(
        answer_logits(model, RETAIN), RETAIN["labels"], generator=torch.Generator().manual_seed(0)
    )
    rows = model.table[[last for last, _ in scored_pairs(RETAIN)]]
    assert count == len(rows)
    assert any(
        torch.isclose(loss, cross_entropy(rows, torch.tensor(labels)))
        for labels in torch.cartesian_prod(*[torch.arange(rows.shape[1])] * count).tolist()
    )
