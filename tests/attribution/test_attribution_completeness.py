"""What scores miss of the change that they explain is stored, shown, warned of above 1 % and refused above 20 %."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.attribution.reference_attribution import lively, loosely, padded_batch, reference, sequences
from tests.attribution.test_attribution import relative_error
from tests.models import tiny
from tests.strategies import seeds
from torch_simu.attribution import Attribution, IncompleteError, attribute_neurons, check_complete
from torch_simu.attribution.methods.sums import _precision

pytestmark = pytest.mark.usefixtures("device")

METHODS = ("packed", "decode", "prefix")


@given(st.sampled_from(METHODS), st.sampled_from(["logprob", "prob", "loss"]), seeds)
def test_the_incompleteness_is_the_error_over_the_size_of_what_each_sample_changes(
    method: str, objective: str, seed: int
) -> None:
    model, rows = lively("llama"), sequences(seed)
    found = loosely(model, [padded_batch(rows, "right")], method=method, objective=objective, steps=2)
    for layer, scores in found.scores.items():
        size = total = 0.0
        for ids, labels in rows:
            for t in (labels != -100).nonzero()[:, 0].tolist():
                if t:
                    only = torch.full_like(labels, -100)
                    only[t] = labels[t]
                    change = reference(model, [(ids, only)], layer, objective, "midpoint", 1).change
                    size, total = size + abs(change), total + change
        assert found.change_size[layer] == pytest.approx(size, rel=1e-3, abs=1e-4)
        expected = abs(scores.sum().item() - total) / size
        assert found.incompleteness[layer] == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_changes_of_two_samples_that_cancel_do_not_make_the_error_look_large() -> None:
    one = Attribution({"a": torch.tensor([2.0]).double()}, {"a": 0.01}, 1, {}, {"a": 2.0})
    other = Attribution({"a": torch.tensor([-2.0]).double()}, {"a": 0.01}, 1, {}, {"a": 2.0})
    assert (one + other).incompleteness == {"a": 0.005}


def test_a_layer_that_changes_nothing_is_complete() -> None:
    model = copy.deepcopy(lively("llama"))
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.zero_()
    found = attribute_neurons(model, [padded_batch(sequences(1), "right")], steps=20)
    assert found.incompleteness["model.layers.0.mlp.down_proj"] < 1e-3


def test_a_bfloat16_model_is_not_blamed_for_its_rounding() -> None:
    model = copy.deepcopy(tiny("llama")).bfloat16()
    found = attribute_neurons(model, [padded_batch(sequences(1), "right")], max_completeness_error=0.2)
    assert max(found.incompleteness.values()) < 0.01
    assert _precision(model) == 16 * torch.finfo(torch.bfloat16).eps
    assert _precision(tiny("llama")) == 1e-4


def coarse(limit: float | None = 0.2) -> Attribution:
    """The left end of the path alone: far from complete."""
    model, batch = lively("qwen2"), padded_batch(sequences(1), "right")
    return attribute_neurons(model, [batch], steps=1, rule="left", max_completeness_error=limit)


def test_more_than_a_fifth_is_refused_unless_asked_and_nothing_is_lost() -> None:
    with pytest.raises(
        IncompleteError, match=r"miss \d+\.\d% of the change .* expected at most 20%. Take more"
    ) as caught:
        coarse()
    found = coarse(None)
    worst = max(found.incompleteness.values())
    assert worst > 0.2
    assert caught.value.attribution.scores.keys() == found.scores.keys()
    assert f"{worst:.1%} incomplete at most" in repr(found)
    with pytest.warns(UserWarning, match=f"miss {worst:.1%} of the change"):
        coarse(worst + 0.1)


def test_more_than_a_hundredth_is_worth_a_warning_and_less_is_not() -> None:
    model, batch = lively("qwen2"), padded_batch(sequences(1), "right")
    with pytest.warns(UserWarning, match=r"miss 2\.\d% of the change .* expected at most 1%. Take more steps"):
        attribute_neurons(model, [batch], steps=2, rule="midpoint")
    assert max(attribute_neurons(model, [batch]).incompleteness.values()) < 0.01


def test_a_refused_attribution_goes_on_from_its_file_when_asked(tmp_path: Path) -> None:
    model, batch, path = lively("qwen2"), padded_batch(sequences(1), "right"), tmp_path / "partial.safetensors"
    options = {"steps": 1, "rule": "left", "method": "prefix", "resume": path}
    with pytest.raises(IncompleteError):
        attribute_neurons(model, [batch], **options)
    assert path.exists()
    calls: list[int] = []
    attribute_neurons(
        model, [batch], max_completeness_error=None, progress=lambda done, _: calls.append(done), **options
    )
    assert not calls
    assert not path.exists()


@pytest.mark.parametrize(("value", "error"), [(-0.1, ValueError), (float("nan"), ValueError), ("all", TypeError)])
def test_a_bound_that_is_none_is_named(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_completeness_error is"):
        attribute_neurons(lively("llama"), [padded_batch(sequences(1), "right")], max_completeness_error=value)


def test_sizes_are_saved_and_files_without_them_have_no_incompleteness(tmp_path: Path) -> None:
    found = Attribution({"a": torch.tensor([1.0]).double()}, {"a": 0.5}, 1, {}, {"a": 2.0})
    found.save(tmp_path / "scores.safetensors")
    assert Attribution.load(tmp_path / "scores.safetensors").incompleteness == {"a": 0.25}
    without = Attribution(found.scores, found.completeness_error, 1, {})
    without.save(tmp_path / "scores.safetensors")
    assert Attribution.load(tmp_path / "scores.safetensors").incompleteness == {}
    check_complete(without)
    assert repr(without) == "Attribution(1 layers, 1 neurons, 1 samples)"


def experts_with(model_name: str, change: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> nn.Module:
    """A mixture of experts whose experts do something more with their input and output."""
    model = copy.deepcopy(lively(model_name))
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            inner = module.forward

            def forward(self: nn.Module, hidden: Tensor, *args: Tensor, inner: Callable[..., Tensor] = inner) -> Tensor:
                return change(self, hidden, inner(hidden, *args))

            module.forward = types.MethodType(forward, module)
    return model


@pytest.mark.parametrize("method", [*METHODS, "auto", "layerwise", "joint"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_norm_behind_the_down_projection_of_experts_is_refused(name: str, method: str) -> None:
    model = experts_with(name, lambda _, __, output: nn.functional.rms_norm(output, output.shape[-1:]))
    with pytest.raises(ValueError, match=r"Half the neurons of experts .* expected an output that is linear"):
        loosely(model, [padded_batch(sequences(1), "right")], method=method, steps=2)


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_pass_their_input_on_are_attributed_without_what_they_pass_on(method: str) -> None:
    rows = sequences(1)
    model = experts_with("mixtral", lambda _, hidden, output: output + hidden / 2)
    found = loosely(model, [padded_batch(rows, "right")], method=method, steps=64)
    assert max(found.incompleteness.values()) < 0.2
    for layer, scores in found.scores.items():
        expected = _by_weights(model, rows, layer, steps=64)
        assert relative_error(scores, expected) < 1e-4


def _by_weights(model: nn.Module, rows: list[tuple[Tensor, Tensor]], layer: str, steps: int) -> Tensor:
    """The definition: neurons times alpha are the down projection's columns times alpha, at the last position only."""
    module = model.get_submodule(layer)
    weight = module.down_proj

    def with_columns(inner: Callable[..., Tensor], columns: Tensor, *args: Tensor) -> Tensor:
        del module.down_proj
        module.__dict__["down_proj"] = columns
        try:
            return inner(*args)
        finally:
            del module.__dict__["down_proj"]
            module.down_proj = weight

    total = torch.zeros(weight.shape[0], weight.shape[2], dtype=torch.float64)
    for ids, labels in rows:
        for t in (labels != -100).nonzero()[:, 0].tolist():
            for j in range(steps if t else 0):
                alpha = (j + 0.5) / steps
                scales = torch.full((weight.shape[0], weight.shape[2]), alpha, requires_grad=True)
                inner = module.forward

                def forward(hidden: Tensor, *args: Tensor, inner: Callable = inner, scales: Tensor = scales) -> Tensor:
                    clean = inner(hidden, *args)
                    scaled = with_columns(inner, weight * scales[:, None], hidden, *args)
                    return torch.cat([clean[:-1], scaled[-1:]])

                module.forward = forward
                try:
                    logits = model(input_ids=ids[None, :t], use_cache=False).logits[0, -1]
                finally:
                    module.forward = inner
                value = logits.float().log_softmax(-1)[labels[t]]
                (gradient,) = torch.autograd.grad(value, scales)
                total += gradient.double() / steps
    return total.flatten()


def test_the_probe_of_experts_leaves_the_model_as_it_was() -> None:
    model = experts_with("mixtral", lambda _, __, output: nn.functional.rms_norm(output, output.shape[-1:]))
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(ValueError, match="Half the neurons"):
        loosely(model, [padded_batch(sequences(1), "right")], steps=2)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
