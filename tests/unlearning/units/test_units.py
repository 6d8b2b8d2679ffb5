"""A run with units changes columns and rows of the chosen neurons, alike in driver, Trainer and accelerate."""

from __future__ import annotations

import json

import accelerate
import pytest
import torch

from tests.cli.test_cli import NOT_REACHED, call, files, options  # noqa: F401
from tests.unlearning.test_driver import FAST, memorized, run, weights  # noqa: F401
from tests.unlearning.trainer.test_driver_and_trainer import SIMU
from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, SEED, STEPS, make_model, make_selection
from tests.unlearning.trainer.whitened_runs import (
    OPTIONS,
    RETAIN_WEIGHT,
    TOLERANCE,
    largest_difference,
    make_whitened_trainer,
    num_hooks,
)
from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.objectives import Probability
from torch_simu.unlearning.pilot.pilot import recommend
from torch_simu.unlearning.pilot.words import one_batch_size, options_of
from torch_simu.unlearning.trainer.gradients import StepGradients


def assert_only_units_changed(model, before, selection):
    """Off the columns and the rows every bit is the same, and each of their tensors changed."""
    after = weights(model)
    masks = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in before.items()}
    for layer in selection:
        masks[f"{layer}.weight"][:, selection[layer]] = True
        for part in ("gate_proj", "up_proj"):
            masks[f"{layer.replace('down_proj', part)}.weight"][selection[layer]] = True
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        assert (after[name] != before[name]).any() == mask.any()


@pytest.mark.parametrize("changes", [{"method": "simu"}, {"method": "simu", "curvature": "neurons"}, {}])
def test_only_columns_and_rows_of_the_chosen_neurons_change(memorized, changes):  # noqa: F811
    model, examples = memorized
    before = weights(model)
    # By the seed alone, whatever the method.
    selection = NeuronSelection.random(model, 0.3, torch.Generator().manual_seed(0))
    done = run(model, examples, FAST.updated(units=True, max_steps=3, **changes), selection=selection)
    assert done.selection == selection
    assert_only_units_changed(model, before, selection)
    differing = sum(int((param != before[name]).sum()) for name, param in model.named_parameters())
    assert done.changed_share == differing / sum(value.numel() for value in before.values())
    assert not any(param.grad is not None for param in model.parameters()) and num_hooks(model) == 0


def test_without_units_nothing_is_other_than_before(memorized):  # noqa: F811
    model, examples = memorized
    before = weights(model)
    done = run(model, examples, FAST.updated(method="simu", max_steps=2))
    assert {name for name, value in weights(model).items() if not torch.equal(value, before[name])} == {
        f"{layer}.weight" for layer in done.selection
    }


@pytest.mark.parametrize("curvature", ["neurons", "both"])
def test_driver_trainer_and_an_accelerate_loop_make_the_same_steps_of_units(tmp_path, curvature):
    driven, trained, looped, before = (make_model() for _ in range(4))
    config = SIMU.updated(curvature=curvature, units=True)
    unlearn(driven, FORGET, RETAIN, config=config, selection=make_selection(driven))
    assert_only_units_changed(driven, weights(before), make_selection(before))
    choices = {"state_dtype": torch.float32, "units": True}
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_whitened_trainer(trained, tmp_path, curvature, options=choices, **arguments).train()
    assert largest_difference(driven, trained) < TOLERANCE < 1e-4 * largest_difference(driven, before)
    groups = make_selection(looped).param_groups(looped, units=True)
    accelerator = accelerate.Accelerator(cpu=True)
    looped, optimizer = accelerator.prepare(
        looped, SIMUOptimizer(groups, curvature=curvature, **{**OPTIONS, "weight_decay": 0.1})
    )
    with StepGradients(looped, optimizer, balance=True) as gradients:
        for step in range(STEPS):
            whole = [Batches(*of).batch(step) for of in ((FORGET, 4, 3 * SEED), (RETAIN, 4, 3 * SEED + 1))]
            gradients.add(Probability(RETAIN_WEIGHT).terms(looped, *whole), backward=accelerator.backward)
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(driven, looped) < TOLERANCE


def test_an_adversary_and_a_checkpoint_go_with_units(memorized, tmp_path):  # noqa: F811
    """A run that is broken off and called again ends with the bits of one that was not."""
    model, examples = memorized
    kept = weights(model)
    config = FAST.updated(method="simu", units=True, adversary_lr=1e-3, max_steps=4, checkpoint_interval=1)
    run(model, examples, config)
    whole = weights(model)
    model.load_state_dict(kept, strict=False)
    run(model, examples, config.updated(max_steps=2), checkpoint=tmp_path / "run")
    model.load_state_dict(kept, strict=False)
    run(model, examples, config, checkpoint=tmp_path / "run")
    assert all(torch.equal(value, whole[name]) for name, value in weights(model).items())


def test_the_pilot_puts_rows_back_and_its_command_asks_for_them(memorized):  # noqa: F811
    model, examples = memorized
    before = weights(model)
    config = one_batch_size(UnlearnConfig(units=True, max_steps=2, forget_target=0.5), 6)
    found = recommend(model, examples["forget"], examples["retain"], minutes=1e-4, config=config)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert "--units" in options_of(found.config)


class TestRefusals:
    @pytest.mark.parametrize("method", ["so_graddiff", "attention_only"])
    def test_methods_that_train_no_neurons(self, method):
        with pytest.raises(ValueError, match=f"units is True for method '{method}', expected False"):
            UnlearnConfig(method=method, units=True)


def test_the_report_counts_rows(files, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    quick = ["--max-steps", 2, "--batch-size", 6, "--units", "--method", "random_neurons", "--fraction", 0.25]
    assert call("unlearn", *options(files, "forget", "retain"), "--out", out, *quick) == NOT_REACHED
    changed = json.loads((out / "report.json").read_text())["summary"]["changed"]
    selection = NeuronSelection.load(out / "selection.safetensors")
    made = {layer.replace("down_proj", part): layer for layer in selection for part in ("gate_proj", "up_proj")}
    assert changed["rows"] == {name: {"trained": 16, "of": 64} for name in made}
    assert changed["layers"] == {layer: {"trained": 16, "of": 64} for layer in selection}
    assert set(changed["changed"]) == {f"{name}.weight" for name in [*selection, *made]}
    for name, layer in made.items():
        each = changed["changed"][f"{name}.weight"]
        assert each["rows"] == len(selection[layer]) and "neurons" not in each
    page = (out / "report.html").read_text()
    assert "The rows that make these neurons were trained, too" in page and "16 of 64 rows" in page
    patched = ["patch", "create", files / "model", out, out / "selection.safetensors", tmp_path / "patch"]
    assert call(*patched) == 2 and call(*patched, "--units") == 0
