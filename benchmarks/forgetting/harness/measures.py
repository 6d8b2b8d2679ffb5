"""What is measured of a model: what it knows of each set, how far it moved, what it hides, what gives it away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.forgetting.cases import BATCH, Case
from torch_simu import attribute_neurons
from torch_simu.unlearning.data.batches import batches_in_order, evenly
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.metrics.generation import generate_answers
from torch_simu.unlearning.metrics.hiding import influence_change
from torch_simu.unlearning.metrics.lume import lume_figures
from torch_simu.unlearning.metrics.membership import membership_attacks, membership_auc
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.metrics.tofu import wrong_answers
from torch_simu.unlearning.metrics.truth_ratio import log_truth_ratio, truth_ratio_score

SHOWN = ("em", "es", "probability")
ATTRIBUTED = 24
"""Forget rows at most whose neurons are attributed."""


def measured(model: PreTrainedModel, case: Case) -> dict[str, Any]:
    """All measures of a model that a case has the rows for."""
    found, probabilities = known_of(model, case)
    found["moved"] = moved(model, case.model)
    found["influence"] = influence(model, case)
    if "unseen" in case.sets:
        found["membership"] = membership_auc(probabilities["forget"], probabilities["unseen"])
        found["attacks_on_membership"] = told(model, case)
    if "options" in case.rows:
        found["truth"] = truth(model, case)
    if any("task" in row.extra for row in case.rows.get("forget", ())):
        found["lume"] = lume(model, case)
    return found


def known_of(model: PreTrainedModel, case: Case) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """What a model knows of each set, and the probability of each row.

    EM, ES and probability; `whole`, the share of answers whose every token is the most probable after the true ones
    before it, which are those that greedy generation gives; and `kept`, of the probability that there was.
    """
    found, probabilities = {}, {}
    for name, examples in case.sets.items():
        scores = score_answers(model, examples, batch_size=BATCH)
        found[name] = {key: mean(scores[key]) for key in SHOWN}
        found[name]["whole"] = mean(each == 1.0 for each in scores["em"])
        found[name]["kept"] = kept(scores["probability"], case.known[name])
        found[name]["perplexity"] = math.exp(mean(scores["nll"]))
        probabilities[name] = scores["probability"]
    return found, probabilities


def kept(after: Sequence[float], before: Sequence[float]) -> float:
    """The mean over rows of the probability beside what it was, of which more is no gain."""
    return mean(min(1.0, new / old) for new, old in zip(after, before, strict=True))


def told(model: PreTrainedModel, case: Case) -> dict[str, float]:
    """What each membership attack tells of forget rows beside rows that nobody taught, by the area under the ROC."""
    rows = (case.sets["forget"], case.sets["unseen"])
    return membership_attacks(model, case.tokenizer, *rows, reference=case.retrained, batch_size=BATCH)


def moved(model: PreTrainedModel, start: PreTrainedModel) -> float:
    """The norm of all changes over the norm of all weights."""
    pairs = [(new.detach(), old.detach()) for new, old in zip(model.parameters(), start.parameters(), strict=True)]
    change = sum(float((new - old).double().square().sum()) for new, old in pairs)
    return (change / sum(float(old.double().square().sum()) for _, old in pairs)) ** 0.5


def influence(model: PreTrainedModel, case: Case) -> dict[str, float]:
    """What the neurons that supported forget answers have lost, and what others suppress now, by SSIUU's diagnostic."""
    rows = evenly(case.sets["forget"], ATTRIBUTED)
    change = influence_change(influences(case.model, rows), influences(model, rows))
    return {"lost": change.lost, "suppressing": change.suppressing, "hiding": change.hiding}


def influences(model: PreTrainedModel, rows: Sequence[Example]) -> Mapping[str, Tensor]:
    """The attribution of the answers' probability to every neuron, by one midpoint."""
    return attribute_neurons(
        model, batches_in_order(rows, ATTRIBUTED), objective="prob", steps=1, max_completeness_error=None
    ).scores


def truth(model: PreTrainedModel, case: Case) -> dict[str, Any]:
    """TOFU's truth ratios of the forget set: their score, and the logarithm of each row's, for the forget quality."""
    rows = case.rows["options"]
    right = [replace(row, answer=str(row.extra["paraphrased_answer"])) for row in rows]
    wrong = [replace(row, answer=text) for row in rows for text in wrong_answers(row)]
    examples = encode([*right, *wrong], case.tokenizer)
    nlls = score_answers(model, examples, batch_size=BATCH)["nll"]
    others = iter(nlls[len(rows) :])
    logs = [
        log_truth_ratio(nll, [next(others) for _ in wrong_answers(row)])
        for row, nll in zip(rows, nlls[: len(rows)], strict=True)
    ]
    return {"score": truth_ratio_score(logs, forget=True), "log_ratios": [round(each, 4) for each in logs]}


def lume(model: PreTrainedModel, case: Case) -> dict[str, Any]:
    """LUME's terms of the two tasks that are there, and their harmonic mean, from what the model generates."""
    texts = {
        name: generate_answers(model, case.tokenizer, case.sets[name], batch_size=BATCH)
        for name in ("forget", "retain")
    }
    return lume_figures({name: case.rows[name] for name in texts}, texts)
