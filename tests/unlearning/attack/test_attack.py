"""An attack on a copy says what comes back of the rows that the attacker does not have, and changes nothing else."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.models import tiny
from tests.unlearning.attack.bigram import FORGET, SIZE, A, B, Bigrams, brought_back, learned, row
from tests.unlearning.test_driver import _memorized
from torch_simu import NeuronSelection, attach_deltas, merge_deltas
from torch_simu.unlearning.attack import attack as module
from torch_simu.unlearning.attack import teaching
from torch_simu.unlearning.attack.attack import attack_model, relearning
from torch_simu.unlearning.attack.config import ATTACKS, AttackConfig
from torch_simu.unlearning.attack.rounding import rounded_to_4_bits, rounded_to_8_bits
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.metrics.scoring import score_answers

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


def test_nothing_of_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = _memorized()
    model = copy.deepcopy(model).train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: param.requires_grad for name, param in model.named_parameters()}

    def check() -> None:
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert {name: param.requires_grad for name, param in model.named_parameters()} == flags
        assert all(module.training for module in model.modules())
        assert torch.equal(model.model.norm.weight.grad, torch.ones_like(model.model.norm.weight))
        assert model.lm_head.weight.grad is None

    random = torch.get_rng_state()
    attack_model(model, examples["forget"], examples["retain"], config=AttackConfig(rates=(1e-2,), steps=2))
    check()
    assert torch.equal(torch.get_rng_state(), random)
    calls = []

    def fails(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return teaching_loss(*arguments)

    teaching_loss = teaching.mean_answer_nll
    monkeypatch.setattr(teaching, "mean_answer_nll", fails)
    with pytest.raises(RuntimeError, match="stopped"):
        attack_model(model, examples["forget"], config=AttackConfig(rates=(1e-2,), steps=5))
    check()


def test_one_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    made = copy.deepcopy
    monkeypatch.setattr(
        "torch_simu.unlearning.attack.copies.copy.deepcopy", lambda each: copies.append(1) or made(each)
    )
    attack_model(Bigrams(), FORGET, [row(9)], config=AttackConfig(rates=(1.0, 0.1), steps=2))
    assert len(copies) == 1


def test_the_same_seed_gives_the_same_figures_and_another_seed_others() -> None:
    model, examples = _memorized()
    results = []
    for seed in (0, 0, 1):
        config = AttackConfig(rates=(1e-2,), steps=4, interval=1, batch_size=2, seed=seed)
        results.append(attack_model(model, examples["forget"], examples["retain"], config=config))
    assert results[0] == results[1]
    assert results[0]["relearn"].trace != results[2]["relearn"].trace
    assert results[0]["few_shots"].trace != results[2]["few_shots"].trace


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rounding_is_that_of_every_matrix_with_deltas_merged(kind: str) -> None:
    model = tiny(kind)
    rows = [Example((1, 5 + i, 7), (-100, 5 + i, 7)) for i in range(4)]
    generator = torch.Generator().manual_seed(0)
    deltas = attach_deltas(model, NeuronSelection.random(model, 0.2, generator))
    for delta in deltas.values():
        nn.init.normal_(delta, std=0.2, generator=generator)
    found = attack_model(model, rows, attacks=["round_8bit", "round_4bit"])
    for name, rounded in (("round_8bit", rounded_to_8_bits), ("round_4bit", rounded_to_4_bits)):
        twin = copy.deepcopy(model)
        merge_deltas(twin)
        with torch.no_grad():
            for layer in twin.modules():
                turned = type(layer).__name__ == "Conv1D"
                for param in layer.parameters(recurse=False):
                    if param.dim() > 1 and not getattr(param, "done", False):
                        param.copy_(rounded(param.T).T if turned else rounded(param))
                        param.done = True
        scores = score_answers(twin, rows[1:3])
        assert found[name].probability == pytest.approx(sum(scores["probability"]) / 2, rel=1e-5)
        assert found[name].probability != pytest.approx(found[name].before.probability, rel=1e-5)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_of_a_quantized_model_deltas_and_float_weights_relearn_and_codes_stay(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    from tests.quantized import quantized
    from torch_simu.bitsandbytes.layers import fingerprint
    from torch_simu.bitsandbytes.packing import keep_codes_as_loaded
    from torch_simu.deltas import attached_layers

    base, examples = _memorized()
    model = quantized(base, kind)
    keep_codes_as_loaded(model)
    generator = torch.Generator().manual_seed(0)
    for delta in attach_deltas(model, NeuronSelection.random(model, 0.2, generator)).values():
        nn.init.normal_(delta, std=0.3, generator=generator)
    before = {name: (fingerprint(layer), layer.delta.clone()) for name, layer in attached_layers(model).items()}
    found = attack_model(model, examples["forget"], config=AttackConfig(rates=(1e-2,), steps=10))
    assert found["round_8bit"].skipped == found["round_4bit"].skipped == "its weights are codes already"
    assert found["relearn"].probability > found["relearn"].before.probability + 0.1
    for name, layer in attached_layers(model).items():
        assert fingerprint(layer) == before[name][0] and torch.equal(layer.delta, before[name][1])
    copied = teaching.ModelCopy(model)
    deltas = [layer.delta for layer in attached_layers(copied.model).values()]
    assert {id(param) for param in copied.trained} >= {id(delta) for delta in deltas}
    assert all(param.is_floating_point() for param in copied.trained)


def test_half_precision_is_attacked_in_float32_because_small_steps_are_lost_to_rounding() -> None:
    model = Bigrams(torch.bfloat16)
    with torch.no_grad():
        model.table[A] = 4.0
    lost, made = (relearned(model, AttackConfig(rates=(1e-3,), steps=5, float32=float32)) for float32 in (False, True))
    assert lost.probability == lost.before.probability
    assert made.probability > made.before.probability
    assert model.table.dtype == torch.bfloat16


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
