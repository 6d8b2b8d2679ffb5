"""The harness: masks of one size, rows that give nothing away, runs that go on where they stopped."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.forgetting import __main__ as all_cells
from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.contenders import (
    CONTENDERS,
    DEFAULT,
    SHARE,
    anywhere,
    attention,
    everywhere,
    linear_layers,
    third_by_dual,
    third_by_gradient_activation,
)
from benchmarks.forgetting.harness.measures import influence, measured, moved
from benchmarks.forgetting.harness.rows import documents, side_by_side
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.shapes import SHAPES
from benchmarks.forgetting.harness.targets import TARGETS, TUNABLE, case_of, tuned
from benchmarks.forgetting.harness.taught import memorizing
from benchmarks.forgetting.harness.tracing import EVERY, Trace
from benchmarks.forgetting.lasting import attacked, best_rate, configured, file_of, lifted
from torch_simu.curvature import scored_logits
from torch_simu.layers import attention_projections, down_projections, neuron_weight
from torch_simu.unlearning.attack.rows import split_rows
from torch_simu.unlearning.config import UnlearnConfig, own_choices
from torch_simu.unlearning.data.examples import collate
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import answer_logits


@pytest.fixture(scope="module")
def case() -> Case:
    """A few people in a tiny Llama."""
    return case_of("quick", "llama", 0, None, None)


def weights_of(model, selection) -> int:
    """How many weights a selection trains."""
    layers = {name: neuron_weight(model.get_submodule(name)) for name in selection}
    return sum(len(selection[name]) * weight.numel() // selection.num_neurons[name] for name, weight in layers.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_controls_train_as_many_weights_as_the_default(shape: str) -> None:
    model = SHAPES[shape](40, 64, 2)
    made = Case({}, model, None, batch_size=1)
    default = sum(neuron_weight(layer).numel() for layer in down_projections(model).values())
    assert weights_of(model, anywhere(made, 0)) == pytest.approx(default, rel=0.02)
    assert anywhere(made, 0) == anywhere(made, 0) != anywhere(made, 1)
    assert weights_of(model, attention(made, 0)) == default
    assert set(attention(made, 0)) == set(attention_projections(model))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_is_all_of_a_block_but_its_norms(shape: str) -> None:
    model = SHAPES[shape](40, 64, 2)
    blocks = {name: param.numel() for name, param in model.named_parameters() if ".layers." in name or ".h." in name}
    matrices = sum(
        count for name, count in blocks.items() if "norm" not in name and "ln_" not in name and "bias" not in name
    )
    assert weights_of(model, everywhere(Case({}, model, None, batch_size=1), 0)) == matrices
    assert "lm_head" not in linear_layers(model)


def test_dual_neurons_are_dropped_or_alone_and_no_neuron_is_both(case: Case) -> None:
    without, alone = (third_by_dual(dual)(case, 0) for dual in ("drop", "isolate"))
    assert not (without & alone).num_selected and without.num_selected and alone.num_selected
    for layer in without:
        assert len(without[layer]) + len(alone[layer]) == round(SHARE * without.num_neurons[layer])


def test_gradient_x_activation_chooses_what_scaling_a_column_changes_most(case: Case) -> None:
    chosen = third_by_gradient_activation(case, 0)
    model, rows = copy.deepcopy(case.model), case.sets["forget"]
    batch = collate(rows, 0)
    with torch.no_grad():
        for layer, places in chosen.items():
            weight, found = model.get_submodule(layer).weight, []
            assert len(places) == round(SHARE * weight.shape[1])
            for column in range(weight.shape[1]):
                # The derivative of the log-likelihood by a column's scale, by central differences.
                kept, likelihoods = weight[:, column].clone(), []
                for scale in (1.05, 0.95):
                    weight[:, column] = scale * kept
                    logits, labels = scored_logits(answer_logits(model, batch), batch["labels"])
                    likelihoods.append(-torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
                weight[:, column] = kept
                found.append(likelihoods[0] - likelihoods[1])
            expected = torch.stack(found).topk(len(places)).indices
            assert len(set(expected.tolist()) & set(places.tolist())) >= 0.9 * len(places)


def document(name: str, questions: int, answer: str, task: str = "Task2") -> list[Row]:
    """A document of LUME: a text to complete and questions about it."""
    kinds = ["sc1", *(f"qa{number}" for number in range(questions))]
    return [Row(f"{name} {kind}?", answer, {"id": f"{name}{kind}", "task": task}) for kind in kinds]


def test_an_attacker_is_shown_no_row_of_a_document_that_is_scored() -> None:
    rows = side_by_side([document(name, 2, "x") for name in "abcdef"])
    attacker, scored = split_rows(rows, every=3)
    names = [{row.question[0] for row in part} for part in (attacker, scored)]
    assert names == [{"a", "d"}, {"b", "c", "e", "f"}]
    assert len(rows) == len(set(rows)) == 18


def test_documents_with_short_answers_come_first_and_none_comes_twice() -> None:
    rows = [row for name, answer in (("a", "long"), ("b", "s"), ("c", "mid")) for row in document(name, 1, answer)]
    found = documents([*rows, *document("d", 0, "story", task="Task1")])
    assert [each[0].question[0] for each in found["Task2"]] == ["b", "c", "a"]
    assert list(found["Task2"]) == []
    assert [[row.question[0] for row in each] for each in found["Task1"]] == [["d"]]


def test_a_model_that_did_not_change_has_not_moved(case: Case) -> None:
    assert moved(case.model, case.model) == 0.0
    trace = Trace(case.model, case)
    trace("unlearn", 12, 24)
    trace("unlearn", 13, 24)
    trace("attribute forget", 12, 24)
    (point,) = trace.beside([{"step": 12, "forget_probability": 0.5}])
    assert point["step"] == 12 and point["forget"] == 0.5
    for name in ("retain", "world"):
        assert point[name]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert point[name]["kept"] == pytest.approx(1.0, abs=1e-6)


def test_how_far_a_model_moved_is_the_norm_of_its_changes(case: Case) -> None:
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.1)
    assert moved(model, case.model) == pytest.approx(0.1, rel=1e-4)


def test_the_divergence_of_a_trace_is_that_of_its_rows_one_by_one(case: Case) -> None:
    model = copy.deepcopy(case.model)
    trace = Trace(model, case)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)
    trace("unlearn", 24, 24)
    (point,) = trace.beside([{"step": 24, "forget_probability": 0.1}])
    total, count = 0.0, 0
    for row in case.sets["world"][::EVERY]:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            old, new = (each(ids).logits[0].log_softmax(-1) for each in (case.model, model))
        for place in range(len(row.prompt_ids) - 1, len(row.input_ids) - 1):
            total += float((old[place].exp() * (old[place] - new[place])).sum())
            count += 1
    assert point["world"]["kl"] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("name", ["SOUL's steps, all weights, bounded", "LoRA, bounded"])
def test_a_loop_leaves_a_plain_model_that_is_what_was_measured_last(case: Case, name: str) -> None:
    before = copy.deepcopy(case.model.state_dict())
    contender = CONTENDERS[name]
    config = configured(case, TARGETS["quick"], 0, contender, lr=1e-3, max_steps=6)
    model, row = forgotten(case, contender, config)
    assert [type(module) for module in model.modules()] == [type(module) for module in case.model.modules()]
    found = score_answers(model, case.sets["forget"])["probability"]
    assert row["trace"][-1]["step"] == row["steps"]
    assert row["trace"][-1]["forget"] == pytest.approx(sum(found) / len(found), rel=1e-3)
    assert moved(model, case.model) > 0
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


@pytest.mark.parametrize("name", ["SOUL's steps, all weights, bounded", "LoRA, bounded"])
def test_a_paced_loop_begins_with_a_hundredth_of_its_step_size(case: Case, name: str) -> None:
    contender = CONTENDERS[name]
    distances = []
    for paced, lr in ((True, 1e-2), (False, 1e-4)):
        # Measured once, at its end, so that no step size changed yet.
        choices = {**contender.choices, "lr": lr, "paced": paced, "max_steps": 3, "eval_interval": 3}
        model, _ = forgotten(case, contender, configured(case, TARGETS["quick"], 0, contender, **choices), traced=False)
        distances.append(moved(model, case.model))
    assert distances[0] == pytest.approx(distances[1]) and distances[0] > 0


def test_a_paced_loop_takes_longer_steps_where_little_is_forgotten(case: Case) -> None:
    contender = CONTENDERS["SOUL's steps, all weights, bounded"]
    distances = []
    for paced, lr in ((True, 1e-6), (False, 1e-8)):
        choices = {**contender.choices, "lr": lr, "paced": paced, "max_steps": 6, "eval_interval": 1}
        model, _ = forgotten(case, contender, configured(case, TARGETS["quick"], 0, contender, **choices), traced=False)
        distances.append(moved(model, case.model))
    # Of six steps the last four are longer by half each time: 1 1 1.5 2.25 3.38 5.06.
    assert distances[0] > 1.5 * distances[1]


def test_where_one_step_size_is_left_nothing_is_tried(case: Case) -> None:
    target = TARGETS["quick"]._replace(rates={"shares": (0.25,)})
    assert best_rate(case, target, CONTENDERS["simu"]) == (0.25, [])


@pytest.mark.parametrize("name", TUNABLE)
def test_a_tuned_cell_has_tries_and_no_pace_and_a_file_of_its_own(name: str) -> None:
    paced, fixed = TARGETS[name], tuned(TARGETS[name])
    assert paced.shared["paced"] and all(len(rates) == 1 for rates in paced.rates.values())
    assert not fixed.shared["paced"] and all(len(set(rates)) == 3 for rates in fixed.rates.values())
    assert file_of(name, "gpt2", tries=True) == f"lasting_{name}_gpt2_tuned_cpu_202611.json"
    assert file_of(name, "gpt2") == f"lasting_{name}_gpt2_cpu_202611.json"


def test_the_contender_that_is_called_the_default_is_that_of_the_package(case: Case) -> None:
    config = configured(case, TARGETS["tofu"], 0, CONTENDERS[DEFAULT], lr=TARGETS["tofu"].rates["shares"][0])
    usual = own_choices("simu") | {name: getattr(UnlearnConfig(), name) for name in ("adversary_lr", "rehearsal")}
    assert {name: getattr(config, name) for name in usual} == usual


def test_what_near_rows_lift_is_what_teaching_forgotten_ones_lifts_where_they_are_the_same(case: Case) -> None:
    config = TARGETS["quick"].attack
    taught, scored = split_rows(case.sets["forget"], every=config.attacker_every)
    same = replace(case, sets={**case.sets, "near": taught + case.sets["world"]})
    assert lifted(case.model, same, config) == pytest.approx(attacked(case.model, same, config))
    other = replace(case, sets={**case.sets, "near": case.sets["world"]})
    assert lifted(case.model, other, config) != pytest.approx(attacked(case.model, other, config))
    with pytest.raises(ValueError, match="scored"):
        lifted(case.model, replace(case, sets={**case.sets, "near": scored}), config)


def test_a_model_that_was_taught_is_read_from_its_folder(tmp_path: Path, case: Case) -> None:
    made = []

    def make():
        made.append(SHAPES["llama"](1000, 8, 1))
        return made[-1]

    first, second = (memorizing(tmp_path / "model", case.sets["world"][:2], make) for _ in range(2))
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == ["model"]
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cell_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    out = tmp_path / file_of("quick", shape)

    def run(*more: str) -> dict:
        words = ["forgetting", "--quick", "--out", str(tmp_path), "--contenders", "first order, all weights, bounded"]
        monkeypatch.setattr(sys, "argv", [*words, *more])
        monkeypatch.setattr(all_cells, "SHAPES", (shape,))
        all_cells.main()
        return json.loads(out.read_text())

    first = run("simu")
    assert [row["method"] for row in first["rows"]] == [
        "before",
        "retrained",
        "first order, all weights, bounded",
        "simu",
    ]
    assert all(row["forget"]["probability"] <= 0.5 for row in first["rows"] if row.get("reached"))
    # A row of an older file, with few measures, stays as it is.
    first["rows"][-1] = {"seed": 0, "method": "simu", "forget": {"probability": 0.25}, "back": {"probability": 0.5}}
    del first["rows"][2]
    out.write_text(json.dumps(first))
    again = run("simu")
    assert [row["method"] for row in again["rows"]] == [
        "before",
        "retrained",
        "simu",
        "first order, all weights, bounded",
    ]
    assert again["rows"][:3] == first["rows"] and again["tries"] == first["tries"]


def test_what_a_row_lacks_is_not_measured(case: Case) -> None:
    found = measured(case.model, case)
    assert {"moved", "influence", "forget", "retain", "world"} == set(found)
    assert found["retain"]["kept"] == pytest.approx(1.0)
    assert found["influence"] == {"lost": 0.0, "suppressing": 0.0, "hiding": 0.0}


def test_a_model_whose_neurons_write_the_opposite_hides(case: Case) -> None:
    silent, turned = copy.deepcopy(case.model), copy.deepcopy(case.model)
    with torch.no_grad():
        for factor, model in ((0.0, silent), (-1.0, turned)):
            for layer in down_projections(model).values():
                neuron_weight(layer).mul_(factor)
    # What writes nothing has no influence, so that all is erased and nothing hides it.
    assert influence(silent, case) == {"lost": 1.0, "suppressing": 0.0, "hiding": 0.0}
    assert influence(turned, case)["suppressing"] > 0
