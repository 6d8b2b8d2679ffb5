"""Verdict: whether a set is forgotten, by rules that the report states with their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_simu.unlearning.report.result import MethodResult

LIMIT = 0.1
"""The largest figure that counts as forgotten where no reference says what a model has that never saw the rows."""

ENDING = 0.2
"""The same of the extraction strength: the last words of an answer often follow from the others."""

TOLERANCE = 0.05
"""How far a figure may lie above that of the reference."""

_CONVENTION = "convention, without a reference"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: a figure and the limit that it may not exceed.

    Attributes:
        text: What is asked, in words.
        value: The figure; None: it was not measured.
        limit: The largest value that is allowed; None where there is no figure.
        basis: Where the limit comes from, or how the figure is measured where it was not.
        attack: Whether the figure is that of an attack.
    """

    text: str
    value: float | None
    limit: float | None
    basis: str
    attack: bool = False

    @property
    def missed(self) -> str:
        """The figure beside its limit, in words: "extraction strength 0.300, at most 0.200"."""
        what = self.text.rstrip(".").rpartition(": ")[2]
        where = f" after {self.text.split()[3]}" if self.attack else ""
        return f"{what}{where} {self.value:.3f}, at most {self.limit:.3f}"

    @property
    def met(self) -> bool | None:
        """Whether the figure is within the limit; None where there is none."""
        return None if self.value is None or self.limit is None else self.value <= self.limit

    def to_json(self) -> dict[str, object]:
        """Return the rule as JSON knows it."""
        return {"rule": self.text, "value": self.value, "limit": self.limit, "basis": self.basis, "met": self.met}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all rules come to.

    Attributes:
        word: "forgotten" (all rules are met, with attacks among them), "forgotten, attacks not measured", "hidden" (an
            attack brings back what is not said any more), or "not forgotten".
        sentence: The same in words.
        rules: The rules, in the order in which a report shows them.
    """

    word: str
    sentence: str
    rules: Sequence[Rule]

    def to_json(self) -> dict[str, object]:
        """Return the verdict as JSON knows it."""
        return {"word": self.word, "sentence": self.sentence, "rules": [rule.to_json() for rule in self.rules]}


def judge(
    after: MethodResult,
    *,
    before: MethodResult,
    reference: MethodResult | None = None,
    target: float | None = None,
    attacks: Mapping[str, str] | None = None,
) -> Verdict:
    """Say whether the set "forget" is forgotten.

    The rules: the mean probability of the answers is at most the target; extraction strength and the share of answers
    that are generated as they are, the probability after each attack, and the distance of membership inference from
    chance are at most `TOLERANCE` above those of the reference. Without a reference the limit is a convention, `LIMIT`
    or `ENDING`; of an attack it is the target, which is strict: also a model that never saw the rows learns something
    of them when others are taught. A reference that knows the rows more than half as well as the model did, above the
    target, sets no limit: it is no model that never saw them.

    Args:
        after: The figures of the model that forgot.
        before: Those of the model as it was.
        reference: Those of a model that never saw the rows.
        target: The mean forget probability that was asked for; None: `LIMIT`.
        attacks: Name -> what the attack does, for those that are made.

    Examples:
        >>> row = {"em": 0.2, "es": 0.0, "probability": 0.05, "qa_exact_match": 0.0}
        >>> judge(MethodResult({"forget": row}), before=MethodResult({"forget": row}), target=0.1).word
        'forgotten, attacks not measured'
    """
    goal = LIMIT if target is None else target
    asked = _CONVENTION if target is None else "the target that was asked for"
    known = before.sets["forget"]["probability"]
    ignored = reference is not None and reference.sets["forget"]["probability"] > (goal + known) / 2 > goal
    if ignored:
        reference = None
    found, beside = after.sets["forget"], None if reference is None else reference.sets["forget"]
    rules = [
        Rule("The true answers are not likely any more: mean probability.", found["probability"], goal, asked),
        _beside(
            "The beginning of an answer does not bring up its end: extraction strength.", found.get("es"), beside, "es"
        ),
        _beside(
            "Asked, the model does not write the true answer: share of the answers.",
            found.get("qa_exact_match"),
            beside,
            "qa_exact_match",
        ),
        _membership(after, reference),
    ]
    for name, what in (attacks or {}).items():
        value = (after.attack or {}).get(name, {}).get("probability")
        text = f"After the attack {name} ({what}): mean probability of other rows."
        floor = None if reference is None else (reference.attack or {}).get(name, {}).get("probability")
        limit = goal if floor is None else floor + TOLERANCE
        basis = f"{asked}; strict, without a reference" if floor is None else _above(floor)
        rules.append(Rule(text, value, limit, basis, attack=True))
    if not any(rule.attack for rule in rules):
        rules.append(Rule("After attacks, relearning above all.", None, None, "Call with --attack.", attack=True))
    return _summed_up(rules, known=known > goal, ignored=ignored)


def _beside(text: str, value: float | None, reference: Mapping[str, float] | None, name: str) -> Rule:
    floor = None if reference is None else reference.get(name)
    if floor is None:
        return Rule(text, value, ENDING if name == "es" else LIMIT, _CONVENTION)
    return Rule(text, value, floor + TOLERANCE, _above(floor))


def _membership(after: MethodResult, reference: MethodResult | None) -> Rule:
    text = "Forgotten rows look like rows never seen: distance of membership inference (AUC) from 0.5, chance."
    if after.membership is None:
        return Rule(text, None, None, "Call with --unseen, rows of the same kind that no model saw.")
    value = abs(after.membership - 0.5)
    if reference is None or reference.membership is None:
        return Rule(text, value, LIMIT, _CONVENTION)
    floor = abs(reference.membership - 0.5)
    return Rule(text, value, floor + TOLERANCE, _above(floor))


def _above(floor: float) -> str:
    return f"the reference's {floor:.3f}, and {TOLERANCE} above it"


def _summed_up(rules: Sequence[Rule], *, known: bool, ignored: bool) -> Verdict:
    failed = [rule for rule in rules if rule.met is False]
    unknown = "" if known else " The model did not know the rows well before either."
    if ignored:
        unknown += " The reference knows the rows itself, so it sets no limit here."
    told = "; ".join(rule.missed for rule in failed if not rule.attack)
    if told:
        said = f"Not forgotten: merely asked, and without any attack, the model still tells too much ({told})."
        return Verdict("not forgotten", said + unknown, rules)
    if failed:
        worst = max(failed, key=lambda rule: (rule.value or 0.0) - (rule.limit or 0.0))
        said = (
            "Hidden rather than forgotten: asked, the model does not say it any more; an attack brings more back than "
            f"the limit allows ({worst.missed}). Treat the model as one that holds the data."
        )
        return Verdict("hidden", said + unknown, rules)
    if any(rule.attack and rule.met for rule in rules):
        said = "Forgotten, as far as it was measured: every figure is within its limit, also after the attacks below."
        return Verdict("forgotten", said + unknown, rules)
    said = "Forgotten when asked. What comes back under attack was not measured, so this is no proof of erasure."
    return Verdict("forgotten, attacks not measured", said + unknown, rules)
