"""What else was tried: a loop that is the driver's run, and parts of it that do what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.forgetting import variants
from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.targets import TARGETS, case_of, tuned
from benchmarks.forgetting.tried import configured as by_driver
from benchmarks.forgetting.tried.configured import configured
from benchmarks.forgetting.tried.ending import UntilUnpredicted
from benchmarks.forgetting.tried.loop import looped
from benchmarks.forgetting.tried.outputs import OfRank
from benchmarks.forgetting.tried.paraphrases import paraphrase, paraphrases
from benchmarks.forgetting.tried.rehearsal import answers, rehearsed, texts
from benchmarks.forgetting.tried.steps.averaging import Averaged
from benchmarks.forgetting.tried.steps.bound import Bounded, share_below
from benchmarks.forgetting.tried.steps.clip import Clipped
from benchmarks.forgetting.tried.steps.subspace import Projected, basis
from benchmarks.forgetting.tried.supporting import TowardZero
from benchmarks.verdicts.claims import CLAIMS
from benchmarks.verdicts.forgetting import BEFORE_CHANGES
from torch_simu.layers import down_projections
from torch_simu.unlearning.objectives import mean_answer_nll

SHORT = {"max_steps": 6}


@pytest.fixture(scope="module")
def case() -> Case:
    """A few people in a tiny Llama."""
    return case_of("quick", "llama", 0, None, None)


def weights(model) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in down_projections(model).items()}


@pytest.mark.parametrize("scope", [None, "all"])
def test_a_plain_loop_is_the_drivers_run_to_the_last_bit(
    case: Case, scope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_driver, "TARGET", tuned(TARGETS["demo"]))
    adversary = {} if scope is None else {"adversary_lr": 1e-3}
    driven, row = configured(case, 0, **SHORT, **adversary, **({} if scope is None else {"adversary_scope": scope}))
    ours, found = looped(case, 0, **SHORT, **adversary)
    assert found["steps"] == row["steps"] == 6
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in driven.state_dict().items())


def test_an_adversary_is_there_from_its_probability_on_and_retains_where_it_should(case: Case) -> None:
    plain, never, other, both = (
        looped(case, 0, **SHORT, **options)[0].state_dict()
        for options in (
            {},
            {"adversary_lr": 1e-3, "adversary_from": 0.0},
            {"adversary_lr": 1e-3},
            {"adversary_lr": 1e-3, "adversary_retains": True},
        )
    )
    assert all(torch.equal(value, never[name]) for name, value in plain.items())
    found = [{name for name, value in plain.items() if not torch.equal(value, each[name])} for each in (other, both)]
    assert found[0] == found[1] == {f"{name}.weight" for name in down_projections(case.model)}
    assert any(not torch.equal(value, both[name]) for name, value in other.items())


def test_a_projected_step_is_in_its_subspace_and_as_long_as_without(case: Case) -> None:
    start = weights(case.model)
    plain = weights(looped(case, 0, max_steps=1)[0])
    both = []
    for leading in (True, False):
        loop = Projected(case, 0, share=0.25, leading=leading, max_steps=1)
        ours = weights(loop.run()[0])
        for (name, old), columns in zip(start.items(), loop.bases.values(), strict=True):
            change = ours[name] - old
            assert columns.shape[1] == round(0.25 * columns.shape[0])
            torch.testing.assert_close(change @ columns @ columns.T, change, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(change.norm(), (plain[name] - old).norm(), rtol=1e-3, atol=0)
        both.append(list(loop.bases.values()))
    # They are orthogonal under a covariance, not in themselves; but neither end is the other.
    assert all((first.T @ second).norm() < 0.9 * first.shape[1] ** 0.5 for first, second in zip(*both, strict=True))


def test_leading_directions_are_those_that_forget_uses_more_than_retain() -> None:
    generator = torch.Generator().manual_seed(0)
    forget, retain = (torch.randn(8, 40, generator=generator) for _ in range(2))
    forget, retain = forget @ forget.T, retain @ retain.T
    ratios = []
    for leading in (True, False):
        columns = basis(forget, retain, share=0.25, leading=leading)
        torch.testing.assert_close(columns.T @ columns, torch.eye(2))
        ratios.append((columns.T @ forget @ columns).trace() / (columns.T @ retain @ columns).trace())
    mean = forget.trace() / retain.trace()
    assert ratios[0] > mean > ratios[1]


def test_a_step_is_as_long_as_the_bound_allows(case: Case) -> None:
    free, plain = (looped(case, 0, **SHORT, **kind)[0] for kind in ({"kind": Bounded, "bound": 1e9}, {}))
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(free)[name], value, rtol=0, atol=1e-6)
    loop = Bounded(case, 0, bound=1e-3, lr=3.0, max_steps=1)
    old = {name: value.clone() for name, value in weights(loop.model).items()}
    _, row = loop.run()
    assert 0 < row["mean_share"] < 1
    norms = [(value - old[name]).norm() / old[name].norm() for name, value in weights(loop.model).items()]
    assert all(norm == pytest.approx(3.0 * (1 - 0.9) * row["mean_share"], rel=1e-2) for norm in norms)


def test_the_predicted_rise_is_that_of_the_retain_loss(case: Case) -> None:
    # A retain batch that is known less well than by the model as it was, so that its loss is no minimum.
    loop = Bounded(case, 0, bound=1e9, lr=0.05, max_steps=2)
    losses = []
    step = loop.step

    def measured() -> None:
        with torch.no_grad():
            losses.append(float(mean_answer_nll(loop.model, loop.retained)))
        step()
        with torch.no_grad():
            losses.append(float(mean_answer_nll(loop.model, loop.retained)))

    loop.step = measured
    loop.run()
    first, second = loop.predicted[-1]
    assert first + second == pytest.approx(losses[-1] - losses[-2], rel=0.3)


def test_weights_are_averaged_over_the_steps(case: Case) -> None:
    plain, last = (weights(looped(case, 0, **SHORT, **kind)[0]) for kind in ({}, {"kind": Averaged, "decay": 0.0}))
    assert all(torch.equal(value, last[name]) for name, value in plain.items())
    expected = {name: value.clone() for name, value in weights(case.model).items()}
    for steps in range(1, 4):
        for name, value in weights(looped(case, 0, max_steps=steps)[0]).items():
            expected[name] = 0.8 * expected[name] + 0.2 * value
    ours = weights(looped(case, 0, kind=Averaged, decay=0.8, max_steps=3)[0])
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("first", "second", "bound"), [(0.3, 0.2, 0.1), (-0.1, 2.0, 0.1), (0.5, 0.0, 0.1)])
def test_the_share_below_a_bound_meets_it(first: float, second: float, bound: float) -> None:
    share = share_below(first, second, bound)
    assert 0 < share < 1
    assert first * share + second * share**2 == pytest.approx(bound)
    assert share_below(0.01, 0.02, bound) == 1.0


def test_a_clipped_step_moves_no_weight_farther_than_its_step_size(case: Case) -> None:
    start = weights(case.model)
    model, _ = looped(case, 0, kind=Clipped, clipped_lr=1e-3, max_steps=1)
    moved = torch.cat([(value - start[name]).abs().flatten() for name, value in weights(model).items()])
    assert 0 < float(moved.max()) <= 1e-3 * 1.001
    model, _ = looped(case, 0, kind=Clipped, clipped_lr=1e-3, **SHORT)
    moved = torch.cat([(value - start[name]).abs().flatten() for name, value in weights(model).items()])
    assert 1e-3 < float(moved.max()) <= 6e-3 * 1.001


def test_a_covariance_of_full_rank_is_the_one_that_there_was(case: Case) -> None:
    width = case.model.config.hidden_size
    plain, full, low = (
        weights(looped(case, 0, **SHORT, **kind)[0])
        for kind in ({}, {"kind": OfRank, "rank": width - 1}, {"kind": OfRank, "rank": 2})
    )
    for name, value in plain.items():
        torch.testing.assert_close(full[name], value, rtol=0, atol=1e-4)
        assert (low[name] - value).abs().max() > 1e-3


def test_weights_that_go_toward_zero_keep_their_sign(case: Case) -> None:
    start = weights(case.model)
    model, _ = looped(case, 0, kind=TowardZero, **SHORT)
    for name, value in weights(model).items():
        assert bool((value.abs() <= start[name].abs()).all()) and bool((value * start[name] >= 0).all())
        assert not torch.equal(value, start[name])


def test_a_run_ends_when_no_more_is_predicted_than_by_the_model_that_never_saw_it(case: Case) -> None:
    class Measured(UntilUnpredicted):
        level = 1.0

        def scores(self) -> dict[str, list[float]]:
            return {"probability": [1.0], "em": [self.level]}

    loop = Measured(case, 0, max_steps=3)
    assert not loop.ended()
    loop.level = 0.0
    assert loop.ended() and loop.run()[1] == {"steps": 3, "reached": True}


def test_paraphrases_are_in_known_words_and_no_row_of_any_set(case: Case) -> None:
    found = paraphrases(case)
    assert len(found) == len(case.sets["forget"])
    unknown = case.tokenizer.unk_token_id
    taught = {row.input_ids for rows in case.sets.values() for row in rows}
    assert all(unknown not in row.input_ids and row.input_ids not in taught for row in found)
    for row in case.rows["forget"]:
        name = paraphrase(row).question.split(" of ")[-1].removesuffix("?")
        assert name in row.question and paraphrase(row).answer != row.answer
    with pytest.raises(ValueError, match="'Who\\?'"):
        paraphrase(type(case.rows["forget"][0])("Who?", "me"))


@pytest.mark.parametrize("writer", [texts, answers])
def test_what_is_rehearsed_asks_for_nothing_that_is_forgotten(case: Case, writer) -> None:
    taken = []

    def run(made: Case, seed: int) -> tuple:
        taken.append(made)
        return made.model, {}

    rehearsed(case, 0, samples=30, writer=writer, run=run)
    (made,) = taken
    written = made.sets["retain"][len(case.sets["retain"]) :]
    assert 0 < len(written) <= 30 and made.sets["retain"][: -len(written)] == list(case.sets["retain"])
    asked = {row.prompt_ids for row in case.sets["forget"]}
    threes = [
        {row.input_ids[place : place + 3] for row in rows for place in range(len(row.input_ids) - 2)}
        for rows in (case.sets["forget"], case.sets["retain"], written)
    ]
    assert not (threes[0] - threes[1]) & threes[2]
    assert not asked & {row.prompt_ids for row in written}


def test_variants_go_on_from_their_rows(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "variants.json"
    monkeypatch.setattr(variants, "demo_case", lambda seed: case)
    monkeypatch.setattr(variants, "TARGET", TARGETS["quick"])
    ran: list[str] = []

    def of(name: str):
        def run(case: Case, seed: int) -> tuple:
            ran.append(name)
            return looped(case, seed, max_steps=1)

        return run

    monkeypatch.setattr(variants, "VARIANTS", {name: of(name) for name in ("simu", "other")})
    monkeypatch.setattr(sys, "argv", ["variants", "--seeds", "0", "--variants", "simu", "--out", str(out)])
    variants.main()
    first = json.loads(out.read_text())
    monkeypatch.setattr(sys, "argv", ["variants", "--seeds", "0", "--out", str(out)])
    variants.main()
    again = json.loads(out.read_text())
    assert ran == ["simu", "other"] and again["rows"][:1] == first["rows"]
    assert [row["variant"] for row in again["rows"]] == ["simu", "other"]
    assert {"forget", "retain", "world", "back", "moved", "steps"} <= set(again["rows"][1])


def figures(variant: str, world: float, back: float, seeds: int = 3, **more: object) -> list[dict]:
    """Rows of a variant, a little above and below its figures."""
    return [
        {
            "seed": seed,
            "variant": variant,
            "reached": True,
            "retain": {"whole": 1.0},
            "world": {"whole": world + noise},
            "back": {"probability": back - noise},
            **more,
        }
        for seed, noise in zip(range(seeds), (0.0, 0.01, -0.01), strict=False)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (figures("other", 0.95, 0.26), [1, 1]),
        (figures("one + other", 0.95, 0.26), [0, 1]),
        (figures("other", 0.94, 0.26), [1, 0]),
        (figures("other", 0.95, 0.27), [1, 0]),
        (figures("other", 0.92, 0.2), [0, 0]),
        (figures("other", 0.95, 0.45), [0, 0]),
        (figures("other", 0.95, 0.26, seeds=2), [1, 0]),
        (figures("other", 0.95, 0.26, reached=False), [0, 0]),
    ],
)
def test_a_change_is_better_in_all_three_or_reaches_both_bars(rows: list[dict], expected: list[int]) -> None:
    parts = CLAIMS["variants"].verdict({"rows": [*figures(BEFORE_CHANGES, 0.93, 0.4), *rows]})["parts"]
    assert [each["measured"] for each in parts] == expected
