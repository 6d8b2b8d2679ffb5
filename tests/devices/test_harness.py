"""On a GPU the benchmark of forgetting has its models there, and measures what it does on the processor."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.forgetting import lasting
from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.harness.contenders import CONTENDERS
from benchmarks.forgetting.harness.measures import measured
from benchmarks.forgetting.harness.running import forgotten
from benchmarks.forgetting.harness.targets import TARGETS, case_of

pytestmark = pytest.mark.gpu
QUICK = TARGETS["quick"]


@pytest.fixture
def case() -> Case:
    """A few people in a tiny Llama, on the processor."""
    found = case_of("quick", "llama", 0, None, None)
    return replace(found, model=copy.deepcopy(found.model), retrained=copy.deepcopy(found.retrained))


def test_a_cell_has_its_models_on_the_device(gpu, case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "case_of", lambda *names: case)
    cell = lasting.Cell("quick", "llama", None, None, tmp_path / "cell.json", device=str(gpu))
    cell.run([], [0])
    assert {model.device.type for model in (case.model, case.retrained) if model is not None} == {gpu.type}


@pytest.mark.parametrize(
    "name", ["simu", "attention only", "SOUL's steps, all weights, bounded", "RepSelect", "LoRA, bounded"]
)
def test_a_contender_forgets_there_what_it_forgets_on_the_processor(gpu, case: Case, name: str) -> None:
    contender = CONTENDERS[name]
    there = replace(case, model=copy.deepcopy(case.model).to(gpu), retrained=copy.deepcopy(case.retrained).to(gpu))
    found = []
    for each in (case, there):
        config = lasting.configured(each, QUICK, 0, contender, lr=QUICK.rates[contender.unit][-1], max_steps=3)
        model, row = forgotten(each, contender, config)
        found.append((measured(model, each), lasting.attacked(model, each, QUICK.attack), row["trace"][-1]))
    (figures, back, trace), (figures_there, back_there, trace_there) = found
    assert figures_there["forget"] == pytest.approx(figures["forget"], rel=1e-2, abs=1e-3)
    assert back_there == pytest.approx(back, rel=1e-2, abs=1e-3)
    assert trace_there["retain"] == pytest.approx(trace["retain"], rel=1e-2, abs=1e-3)
    assert torch.isfinite(torch.tensor(list(figures_there["influence"].values()))).all()
