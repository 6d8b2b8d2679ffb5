"""A verdict follows from its rules: each compares a figure with the limit that it states."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torch_simu.unlearning.report.result import MethodResult
from torch_simu.unlearning.report.verdict import ENDING, LIMIT, TOLERANCE, Verdict, judge

shares = st.floats(0, 1)
KEYS = ("probability", "es", "qa_exact_match")
WHAT = {"relearn": "learning again", "round_8bit": "rounding"}
KNOWN = MethodResult({"forget": dict.fromkeys(KEYS, 1.0)})


@st.composite
def results(draw: st.DrawFn, known: st.SearchStrategy[float] = shares) -> MethodResult:
    attack = {name: {"probability": draw(shares), "es": draw(shares)} for name in WHAT if draw(st.booleans())}
    membership = draw(st.none() | shares)
    return MethodResult(
        {"forget": {key: draw(known if key == "probability" else shares) for key in KEYS}},
        attack=attack or None,
        membership=membership,
    )


def made(after: MethodResult) -> dict[str, str]:
    return {name: WHAT[name] for name in after.attack or {}}


@given(results(), st.none() | results(), st.none() | shares)
def test_the_word_follows_from_the_rules_and_no_rule_from_elsewhere(after, reference, target) -> None:
    verdict = judge(after, before=KNOWN, reference=reference, target=target, attacks=made(after))
    asked = [rule.met for rule in verdict.rules if not rule.attack]
    attacked = [rule.met for rule in verdict.rules if rule.attack]
    expected = "forgotten" if True in attacked else "forgotten, attacks not measured"
    if False in attacked:
        expected = "hidden"
    if False in asked:
        expected = "not forgotten"
    assert verdict.word == expected
    assert all((rule.met is None) == (rule.value is None) == (rule.limit is None) for rule in verdict.rules)
    assert all(rule.met == (rule.value <= rule.limit) for rule in verdict.rules if rule.value is not None)


@given(results(), results(st.floats(0, 0.49)), shares)
def test_limits_are_the_target_and_the_reference_with_its_tolerance(after, reference, target) -> None:
    rules = judge(after, before=KNOWN, reference=reference, target=target, attacks=made(after)).rules
    floors = [reference.sets["forget"][key] + TOLERANCE for key in KEYS[1:]]
    assert [rule.limit for rule in rules[:3]] == [target, *floors]
    assert [rule.value for rule in rules[:3]] == [after.sets["forget"][key] for key in KEYS]
    for rule, name in zip([rule for rule in rules if rule.attack and rule.value is not None], made(after), strict=True):
        floor = (reference.attack or {}).get(name)
        assert rule.limit == (target if floor is None else floor["probability"] + TOLERANCE)
        assert rule.value == after.attack[name]["probability"] and name in rule.text


@given(results())
def test_without_target_and_reference_the_limits_are_conventions_that_say_so(after) -> None:
    rules = judge(after, before=KNOWN, attacks=made(after)).rules
    assert [rule.limit for rule in rules[:3]] == [LIMIT, ENDING, LIMIT]
    assert all("without a reference" in rule.basis for rule in rules if rule.value is not None)


@given(results(), st.sampled_from([*KEYS]))
def test_more_of_the_set_never_makes_a_verdict_better(after, key) -> None:
    order = ["not forgotten", "hidden", "forgotten, attacks not measured", "forgotten"]
    worse = MethodResult(
        {"forget": {**after.sets["forget"], key: 1.0}}, attack=after.attack, membership=after.membership
    )
    one, two = (judge(each, before=KNOWN, attacks=made(after)) for each in (after, worse))
    assert order.index(two.word) <= order.index(one.word)


def test_membership_counts_from_chance_to_both_sides() -> None:
    low = {"forget": dict.fromkeys(KEYS, 0.0)}

    def judged(auc: float | None) -> Verdict:
        return judge(MethodResult(low, membership=auc), before=KNOWN)

    assert [judged(auc).word for auc in (0.0, 1.0)] == ["not forgotten"] * 2
    assert judged(0.45).word == judged(0.55).word == judged(None).word == "forgotten, attacks not measured"
    assert any("--unseen" in rule.basis for rule in judged(None).rules)


def test_a_reference_that_knows_the_rows_sets_no_limit_and_is_named() -> None:
    low = MethodResult({"forget": dict.fromkeys(KEYS, 0.01)})
    with_base = judge(low, before=KNOWN, reference=KNOWN, target=0.1)
    assert [rule.limit for rule in with_base.rules[:3]] == [0.1, ENDING, LIMIT]
    assert "The reference knows the rows itself" in with_base.sentence
    assert "The reference" not in judge(low, before=KNOWN, reference=low, target=0.1).sentence


def test_a_model_that_never_knew_the_rows_is_named() -> None:
    low = MethodResult({"forget": dict.fromkeys(KEYS, 0.01)})
    assert "did not know the rows well before" in judge(low, before=low).sentence
    assert "did not know" not in judge(low, before=KNOWN).sentence


@given(results(), st.none() | results())
def test_what_is_not_forgotten_is_named_with_its_figure_and_its_limit(after, reference) -> None:
    verdict = judge(after, before=KNOWN, reference=reference, target=LIMIT, attacks=made(after))
    failed = [rule for rule in verdict.rules if rule.met is False]
    asked = [rule for rule in failed if not rule.attack]
    for rule in asked:
        assert f"{rule.value:.3f}, at most {rule.limit:.3f}" in verdict.sentence
    if failed and not asked:
        worst = max(failed, key=lambda rule: rule.value - rule.limit)
        name = next(name for name in WHAT if f"attack {name} " in worst.text)
        assert f"after {name} {worst.value:.3f}, at most {worst.limit:.3f}" in verdict.sentence
    assert failed or " at most " not in verdict.sentence
