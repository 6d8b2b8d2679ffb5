"""IDK, JensUn and DPO are their formulas on refusals, which stand where a row's answer stood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unlearning.objectives.bigram import FORGET, REFUSALS, RETAIN, answer_nlls, moved, scored_pairs
from torch_simu.unlearning.objectives import DPO, IDK, Batch, JensUn, refused, retargeted

REFUSAL = (0, 4)
REFUSING = {
    "input_ids": torch.tensor([[1, 0, 4, 0], [4, 3, 0, 4]]),
    "labels": torch.tensor([[-100, 0, 4, -100], [-100, -100, 0, 4]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
}
"""What `FORGET` becomes: its questions are (1) and (4, 3)."""


def rows(batch: Batch) -> list[list[tuple[int, int]]]:
    """Each row's tokens and labels, without padding."""
    columns = zip(*(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")), strict=True)
    return [[(token, label) for token, label, seen in zip(*row, strict=True) if seen] for row in map(tuple, columns)]


def naive_log_probs(table: Tensor, batch: Batch) -> list[Tensor]:
    """Row by row, the log-probabilities of the scored tokens."""
    return [
        torch.stack([table[last].log_softmax(0)[token] for last, token in scored_pairs(one)])
        for one in (
            {name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(len(batch["labels"]))
        )
    ]


def test_a_refusal_stands_behind_the_question_and_alone_is_scored() -> None:
    assert rows(refused(FORGET, [REFUSAL])) == rows(REFUSING)


def test_a_refusal_is_repeated_over_the_answer_and_the_answer_is_still_read() -> None:
    found = retargeted(FORGET, [REFUSAL])
    assert found["labels"].tolist() == [[-100, 0, 4, 0], [-100, -100, 0, -100]]
    assert torch.equal(found["input_ids"], FORGET["input_ids"]) and FORGET["labels"][0].tolist() == [-100, 2, 3, 4]


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize("row", [0, 1])
def test_the_refusal_of_a_row_is_the_same_in_any_batch(row: int, left: int) -> None:
    whole = rows(refused(FORGET, REFUSALS))
    assert whole[0][1:] == [(2, 2)] and whole[1][2:] == [(3, 3), (1, 1), (1, 1)]
    alone = {
        name: torch.nn.functional.pad(tensor[row : row + 1], (left, 0), value=-100 if name == "labels" else 0)
        for name, tensor in FORGET.items()
    }
    # Padding on the left is no part of the question.
    assert rows(refused(alone, REFUSALS)) == [whole[row]]


def test_rows_of_different_questions_get_different_refusals() -> None:
    ids = torch.arange(30)[:, None].repeat(1, 2)
    batch = {
        "input_ids": ids,
        "labels": torch.tensor([[-100, 1]]).repeat(30, 1),
        "attention_mask": torch.ones_like(ids),
    }
    given = {tuple(token for token, label in row if label != -100) for row in rows(refused(batch, REFUSALS))}
    assert given == set(REFUSALS)


def test_idk_is_the_mean_loss_of_the_refusals_each_row_alike() -> None:
    _, model, _ = moved()
    # The second gives the rows refusals of lengths 1 and 3.
    for refusals in ([REFUSAL], REFUSALS):
        found = next(iter(IDK(refusals).terms(model, FORGET, RETAIN)))
        wanted = -torch.stack([row.mean() for row in naive_log_probs(model.table, refused(FORGET, refusals))]).mean()
        assert found.weight == 1.0
        torch.testing.assert_close(found.loss, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(loss, model.table)[0] for loss in (found.loss, wanted)))


def test_dpo_compares_what_both_answers_gained_since_the_start() -> None:
    before, model, start = moved()
    beta = 0.3
    found = next(iter(DPO(start, [REFUSAL], beta=beta).terms(model, FORGET, RETAIN)))
    margins = []
    for batch, sign in ((FORGET, 1), (REFUSING, -1)):
        nlls = [[sum(row) for row in answer_nlls(each, batch)] for each in (model, before)]
        margins.append([sign * (now - then) for now, then in zip(*nlls, strict=True)])
    wanted = sum(math.log1p(math.exp(-beta * sum(each))) for each in zip(*margins, strict=True)) / 2
    assert found.weight == pytest.approx(2 / beta) and found.loss.item() == pytest.approx(wanted)
    at_the_start = next(iter(DPO(start, [REFUSAL]).terms(before, FORGET, RETAIN)))
    assert at_the_start.loss.item() == pytest.approx(math.log(2)) and at_the_start.weight == 20.0


def shannon(one: Tensor, other: Tensor) -> Tensor:
    """By the definition, entry by entry."""
    middle = (one + other) / 2
    return sum(
        (side[i] * (side[i] / middle[i]).log() / 2 for side in (one, other) for i in range(len(one)) if side[i] > 0),
        torch.zeros(()),
    )


def test_jensun_is_the_divergence_from_a_certain_refusal_and_from_the_start_model() -> None:
    before, model, start = moved()
    found = {term.name: term for term in JensUn(start, [REFUSAL], 3.0).terms(model, FORGET, RETAIN)}
    certain = torch.eye(5, dtype=torch.float64)
    pairs = scored_pairs({**FORGET, "labels": torch.tensor([[-100, 0, 4, 0], [-100, -100, 0, -100]])})
    wanted = {
        "forget": torch.stack([shannon(model.table[last].softmax(0), certain[token]) for last, token in pairs]).mean(),
        "retain": torch.stack(
            [shannon(model.table[last].softmax(0), before.table[last].softmax(0)) for last, _ in scored_pairs(RETAIN)]
        ).mean(),
    }
    for name, weight in (("forget", 1.0), ("retain", 3.0)):
        assert found[name].weight == weight
        torch.testing.assert_close(found[name].loss, wanted[name])
        grads = [torch.autograd.grad(loss, model.table)[0] for loss in (found[name].loss, wanted[name])]
        torch.testing.assert_close(*grads)
    at_the_start = {term.name: term.loss.item() for term in JensUn(start, [REFUSAL]).terms(before, FORGET, RETAIN)}
    assert at_the_start["retain"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("logit", "wanted"), [(0.0, 0.21576155433883565), (-90.0, math.log(2)), (90.0, 0.0)])
def test_the_divergence_from_a_certain_token_lies_between_zero_and_the_log_of_two(logit: float, wanted: float) -> None:
    _, model, start = moved()
    batch = {**FORGET, "labels": torch.tensor([[-100, 2, -100, -100], [-100, 3, -100, -100]])}
    with torch.no_grad():
        # Behind both questions the refusal has probability one half at a logit of zero.
        model.table[:] = torch.tensor([logit, 0.0, -200.0, -200.0, -200.0], dtype=torch.float64)
    found = next(iter(JensUn(start, [(0,)]).terms(model, batch, RETAIN)))
    assert found.loss.item() == pytest.approx(wanted, abs=1e-12)
    assert torch.autograd.grad(found.loss, model.table)[0].isfinite().all()


class TestErrors:
    @pytest.mark.parametrize("refusals", [[], [(1,), ()]])
    def test_no_refusal(self, refusals: list[tuple[int, ...]]) -> None:
        _, _, start = moved()
        for make in (IDK, lambda given: DPO(start, given), lambda given: JensUn(start, given)):
            with pytest.raises(
                ValueError, match="refusals is .*, expected at least one, each of at least one token id"
            ):
                make(refusals)

    def test_a_row_without_an_answer(self) -> None:
        batch = {**FORGET, "labels": torch.tensor([[-100, 2, 3, 4], [4, -100, -100, -100]])}
        for make in (refused, retargeted):
            with pytest.raises(ValueError, match="Every label of row 1 is -100, expected at least one scored position"):
                make(batch, REFUSALS)
