"""Attribution is exact and complete (law 7): equal to one pass per prefix, and its sum is the change it explains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.attribution.reference_attribution import lively, loosely, padded_batch, reference, sequences
from tests.models import NAMES
from tests.strategies import seeds
from torch_simu.attribution import Attribution, attribute, site
from torch_simu.attribution.methods import decode
from torch_simu.attribution.methods.packed import pack as packed
from torch_simu.layers import down_projections

pytestmark = pytest.mark.usefixtures("device")

FIVE = ("llama", "gpt2", "opt", "gpt_neox", "qwen3")
WITHOUT_SDPA = ("gemma2", "gptj", "gpt_neo", "bloom", "mpt", "gpt_oss")
DECODED = ("gpt_neo", "bloom", "mpt")
RECURRENT = ("recurrent_gemma",)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_exact(
    attribution: Attribution,
    model: nn.Module,
    rows: list[tuple[Tensor, Tensor]],
    objective: str = "logprob",
    rule: str = "midpoint",
    steps: int = 2,
) -> None:
    assert list(attribution.scores) == list(down_projections(model))
    assert attribution.num_samples == sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    for layer, found in attribution.scores.items():
        expected = reference(model, rows, layer, objective, rule, steps)
        assert found.dtype == torch.float64
        assert relative_error(found, expected.scores) < 1e-5
        error = expected.scores.sum().item() - expected.change
        assert attribution.completeness_error[layer] == pytest.approx(error, abs=1e-4 * (1 + abs(expected.change)))


@given(
    st.sampled_from(FIVE),
    st.sampled_from(["packed", "decode", "prefix", "auto"]),
    st.sampled_from(["logprob", "prob", "loss"]),
    st.sampled_from(["gauss", "midpoint", "right", "left"]),
    st.integers(1, 3),
    st.sampled_from(["left", "right"]),
    seeds,
)
def test_scores_equal_one_pass_per_prefix_and_path_point(
    name: str, method: str, objective: str, rule: str, steps: int, side: str, seed: int
) -> None:
    model, rows = lively(name), sequences(seed)
    batches = [padded_batch(rows[:2], side), padded_batch(rows[2:], side)]
    options = {"objective": objective, "rule": rule, "steps": steps}
    attribution = loosely(model, batches, method=method, **options)
    assert attribution.provenance["method"] == ("packed" if method == "auto" else method)
    assert_exact(attribution, model, rows, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_every_known_architecture_is_exact_by_the_method_that_auto_takes(name: str, attention: str) -> None:
    if attention == "sdpa" and name in WITHOUT_SDPA:
        pytest.skip("the architecture has no sdpa attention")
    try:
        model, rows = lively(name, attn_implementation=attention), sequences(1)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"this version of transformers cannot make the model: {error}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        attribution = loosely(model, [padded_batch(rows, "right")], steps=2)
    wanted = "decode" if name in DECODED else "prefix" if name in RECURRENT else "packed"
    assert attribution.provenance["method"] == wanted
    assert bool(caught) == (wanted == "prefix")
    assert_exact(attribution, model, rows)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RECURRENT])
def test_every_known_architecture_with_a_cache_is_exact_by_decoding(name: str) -> None:
    model, rows = lively(name), sequences(2)
    attribution = loosely(model, [padded_batch(rows, "left")], method="decode", steps=2)
    assert_exact(attribution, model, rows)


_HALF = (("layer_types", ("sliding_attention", "full_attention")),)
_SOME = (("use_sliding_window", True), ("max_window_layers", 1))


@pytest.mark.parametrize("config", [{"alibi": True}, {"new_decoder_architecture": True}])
def test_falcon_is_exact_with_linear_biases_and_in_its_newer_form(config: dict[str, bool]) -> None:
    model, rows = lively("falcon", **config), sequences(3)
    attribution = loosely(model, [padded_batch(rows, "right")], steps=2)
    assert attribution.provenance["method"] == ("decode" if "alibi" in config else "packed")
    assert_exact(attribution, model, rows)


WINDOWED = {
    **dict.fromkeys(("mistral", "phi3", "starcoder2", "mixtral"), ()),
    "qwen3_moe": _SOME[:1],
    **dict.fromkeys(("qwen2", "qwen3"), _SOME),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo3", "gpt_oss"), _HALF),
}
"""Architectures with a sliding window, in all layers or in one of two."""


@pytest.mark.parametrize("method", ["packed", "decode", "auto"])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_shorter_than_the_prefixes_are_exact(name: str, method: str) -> None:
    model, rows = lively(name, sliding_window=4, **dict(WINDOWED[name])), sequences(1, shortest=7, longest=9)
    assert_exact(
        loosely(model, [padded_batch(rows, "right")], method=method, steps=2),
        model,
        rows,
    )
    # The window matters: without it the scores are others.
    wide = loosely(lively(name), [padded_batch(rows, "right")], method=method, steps=2)
    first = next(iter(wide.scores))
    assert relative_error(wide.scores[first], reference(model, rows, first, "logprob", "midpoint", 2).scores) > 1e-2


def test_windows_and_chunks_leave_what_they_say() -> None:
    seen = {kind: packed._seen(*_positions(9), kind, {kind: 4}) for kind in ("sliding_attention", "chunked_attention")}
    assert seen["sliding_attention"].sum(1).tolist() == [9, 9, 9, 9, 8, 7, 6, 5, 4]
    assert seen["chunked_attention"].sum(1).tolist() == [4] * 8 + [1]


def _positions(length: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(length, dtype=torch.int64), torch.arange(length), torch.arange(length)


@given(st.sampled_from(FIVE), seeds)
def test_the_sum_of_scores_is_the_change_of_the_objective_at_many_midpoints(name: str, seed: int) -> None:
    model, rows = lively(name), sequences(seed, num_rows=1)
    batch = padded_batch(rows, "right")
    coarse, fine = (loosely(model, [batch], steps=steps, method="packed") for steps in (4, 128))
    for layer, scores in fine.scores.items():
        change = reference(model, rows, layer, "logprob", "midpoint", 1).change
        assert abs(fine.completeness_error[layer]) < 1e-2 * (1 + abs(change))
        assert abs(fine.completeness_error[layer]) <= abs(coarse.completeness_error[layer]) + 1e-2 * (1 + abs(change))
        assert scores.sum().item() == pytest.approx(change, abs=1e-2 * (1 + abs(change)))


@pytest.mark.parametrize("method", ["layerwise", "joint"])
@pytest.mark.parametrize("name", FIVE)
def test_approximate_methods_are_complete_along_their_own_path(name: str, method: str) -> None:
    batch = padded_batch(sequences(2), "left")
    attribution = loosely(lively(name), [batch], steps=100, method=method)
    for layer, scores in attribution.scores.items():
        assert abs(attribution.completeness_error[layer]) < 1e-2 * (1 + scores.abs().sum().item())


@given(st.sampled_from(["packed", "prefix", "layerwise", "joint"]), seeds)
def test_batching_padding_and_order_of_rows_do_not_matter(method: str, seed: int) -> None:
    model, rows = lively("llama"), sequences(seed, num_rows=4)
    once = loosely(model, [padded_batch(rows, "right")], method=method, steps=2)
    again = loosely(
        model,
        iter([padded_batch(rows[2:], "left"), padded_batch(rows[:2], "right")]),
        method=method,
        steps=2,
        max_completeness_error=None,
    )
    assert once.provenance == again.provenance
    for layer, scores in once.scores.items():
        torch.testing.assert_close(scores, again.scores[layer], rtol=1e-3, atol=1e-5 * scores.norm().item())


@pytest.mark.parametrize("method", ["packed", "prefix", "layerwise", "joint"])
def test_a_small_memory_changes_no_score(method: str) -> None:
    model, batch = lively("gpt2"), padded_batch(sequences(3), "right")
    expected = loosely(model, [batch], method=method, steps=3)
    found = loosely(model, [batch], method=method, steps=3, memory=2**14)
    for layer, scores in expected.scores.items():
        assert relative_error(found.scores[layer], scores) < 1e-5
        assert found.completeness_error[layer] == pytest.approx(expected.completeness_error[layer], abs=1e-4)


@pytest.mark.parametrize("method", ["packed", "prefix"])
def test_a_bfloat16_model_is_attributed_with_wide_sums(method: str) -> None:
    rows = sequences(4)
    model = copy.deepcopy(lively("llama")).bfloat16()
    attribution = loosely(model, [padded_batch(rows, "right")], method=method, steps=2)
    for layer, found in attribution.scores.items():
        assert found.dtype == torch.float64
        expected = reference(model, rows, layer, "logprob", "midpoint", 2)
        assert relative_error(found, expected.scores) < 0.1


def test_a_neuron_whose_loss_destroys_the_prediction_gets_the_highest_score() -> None:
    model = copy.deepcopy(lively("llama"))
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    target, neuron = 11, 7
    ids = torch.tensor([[5, 6, 8, target]])
    labels = torch.tensor([[-100, -100, -100, target]])
    # The neuron fires on the last prefix token, and its column then writes the target.
    inputs: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(input_ids=ids[:, :3])
    handle.remove()
    head = model.get_submodule("lm_head")
    with torch.no_grad():
        direction = head.weight[target] - head.weight.mean(0)
        down.weight[:, neuron] = 100 * direction / (direction.norm() * inputs[0][0, -1, neuron])
    attribution = loosely(model, [{"input_ids": ids, "labels": labels}])
    assert attribution.scores["model.layers.1.mlp.down_proj"].argmax() == neuron
    assert attribution.select(0.5)["model.layers.1.mlp.down_proj"].tolist() == [neuron]


def _roll(original: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gradient, activation: original(gradient, activation.roll(1, 0))


def _without_own_key(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mask(self: packed.Pack, queries: Tensor, kind: str) -> Tensor:
        visible = original(self, queries, kind)
        own = visible[:, -queries.numel() :]
        # A first token without its own key would see nothing at all.
        own &= self.position[queries, None] == 0
        return visible

    return mask


def _also_the_clean_self(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mask(self: packed.Pack, queries: Tensor, kind: str) -> Tensor:
        visible = original(self, queries, kind)
        visible[torch.arange(queries.numel()), queries] = True
        return visible

    return mask


def test_each_mutant_breaks_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = lively("llama"), sequences(5)
    batch = padded_batch(rows, "right")
    assert_exact(loosely(model, [batch], method="packed", steps=2), model, rows)

    def assert_broken(**options: object) -> None:
        mutant = loosely(model, [batch], steps=2, **{"method": "packed", **options})
        first = next(iter(mutant.scores))
        expected = reference(model, rows, first, "logprob", "midpoint", 2)
        assert relative_error(mutant.scores[first], expected.scores) > 1e-2

    assert_broken(method="layerwise")  # every position is scaled
    assert_broken(objective="loss")  # the sign of the loss
    for place, name, mutate in (
        (site, "attributed", _roll),  # the clean activation of a neighbor
        (packed.Pack, "mask", _without_own_key),
        (packed.Pack, "mask", _also_the_clean_self),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, mutate(getattr(place, name)))
            if place is not site:
                # What all methods share, the definition has wrong, too.
                with pytest.raises(
                    ValueError, match="For LlamaForCausalLM, packed is off by a factor of .* method='prefix'"
                ):
                    loosely(model, [batch], method="packed", steps=2)
            patch.setattr(attribute, "check_exact", lambda *_: None)
            assert_broken()


def test_auto_warns_and_takes_the_next_method_where_the_spot_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = lively("llama"), sequences(6)
    monkeypatch.setattr(packed.Pack, "mask", _also_the_clean_self(packed.Pack.mask))
    with pytest.warns(UserWarning, match=r"For LlamaForCausalLM, packed is off by .* Method 'decode' is used"):
        attribution = loosely(model, [padded_batch(rows, "right")], steps=2)
    assert_exact(attribution, model, rows)
    monkeypatch.setattr(decode._Prefixes, "before", _a_position_late(decode._Prefixes.before))
    with pytest.warns(UserWarning, match=r"packed is off by .* and decode is off by .* Method 'prefix' is used"):
        attribution = loosely(model, [padded_batch(rows, "right")], steps=2)
    assert_exact(attribution, model, rows)


def _a_position_late(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def before(self: decode._Prefixes, part: slice) -> tuple[Tensor, Tensor]:
        index, visible = original(self, part)
        return (index - 1).clamp(min=0), visible

    return before
