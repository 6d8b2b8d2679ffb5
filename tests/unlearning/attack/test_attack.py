"""An attack on a copy says what comes back of the rows that the attacker does not have, and changes nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tests.models import tiny
from tests.unlearning.attack.bigram import FORGET, SIZE, A, B, Bigrams, brought_back, learned, row
from tests.unlearning.test_driver import _memorized
from torch_simu.unlearning.attack import attack as module
from torch_simu.unlearning.attack import teaching
from torch_simu.unlearning.attack.attack import attack_model, relearning
from torch_simu.unlearning.attack.config import ATTACKS, AttackConfig
from torch_simu.unlearning.data.examples import Example

ONE = AttackConfig(rates=(1.0,), steps=1)


def relearned(model, config=ONE, forget=FORGET):
    return attack_model(model, forget, attacks=["relearn"], config=config)["relearn"]


def the_worst_is_that_of_the_best_rate_on_rows_that_were_not_taught() -> None:
    found = relearned(Bigrams(), AttackConfig(rates=(1.0, 0.5), steps=1))
    assert [point.rate for point in found.trace] == [1.0, 0.5]
    assert found.probability == pytest.approx(brought_back(1.0), rel=1e-5)
    assert found.es == 0.5


def test_one_step_brings_back_what_is_known_in_closed_form() -> None:
    found = relearned(Bigrams())
    assert found.before.probability == pytest.approx(1 / SIZE) and found.before.es == 0.0
    assert (found.num_taught, found.num_scored) == (2, 4)
    the_worst_is_that_of_the_best_rate_on_rows_that_were_not_taught()


def test_many_steps_bring_back_all_that_the_rows_share_and_no_more() -> None:
    found = relearned(Bigrams(), AttackConfig(rates=(1.0,), steps=100, interval=30))
    assert [point.step for point in found.trace] == [30, 60, 90, 100]
    assert found.trace[-1].probability == pytest.approx(math.sqrt(1 / SIZE), rel=1e-3)


def test_an_attack_that_is_scored_on_the_rows_it_taught_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "split_rows", lambda forget, every: (forget[::every], forget[::every]))
    for each in (module, teaching):
        monkeypatch.setattr(each, "check_unscored", lambda taught, scored: None)
    with pytest.raises(AssertionError):
        the_worst_is_that_of_the_best_rate_on_rows_that_were_not_taught()


def test_an_attack_that_measures_the_last_step_only_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "teach", lambda *args, **options: teaching.teach(*args, **options)[-1:])
    with pytest.raises(AssertionError):
        the_worst_is_that_of_the_best_rate_on_rows_that_were_not_taught()


def test_an_attack_that_goes_on_from_the_rate_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    both = AttackConfig(rates=(1.0, 0.5), steps=1)
    assert relearned(Bigrams(), both).trace[1].probability == pytest.approx(brought_back(0.5), rel=1e-5)
    monkeypatch.setattr(teaching.ModelCopy, "restore", lambda self: None)
    assert relearned(Bigrams(), both).trace[1].probability > brought_back(1.0)


def test_the_worst_of_each_measure_is_the_largest_of_the_trace_at_whatever_step() -> None:
    # Taught to end otherwise, the model is asked for what it is taught no longer.
    model = Bigrams()
    found = attack_model(
        model,
        FORGET,
        retain=[row(9, A, 4)],
        attacks=["fine_tune"],
        config=AttackConfig(rates=(1.0, 1e-3), steps=4, interval=1),
    )["fine_tune"]
    assert len(found.trace) == 8
    assert found.probability == max(point.probability for point in found.trace) > found.trace[3].probability
    assert found.es == max(point.es for point in found.trace)
    # At the small rate it is nearly as before.
    assert found.probability == pytest.approx(1 / SIZE, rel=1e-2)


def test_fine_tuning_on_retain_rows_and_on_text_teaches_those_rows_only() -> None:
    found = attack_model(Bigrams(), FORGET, [row(9)], text=[row(10, 11)], config=ONE)
    assert found["fine_tune"].probability == pytest.approx(brought_back(1.0), rel=1e-5)
    assert found["fine_tune_text"].probability == pytest.approx(1 / SIZE)
    assert (found["fine_tune"].num_taught, found["fine_tune_text"].num_taught) == (1, 1)
    assert list(found) == list(ATTACKS)


def test_the_norm_of_the_gradient_is_clipped_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steep(Bigrams):
        def forward(self, input_ids, attention_mask, use_cache):
            return SimpleNamespace(logits=100 * self.table[input_ids])

    # Whose first step, unlike AdamW's, is as long as the gradient.
    monkeypatch.setattr(teaching, "AdamW", torch.optim.SGD)
    copied = teaching.ModelCopy(Steep())
    teaching.teach(copied, FORGET[:1], FORGET[1:], config=AttackConfig(rates=(0.5,), steps=1))
    assert copied.model.table.norm().item() == pytest.approx(0.5, rel=1e-5)


def test_weights_do_not_decay() -> None:
    model = Bigrams()
    with torch.no_grad():
        model.table[12:] = 5.0
    copied = teaching.ModelCopy(model)
    teaching.teach(copied, FORGET[:1], FORGET[1:], config=AttackConfig(rates=(0.5,), steps=3))
    assert torch.equal(copied.model.table[12:], model.table[12:])
    assert copied.model.table[A, B] > 1.0


def test_the_same_seed_gives_the_same_figures_and_another_seed_others() -> None:
    model, examples = _memorized()
    results = []
    for seed in (0, 0, 1):
        config = AttackConfig(rates=(1e-2,), steps=4, interval=1, batch_size=2, seed=seed)
        results.append(attack_model(model, examples["forget"], examples["retain"], config=config))
    assert results[0] == results[1]
    assert results[0]["relearn"].trace != results[2]["relearn"].trace
    assert results[0]["few_shots"].trace != results[2]["few_shots"].trace


def test_shots_that_do_not_fit_are_left_out_and_without_one_the_attack_is_skipped() -> None:
    long = tiny("gpt2", n_positions=9)
    rows = [Example((1, 5 + i, 7, 8), (-100, 5 + i, 7, 8)) for i in range(6)]
    assert len(attack_model(long, rows, attacks=["few_shots"])["few_shots"].trace) == 1
    found = attack_model(tiny("gpt2", n_positions=7), rows, attacks=["few_shots"])["few_shots"]
    assert found.skipped == "no row fits before another one" and found.trace == ()
    with pytest.raises(ValueError, match=r"The attack has no figures \(no row fits"):
        _ = found.worst


def test_rates_at_which_nothing_is_finite_are_said_and_do_not_count() -> None:
    model = Bigrams()
    with torch.no_grad():
        model.table[A] = math.nan
    found = relearned(model)
    assert "not finite at any rate" in found.skipped
    assert relearning({"relearn": found}) == ""


def test_the_sentence_names_rows_and_the_floor() -> None:
    found = {"relearn": relearned(Bigrams())}
    said = f"Relearning 2 rows brings the other 4 back to a probability of {brought_back(1.0):.3f} (without: 0.062"
    assert (
        relearning(found).startswith(f"{said})") and relearning(found, reference=0.5) == f"{said}; reference: 0.500)."
    )


def test_progress_ends_at_the_whole_of_each_attack() -> None:
    told = {}
    attack_model(
        Bigrams(),
        FORGET,
        config=AttackConfig(rates=(1.0, 0.5), steps=3),
        progress=lambda stage, done, total, note="": told.update({stage: (done, total)}),
    )
    assert told == {
        "attack relearn": (6, 6),
        "attack relearn_low_rank": (6, 6),
        **{f"attack {name}": (1, 1) for name in ("round_8bit", "round_4bit", "few_shots")},
    }


def test_what_is_known_of_the_bigrams_is_right() -> None:
    assert learned(0.0) == pytest.approx(1 / SIZE) and brought_back(0.0) == pytest.approx(1 / SIZE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attack_model(Bigrams(), []), "The forget set has 0 different rows, expected at least two"),
        (lambda: attack_model(Bigrams(), FORGET[:1] * 3), "The forget set has 1 different row, expected at least two"),
        (lambda: attack_model(Bigrams(), FORGET, attacks=["fine_tune"]), "The attack 'fine_tune' has no retain rows"),
        (lambda: attack_model(Bigrams(), FORGET, attacks=["fine_tune_text"]), "'fine_tune_text' has no text rows"),
        (lambda: attack_model(Bigrams(), FORGET, attacks=[]), r"attacks is \[\]"),
        (lambda: attack_model(Bigrams(), FORGET, attacks="relearn"), "attacks is 'relearn'"),
        (lambda: attack_model(Bigrams(), FORGET, attacks=["relern"]), "attack is 'relern'.*Did you mean 'relearn'"),
        (lambda: attack_model(Bigrams(), FORGET, FORGET[1:2]), "1 of the rows that are taught are among those"),
        (lambda: attack_model(Bigrams().to("meta"), FORGET), "Parameter 'table' is on the meta device"),
        (lambda: AttackConfig(rates=()), r"rates is \(\), expected at least one learning rate"),
        (lambda: AttackConfig(rates=(1e-4, 0.0)), r"rates\[1\] is 0.0, expected a finite number in \(0, inf\)"),
        (lambda: AttackConfig(rates=(math.nan,)), r"rates\[0\] is nan"),
        (lambda: AttackConfig(steps=0), "steps is 0"),
        (lambda: AttackConfig(interval=0), "interval is 0"),
        (lambda: AttackConfig(attacker_every=1), "attacker_every is 1, expected a whole number >= 2"),
        (lambda: AttackConfig(seed=-1), "seed is -1"),
    ],
)
def test_what_is_wrong_is_said_with_its_value(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="float32 is 1, expected True or False"):
        AttackConfig(float32=1)
