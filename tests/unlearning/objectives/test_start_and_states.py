"""EUL, ICU and RMU are their formulas, of the start model's predictions and hidden states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models import tiny
from tests.unlearning.objectives.bigram import FORGET, REFUSALS, RETAIN, Bigram, moved, scored_pairs
from torch_simu.unlearning.objectives import EUL, ICU, OBJECTIVES, RMU, StartModel, Term, make_objective


def mean_divergence(before: Tensor, now: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    each = [before[last].softmax(0) * (before[last].log_softmax(0) - now[last].log_softmax(0)) for last, _ in pairs]
    return torch.stack(each).sum(1).mean()


def mean_nll(now: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    return -torch.stack([now[last].log_softmax(0)[token] for last, token in pairs]).mean()


def assert_terms(found: dict[str, Term], wanted: dict[str, Tensor], model: Bigram) -> None:
    """Compare weighted losses and their gradients."""
    for name, loss in wanted.items():
        torch.testing.assert_close(found[name].weight * found[name].loss, loss)
        grads = [torch.autograd.grad(each, model.table)[0] for each in (found[name].weight * found[name].loss, loss)]
        torch.testing.assert_close(*grads)


def test_eul_goes_away_from_its_teacher_on_the_forget_set_and_stays_near_it_on_the_retain_set() -> None:
    before, model, start = moved()
    objective = EUL(start, 3.0, teacher_weight=0.8, ascent_weight=0.2)
    pairs = {"forget": scored_pairs(FORGET), "retain": scored_pairs(RETAIN)}
    divergence = {name: mean_divergence(before.table.detach(), model.table, each) for name, each in pairs.items()}
    nll = {name: mean_nll(model.table, each) for name, each in pairs.items()}
    wanted = {
        "forget": -divergence["forget"] - 0.2 * nll["forget"],
        "retain": 3.0 * (0.8 * divergence["retain"] + nll["retain"]),
    }
    assert_terms({term.name: term for term in objective.terms(model, FORGET, RETAIN)}, wanted, model)


@pytest.mark.parametrize("right", [1, 3])
def test_icu_leaves_a_row_out_once_little_of_it_is_predicted(right: int) -> None:
    before, model, start = moved()
    with torch.no_grad():
        # Of the row 1 2 3 4, so many answer tokens are the likeliest; of the row 4 3 2, the one is.
        for number, (last, token) in enumerate([(1, 2), (2, 3), (3, 4)]):
            model.table[last, token] = model.table[last].max() + (1.0 if number < right else -1.0)
        model.table[3, 2] = model.table[3].max() + (1.0 if right == 1 else -1.0)
    pairs = {"forget": scored_pairs(FORGET), "retain": scored_pairs(RETAIN)}
    still = pairs["forget"][3:] if right == 1 else pairs["forget"][:3]
    divergence = mean_divergence(before.table.detach(), model.table, pairs["retain"])
    wanted = {
        "forget": -mean_nll(model.table, still) * len(still) / 4,
        "retain": 3.0 * (0.5 * mean_nll(model.table, pairs["retain"]) + divergence),
    }
    assert_terms({term.name: term for term in ICU(start, 3.0).terms(model, FORGET, RETAIN)}, wanted, model)


def test_icu_pulls_at_nothing_when_every_row_is_forgotten() -> None:
    _, model, start = moved()
    first = next(iter(ICU(start, stop=1.0).terms(model, FORGET, RETAIN)))
    assert not torch.autograd.grad(first.loss, model.table)[0].any()


def test_rmu_steers_to_one_random_vector_and_keeps_the_states_of_the_start_model() -> None:
    before, model, start = moved()
    objective = RMU(start, 3.0, scale=7.0, seed=1)
    draw = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = 7.0 * draw / draw.square().sum().sqrt()
    states = {name: [last for last, _ in scored_pairs(batch)] for name, batch in (("f", FORGET), ("r", RETAIN))}
    wanted = {
        "forget": torch.stack([(model.table[last] - target).square().sum() / 5 for last in states["f"]]).mean(),
        "retain": 3.0
        * torch.stack(
            [(model.table[last] - before.table[last].detach()).square().sum() / 5 for last in states["r"]]
        ).mean(),
    }
    assert_terms({term.name: term for term in objective.terms(model, FORGET, RETAIN)}, wanted, model)
    assert target.norm().item() == pytest.approx(7.0) and (target >= 0).all()


@pytest.mark.parametrize(("block", "reached"), [(None, 1), (1, 1), (2, 2)])
def test_rmu_reaches_the_blocks_before_its_states_and_no_others(block: int | None, reached: int) -> None:
    model = tiny("llama")
    objective = RMU(StartModel(model), block=block)
    next(iter(objective.terms(model, FORGET, RETAIN))).loss.backward()
    for number in range(2):
        grad = model.get_submodule(f"model.layers.{number}.mlp.down_proj").weight.grad
        assert (grad is not None) == (number < reached)
    assert model.lm_head.weight.grad is None


def test_the_states_are_a_quarter_of_the_way_up_unless_said_otherwise() -> None:
    model = tiny("llama", num_hidden_layers=8)
    losses = [
        next(iter(RMU(StartModel(model), block=b).terms(model, FORGET, RETAIN))).loss.item() for b in (None, 2, 3)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_term_is_the_mean_over_what_it_says_however_a_batch_is_split(name: str) -> None:
    _, model, _ = moved()
    objective = make_objective(name, model=Bigram(), refusals=REFUSALS)
    both = {each: torch.cat([FORGET[each], FORGET[each].flip(0)]) for each in FORGET}
    retain = {each: RETAIN[each].repeat(4, 1) for each in RETAIN}
    retain["labels"][2, 1] = retain["labels"][3, 2] = -100

    def counts(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, int]:
        tokens = {each: len(scored_pairs(batch)) for each, batch in (("forget", first), ("retain", second))}
        return {"forget tokens": tokens["forget"], "retain tokens": tokens["retain"], "pairs": len(first["labels"])}

    def cut(batch: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
        return {each: tensor[part] for each, tensor in batch.items()}

    whole = {term.name: term for term in objective.terms(model, both, retain)}
    total = dict.fromkeys(whole, 0.0)
    for part in (slice(0, 1), slice(1, 4)):
        here = cut(both, part), cut(retain, part)
        for term in objective.terms(model, *here):
            total[term.name] += term.loss.item() * counts(*here)[term.mean_over]
    everywhere = counts(both, retain)
    for name_of_term, term in whole.items():
        assert total[name_of_term] / everywhere[term.mean_over] == pytest.approx(term.loss.item())


class TestErrors:
    def test_numbers_out_of_bounds(self) -> None:
        start = StartModel(Bigram())
        with pytest.raises(ValueError, match="teacher_weight is -1"):
            EUL(start, teacher_weight=-1)
        with pytest.raises(ValueError, match="stop is 2"):
            ICU(start, stop=2)
        with pytest.raises(ValueError, match="scale is 0"):
            RMU(start, scale=0)
        with pytest.raises(ValueError, match="block is 0"):
            RMU(start, block=0)

    def test_a_model_of_fewer_blocks(self) -> None:
        model = Bigram()
        with pytest.raises(ValueError, match="block is 2 for a model of 1 blocks, expected 1 to 1"):
            next(iter(RMU(StartModel(model), block=2).terms(model, FORGET, RETAIN)))

    def test_a_batch_without_scored_tokens(self) -> None:
        model, empty = Bigram(), {**FORGET, "labels": torch.full((2, 4), -100)}
        with pytest.raises(ValueError, match="Every label is -100"):
            next(iter(RMU(StartModel(model)).terms(model, empty, RETAIN)))
