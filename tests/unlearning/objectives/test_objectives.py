"""Every objective is its formula, computed by hand on a tiny model, and unscored positions play no part."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.unlearning.objectives.bigram import FORGET, REFUSALS, RETAIN, Bigram, answer_nlls, moved, terms
from torch_simu.unlearning.objectives import (
    NPO,
    OBJECTIVES,
    REFUSING,
    GradDiff,
    KeepsPredictions,
    Probability,
    SimNPO,
    StartModel,
    make_objective,
)


def test_the_probability_is_the_mean_over_tokens_and_its_gradient_fades_with_it() -> None:
    model = Bigram()
    nlls = [each for row in answer_nlls(model, FORGET) for each in row]
    found = terms(Probability(retain_weight=3.0), model)
    assert found["forget"] == pytest.approx((1.0, sum(math.exp(-each) for each in nlls) / len(nlls)))
    kept = [each for row in answer_nlls(model, RETAIN) for each in row]
    assert found["retain"] == pytest.approx((3.0, sum(kept) / len(kept)))
    # A token of probability p pulls with p times the force of its log-likelihood.
    forget = next(iter(Probability().terms(model, FORGET, RETAIN))).loss
    plain = next(iter(GradDiff().terms(model, FORGET, RETAIN))).loss
    bounded, unbounded = (torch.autograd.grad(each, model.table)[0][1, 2] for each in (forget, plain))
    assert (bounded / unbounded).item() == pytest.approx(-math.exp(-nlls[0]))


def test_npo_compares_the_likelihood_of_a_row_with_that_of_the_start_model() -> None:
    before, model, start = moved()
    beta, found = 0.1, terms(NPO(moved()[2], 2.0), model)
    margins = [
        beta * (sum(now) - sum(then))
        for now, then in zip(answer_nlls(model, FORGET), answer_nlls(before, FORGET), strict=True)
    ]
    wanted = sum(math.log1p(math.exp(-each)) for each in margins) / len(margins)
    assert found["forget"] == pytest.approx((2 / beta, wanted))
    weights = model.table.detach().clone()
    assert terms(NPO(start), model)["forget"] == found["forget"] and torch.equal(model.table, weights)


def test_simnpo_takes_the_mean_over_the_tokens_of_a_row() -> None:
    model = Bigram()
    found = terms(SimNPO(retain_weight=1.0, beta=4.5, margin=0.5), model)
    margins = [4.5 * (sum(row) / len(row) - 0.5) for row in answer_nlls(model, FORGET)]
    assert found["forget"] == pytest.approx((2 / 4.5, sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)))


def test_the_divergence_is_zero_at_the_start_and_that_of_the_predictions_after_it() -> None:
    before, model, start = moved()
    objective = KeepsPredictions(Probability(), start, retain_weight=5.0)
    assert terms(objective, before)["retain"] == pytest.approx((5.0, 0.0), abs=1e-12)
    wanted = 0.0
    for last in (2, 2):
        p, q = before.table[last].softmax(0), model.table[last].softmax(0)
        wanted += (p * (p.log() - q.log())).sum().item() / 2
    found = terms(objective, model)
    assert found["retain"] == pytest.approx((5.0, wanted))
    assert found["forget"] == terms(Probability(), model)["forget"]


def test_the_divergence_takes_no_pass_for_the_retain_loss_that_it_replaces() -> None:
    _, model, start = moved()
    passes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda *given: passes.append(given[-1]["input_ids"].shape), with_kwargs=True)
    terms(KeepsPredictions(Probability(), start), model)
    # As it was and as it is, both on the retain batch.
    assert passes == [FORGET["input_ids"].shape, *[RETAIN["input_ids"].shape] * 2]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("retain_term", ["nll", "kl"])
def test_what_is_not_scored_plays_no_part(name: str, retain_term: str) -> None:
    model = Bigram()
    objective = make_objective(name, model=model, retain_term=retain_term, refusals=REFUSALS)
    found = terms(objective, model)
    padded = {**FORGET, "input_ids": FORGET["input_ids"].clone()}
    padded["input_ids"][1, 3] = 1
    empty = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    longer = {name: functional.pad(part, (0, 1), value=empty[name]) for name, part in RETAIN.items()}
    again = {term.name: (term.weight, term.loss.item()) for term in objective.terms(model, padded, longer)}
    assert again == found


# The others pull without end, or towards something else than what the likelihood says.
@pytest.mark.parametrize("name", ["probability", "npo", "simnpo", "wga", "satimp", "ceu", "dpo"])
def test_bounded_objectives_stop_pulling_at_what_is_forgotten(name: str) -> None:
    model = Bigram()
    objective = make_objective(name, model=model, refusals=REFUSALS)
    with torch.no_grad():
        # The scored tokens have probability e^-60 each.
        for last, token in ((1, 2), (2, 3), (3, 4), (3, 2)):
            model.table[last, token] = -60.0
    first = next(iter(objective.terms(model, FORGET, RETAIN)))
    pull = torch.autograd.grad(first.weight * first.loss, model.table)[0].norm().item()
    plain = next(iter(GradDiff().terms(model, FORGET, RETAIN)))
    assert pull < 0.05 * torch.autograd.grad(plain.loss, model.table)[0].norm().item()


def test_the_start_model_is_given_back_also_after_an_exception() -> None:
    _, model, start = moved()
    weights = model.table.detach().clone()
    pointer = model.table.data_ptr()
    with pytest.raises(ValueError, match="broken"), start.in_place(model):
        assert not torch.equal(model.table, weights) and not torch.is_grad_enabled()
        raise ValueError("broken")
    assert torch.equal(model.table, weights) and model.table.data_ptr() == pointer and torch.is_grad_enabled()


def test_a_start_model_of_other_parameters_is_refused() -> None:
    _, _, start = moved()
    with (
        pytest.raises(ValueError, match="The model has no parameter 'table', expected that of the start model"),
        start.in_place(nn.Linear(2, 2)),
    ):
        pass


def test_only_what_trains_is_kept_of_the_start_model() -> None:
    model = Bigram()
    model.table.requires_grad_(False)
    assert repr(StartModel(model)) == "StartModel(0 parameters)"


def test_the_page_of_objectives_has_a_row_for_each_name_and_says_what_it_needs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip(" `") for row in rows) == sorted(OBJECTIVES)
    assert {row[0].strip(" `") for row in rows if "refusals" in row[-1]} == set(REFUSING)
    for row in rows:
        name = row[0].strip(" `")
        if "start model" not in row[-1]:
            make_objective(name, refusals=REFUSALS)
            continue
        with pytest.raises(ValueError, match="model is None"):
            make_objective(name, refusals=REFUSALS)


class TestErrors:
    @pytest.mark.parametrize("options", [{"name": "npo"}, {"name": "probability", "retain_term": "kl"}])
    def test_an_objective_that_compares_needs_the_model(self, options: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="model is None, expected the model before the first step"):
            make_objective(**options)

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_an_objective_that_refuses_needs_refusals(self, name: str) -> None:
        if name not in REFUSING:
            make_objective(name, model=Bigram())
            return
        with pytest.raises(ValueError, match=r"refusals is None, expected .*encode_refusals\(tokenizer\)"):
            make_objective(name, model=Bigram())

    def test_unknown_names(self) -> None:
        with pytest.raises(ValueError, match="objective is 'npos', expected one of"):
            make_objective("npos")
        with pytest.raises(ValueError, match="retain_term is 'l2', expected one of 'nll', 'kl'"):
            make_objective("npo", retain_term="l2", model=Bigram())

    def test_numbers_out_of_bounds(self) -> None:
        with pytest.raises(ValueError, match="retain_weight is -1"):
            Probability(retain_weight=-1)
        with pytest.raises(ValueError, match="beta is 0"):
            SimNPO(beta=0)

    def test_a_batch_without_scored_tokens(self) -> None:
        empty = {**FORGET, "labels": torch.full((2, 4), -100)}
        with pytest.raises(ValueError, match="Every label is -100"):
            next(iter(Probability().terms(Bigram(), empty, RETAIN)))


def test_functional_agrees_with_the_hand_made_likelihood() -> None:
    model = Bigram()
    labels = FORGET["labels"][:, 1:].flatten()
    logits = model.table[FORGET["input_ids"][:, :-1]].flatten(0, 1)
    wanted = functional.cross_entropy(logits, labels).item()
    nlls = [each for row in answer_nlls(model, FORGET) for each in row]
    assert sum(nlls) / len(nlls) == pytest.approx(wanted)
