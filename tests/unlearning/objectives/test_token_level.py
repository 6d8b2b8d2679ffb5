"""WGA, SatImp, CEU and UNDIAL are their formulas on each scored token, and so are their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.unlearning.objectives.bigram import FORGET, RETAIN, Bigram, moved, scored_pairs, terms
from torch_simu.unlearning.objectives import CEU, UNDIAL, WGA, GradDiff, Probability, SatImp, StartModel

ONE = {
    "input_ids": torch.tensor([[0, 1, 2]]),
    "labels": torch.tensor([[-100, 1, -100]]),
    "attention_mask": torch.ones(1, 3, dtype=torch.int64),
}
PREDICTED = [0.25, 0.5, 0.125, 0.0625, 0.0625]
"""What the model below predicts behind token 0; the scored token is 1."""


def model_of_one_prediction() -> Bigram:
    model = Bigram()
    with torch.no_grad():
        model.table[0] = torch.tensor(PREDICTED, dtype=torch.float64).log()
    return model


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        # p = 1/2, so the loss of the token is log 2.
        (lambda model: WGA(beta=2.0), -0.25 * math.log(2)),
        (lambda model: SatImp(), -(0.5**5) * 0.5 * math.log(2)),
        # Without the token 1/2, 1/4, 1/8, 1/8 are left, against 1/4, 1/8, 1/16, 1/16.
        (lambda model: CEU(), (0.5 * 2 + 0.25 * 3 + 0.25 * 4) * math.log(2)),
        # Lowered by log 2 it weighs 1/4, of 3/4 in all.
        (
            lambda model: UNDIAL(StartModel(model), strength=math.log(2)),
            (1 / 3 * 2 + 1 / 3 * 1 + 1 / 6 * 3 + 1 / 6 * 4) * math.log(2),
        ),
    ],
    ids=["wga", "satimp", "ceu", "undial"],
)
def test_one_token_computed_by_hand(make: Callable[[Bigram], object], wanted: float) -> None:
    model = model_of_one_prediction()
    first = next(iter(make(model).terms(model, ONE, RETAIN)))
    assert first.weight * first.loss.item() == pytest.approx(wanted)


def naive_wga(table: Tensor, before: Tensor, last: int, token: int) -> Tensor:
    log_prob = table[last].log_softmax(0)[token]
    return math.exp(log_prob.item()) ** 2 * log_prob


def naive_satimp(table: Tensor, before: Tensor, last: int, token: int) -> Tensor:
    log_prob = table[last].log_softmax(0)[token]
    prob = math.exp(log_prob.item())
    return prob**5 * (1 - prob) * log_prob


def naive_ceu(table: Tensor, before: Tensor, last: int, token: int) -> Tensor:
    probs = table[last].softmax(0)
    rest = 1 - probs[token].item()
    others = [other for other in range(5) if other != token]
    return -sum((probs[other].item() / rest * probs[other].log() for other in others), torch.zeros(()))


def naive_undial(table: Tensor, before: Tensor, last: int, token: int) -> Tensor:
    weights = [math.exp(before[last, other].item() - 3.0 * (other == token)) for other in range(5)]
    probs = table[last].softmax(0)
    return -sum((weights[other] / sum(weights) * probs[other].log() for other in range(5)), torch.zeros(()))


@pytest.mark.parametrize(
    ("make", "naive"),
    [
        (lambda start: WGA(3.0, beta=2.0), naive_wga),
        (lambda start: SatImp(3.0), naive_satimp),
        (lambda start: CEU(3.0), naive_ceu),
        (lambda start: UNDIAL(start, 3.0, strength=3.0), naive_undial),
    ],
    ids=["wga", "satimp", "ceu", "undial"],
)
def test_an_objective_and_its_gradient_are_those_of_its_formula_token_by_token(make, naive) -> None:
    before, model, start = moved()
    found = {term.name: term for term in make(start).terms(model, FORGET, RETAIN)}
    each = [naive(model.table, before.table, last, token) for last, token in scored_pairs(FORGET)]
    wanted = torch.stack(each).mean()
    forget = found["forget"].weight * found["forget"].loss
    torch.testing.assert_close(forget, wanted)
    grads = [torch.autograd.grad(loss, model.table)[0] for loss in (forget, wanted)]
    torch.testing.assert_close(*grads)
    kept = next(term for term in GradDiff(3.0).terms(model, FORGET, RETAIN) if term.name == "retain")
    assert found["retain"].weight == 3.0 and found["retain"].loss.item() == kept.loss.item()


def pull_of(objective: object, model: Bigram) -> Tensor:
    first = next(iter(objective.terms(model, FORGET, RETAIN)))
    return torch.autograd.grad(first.weight * first.loss, model.table)[0]


def test_ascent_weighted_by_the_probability_pulls_as_the_probability_and_unweighted_as_plain_ascent() -> None:
    _, model, _ = moved()
    torch.testing.assert_close(pull_of(WGA(beta=1.0), model), pull_of(Probability(), model))
    torch.testing.assert_close(pull_of(WGA(beta=0.0), model), pull_of(GradDiff(), model))
    torch.testing.assert_close(pull_of(SatImp(saturation=1.0, importance=0.0), model), pull_of(Probability(), model))


@pytest.mark.parametrize("shift", [0.0, -80.0, 80.0])
def test_the_pull_on_one_token_is_bounded_and_finite_however_likely_it_is(shift: float) -> None:
    model = Bigram()
    with torch.no_grad():
        for last, token in scored_pairs(FORGET):
            model.table[last, token] += shift
    start = StartModel(model)
    for objective in (WGA(), SatImp(), CEU(), UNDIAL(start)):
        pull = pull_of(objective, model)
        assert pull.isfinite().all() and pull.abs().sum().item() <= 2.0, objective


def test_cross_entropy_unlearning_keeps_the_proportions_of_the_other_tokens() -> None:
    _, model, _ = moved()
    pull, probs = pull_of(CEU(), model), model.table.softmax(1)
    # Token 2 is the only scored one behind token 1, one of four.
    others = [0, 1, 3, 4]
    torch.testing.assert_close(pull[1, 2], probs[1, 2] / 4)
    torch.testing.assert_close(pull[1, others], -probs[1, others] * probs[1, 2] / (1 - probs[1, 2]) / 4)


def test_self_distillation_rests_where_the_start_model_with_a_lowered_logit_is() -> None:
    model = model_of_one_prediction()
    objective = UNDIAL(StartModel(model), strength=10.0)
    with torch.no_grad():
        model.table[0, 1] -= 10.0
    first = next(iter(objective.terms(model, ONE, RETAIN)))
    assert torch.autograd.grad(first.loss, model.table)[0].abs().max().item() < 1e-12
    assert terms(objective, model)["retain"][0] == 2.0


def test_numbers_out_of_bounds() -> None:
    for wrong in ({"beta": -1}, {"retain_weight": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is -1"):
            WGA(**wrong)
    with pytest.raises(ValueError, match="saturation is -0.5"):
        SatImp(saturation=-0.5)
    with pytest.raises(ValueError, match="strength is -3"):
        UNDIAL(StartModel(Bigram()), strength=-3)
