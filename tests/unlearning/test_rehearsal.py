"""A model rehearses what it says about random words, and nothing that only the forget set has."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantized import quantized
from tests.unlearning.test_driver import FAST, _memorized, run
from torch_simu.curvature import IGNORED
from torch_simu.unlearning import driver
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.rehearsal.rehearse import rehearse
from torch_simu.unlearning.rehearsal.words import common_ids, cut_behind, runs
from torch_simu.unlearning.steps import NonFiniteLossError, StepBatches

NUMBER = 12


def certain():
    """The memorizing model, so sure of its next token that sampling takes the most probable one."""
    model, examples = _memorized()
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    return model, examples


def naive_answer(model, prompt, length, ends):
    ids: list[int] = []
    while len(ids) < length:
        ids.append(int(model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax()))
        if any(tuple(ids[-len(end) :]) == end for end in ends):
            break
    return tuple(ids)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_what_is_written_is_what_the_model_answers(batch_size) -> None:
    model, examples = certain()
    written = rehearse(model, examples["retain"], NUMBER, batch_size=batch_size)
    lengths = {row.num_scored for row in examples["retain"]}
    ends = {row.end_ids for row in examples["retain"] if row.num_end}
    assert len(written) == NUMBER and ends
    with torch.no_grad():
        for row in written:
            answer = row.input_ids[len(row.prompt_ids) :]
            assert answer in {naive_answer(model, row.prompt_ids, length, ends) for length in lengths}
            assert row.labels == (*[IGNORED] * len(row.prompt_ids), *answer)
            assert row.num_end == (answer[-1:] in ends)


def test_it_is_asked_as_in_the_retain_set_about_other_words() -> None:
    model, examples = _memorized()
    # Names are in many of the few prompts of one set.
    retain = [*examples["retain"], *examples["world"], *examples["forget"]]
    common = common_ids([row.prompt_ids for row in retain])
    frames = {tuple(token if token in common else None for token in row.prompt_ids) for row in retain}
    written = rehearse(model, retain, 30)
    assert {tuple(token if token in common else None for token in row.prompt_ids) for row in written} <= frames
    asked = {row.prompt_ids for row in retain}
    assert common and sum(row.prompt_ids not in asked for row in written) > 15


def test_nothing_is_written_that_only_the_forget_set_has() -> None:
    model, examples = _memorized()
    retain = [row for part in examples.values() for row in part]
    every = rehearse(model, retain, 60)
    # Rows of words that are drawn from anyway, so that the same prompts are drawn.
    forget = [row for row in every if runs([row], 3) - runs(retain, 3)][:10]
    found = rehearse(model, retain, 60, forget=forget)
    theirs, asked = runs(forget, 3) - runs(retain, 3), {row.prompt_ids for row in forget}
    assert found == [row for row in every if row.prompt_ids not in asked and not runs([row], 3) & theirs]
    assert 0 < len(found) < len(every)
    assert any(row.prompt_ids not in asked and runs([row], 3) & theirs for row in every)
    assert rehearse(model, retain, 60, forget=[Example(every[0].input_ids[:2], (-100, every[0].input_ids[1]))]) == every


def test_a_text_without_a_prompt_is_written_behind_a_word() -> None:
    model, examples = _memorized()
    texts = [Example(row.input_ids, (IGNORED, *row.input_ids[1:])) for row in examples["retain"]]
    texts += [Example(row.input_ids, row.input_ids) for row in texts]
    for row in rehearse(model, texts, NUMBER):
        assert row.labels[0] == IGNORED and row.num_scored == len(row.input_ids) - 1 > 0


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=3)
def test_the_seed_says_what_is_written_and_no_global_generator_is_used(seed: int) -> None:
    model, examples = _memorized()
    state = torch.get_rng_state()
    first, again = (rehearse(model, examples["retain"], NUMBER, seed=seed) for _ in range(2))
    assert first == again != rehearse(model, examples["retain"], NUMBER, seed=seed + 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_ends_of_several_tokens_are_seen() -> None:
    assert cut_behind([4, 1, 2, 3], {(1, 2)}) == 3
    assert cut_behind([4, 2, 1, 3], {(1, 2)}) == 4
    assert cut_behind([], {(1,)}) == 0


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"number": 0}, "number is 0"), ({"retain": []}, "no retain row"), ({"batch_size": 0}, "batch_size is 0")],
)
def test_what_cannot_be_rehearsed_is_refused(options, wrong) -> None:
    model, examples = _memorized()
    with pytest.raises(ValueError, match=wrong):
        rehearse(model, **{"retain": examples["retain"], "number": 1, **options})


def test_a_run_keeps_what_it_wrote_also_when_it_is_resumed(tmp_path, monkeypatch) -> None:
    model, examples = _memorized()
    config = FAST.updated(method="simu", lr=0.05, rehearsal=NUMBER, checkpoint_interval=3)
    told: list[tuple[str, int, int]] = []
    whole, killed, resumed, without, by_hand = (copy.deepcopy(model) for _ in range(5))
    expected = run(whole, examples, config, progress=lambda stage, done, total, note="": told.append((stage, total)))
    assert ("rehearse", NUMBER) in told
    run(killed, examples, config.updated(max_steps=3), checkpoint=tmp_path / "run")
    assert run(resumed, examples, config, checkpoint=tmp_path / "run").log == expected.log
    assert run(without, examples, config.updated(rehearsal=0)).log != expected.log
    written = rehearse(model, examples["retain"], NUMBER, forget=examples["forget"], batch_size=config.eval_batch_size)
    monkeypatch.setattr(driver, "rehearse", lambda *_, **__: written)
    assert run(by_hand, examples, config).log == expected.log
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_a_step_has_as_many_rehearsed_rows_as_retain_rows(seed) -> None:
    """By hand: each stream is drawn by itself, so that many rows of one do not crowd out the other."""
    forget, retain, written = ([Example((5, 10 * kind + row), (-100, row)) for row in range(5)] for kind in range(3))
    config = UnlearnConfig(seed=seed, forget_batch_size=2, retain_batch_size=3)
    stream = StepBatches(forget, retain, config, 0, torch.device("cpu"), written)
    assert len(stream.batch("forget", 7)["input_ids"]) == 2
    found = [stream.batch("retain", step)["input_ids"][:, 1].tolist() for step in range(5)]
    for start, kind in ((0, 1), (3, 2)):
        drawn = [each for batch in found for each in batch[start : start + 3]]
        # Five steps of three are each of the five rows three times.
        assert sorted(drawn) == sorted(3 * [10 * kind + row for row in range(5)])
    alone = StepBatches(forget, retain, config, 0, torch.device("cpu"))
    kept = [alone.batch("retain", step)["input_ids"][:, 1].tolist() for step in range(5)]
    assert kept == [each[:3] for each in found]


def test_codes_of_four_bits_are_not_packed_by_a_rehearsal(monkeypatch) -> None:
    """bitsandbytes packs them in the first pass without gradients, on some processors; none trains beside them then."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, examples = _memorized()
    model = quantized(copy.deepcopy(model), "4bit").to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    config = FAST.updated(method="simu", rehearsal=NUMBER, max_steps=2)
    assert run(model, examples, config).steps == 2


def test_a_model_that_predicts_nothing_finite_is_told_by_the_run() -> None:
    model, examples = _memorized()
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match="The loss of step 1 is nan"):
        run(model, examples, FAST.updated(method="simu", rehearsal=NUMBER))
