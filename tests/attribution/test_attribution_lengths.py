"""Exact means exact also where positions depend on the length of the pass, and where a window hides in a configuration.

An exact method that was asked for is as safe as the one that "auto" takes: it equals the definition, or refuses.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.attribution.reference_attribution import lively, loosely, padded_batch, reference, sequences
from tests.attribution.test_attribution import relative_error
from tests.models import VOCABULARY, tiny
from torch_simu.attribution.attribution import Attribution
from torch_simu.attribution.methods.packed import pack as packed

pytestmark = pytest.mark.usefixtures("device")

FAST = ("packed", "decode")
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TRAINED = 16
LENGTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": TRAINED,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": TRAINED,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0, 5.0, 6.0, 7.0],
                "original_max_position_embeddings": TRAINED,
            },
        },
    ),
    "by layer": (
        "gemma3_text",
        {
            "max_position_embeddings": TRAINED,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            },
        },
    ),
}


def enlivened(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(6.0)
    return model.eval()


def length_dependent(kind: str) -> nn.Module:
    name, config = LENGTHS[kind]
    return enlivened(tiny(name, **config))


def assert_equals_fresh_model(found: Attribution, model: nn.Module, rows: list[Any]) -> None:
    for layer, scores in found.scores.items():
        expected = _reference_by_fresh_models(model, rows, layer)
        assert relative_error(scores, expected) < 1e-5


def _reference_by_fresh_models(model: nn.Module, rows: list[Any], layer: str) -> torch.Tensor:
    # One sample at a time, each on a copy, so that no pass sees what another one left.
    total = torch.zeros(())
    for ids, labels in rows:
        for t in (labels != -100).nonzero()[:, 0].tolist():
            if t:
                only = torch.full_like(labels, -100)
                only[t] = labels[t]
                part = reference(copy.deepcopy(model), [(ids, only)], layer, "logprob", "midpoint", 2)
                total = total + part.scores
    return total


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(("shortest", "longest"), [(10, 24), (20, 24)])
def test_prefixes_that_are_turned_differently_are_left_to_the_definition(
    kind: str, shortest: int, longest: int
) -> None:
    model, rows = length_dependent(kind), sequences(1, 3, shortest, longest)
    batch = padded_batch(rows, "right")
    for method in FAST:
        with pytest.raises(ValueError, match=r"turned otherwise in a pass over \d+ tokens than over \d"):
            loosely(model, [batch], method=method, steps=2)
    with pytest.warns(UserWarning, match=r"turned otherwise .* Method 'prefix' is used"):
        found = loosely(model, [batch], steps=2)
    assert found.provenance["method"] == "prefix"
    assert_equals_fresh_model(found, length_dependent(kind), rows)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("method", [*FAST, "auto"])
def test_prefixes_within_the_trained_length_are_exact_by_the_fast_methods(kind: str, method: str) -> None:
    model, rows = length_dependent(kind), sequences(2, 3, 5, TRAINED - 1)
    found = loosely(model, [padded_batch(rows, "left")], method=method, steps=2)
    assert found.provenance["method"] != "prefix"
    assert_equals_fresh_model(found, model, rows)


@pytest.mark.parametrize("kind", LENGTHS)
def test_passes_before_the_attribution_change_nothing_and_what_they_left_is_restored(kind: str) -> None:
    model, fresh = length_dependent(kind), length_dependent(kind)
    rows = sequences(3, 2, 12, 20)
    model(input_ids=torch.arange(3, 43)[None])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    used, expected = (loosely(each, [padded_batch(rows, "right")], method="prefix", steps=2) for each in (model, fresh))
    for layer, scores in expected.scores.items():
        assert torch.equal(used.scores[layer], scores)
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(buffer, after[name]) for name, buffer in before.items())


def multimodal(name: str) -> nn.Module:
    windowed = transformers.MistralConfig(**TEXT, sliding_window=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "llava":
            config = transformers.LlavaConfig(
                text_config=windowed, vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16)
            )
            return enlivened(transformers.LlavaForConditionalGeneration(config))
        text = transformers.Gemma3TextConfig(
            **TEXT, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        )
        vision = transformers.SiglipVisionConfig(**VISION)
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return enlivened(transformers.Gemma3ForConditionalGeneration(config))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("method", [*FAST, "auto"])
def test_a_window_in_the_text_part_of_a_multimodal_configuration_is_seen(name: str, method: str) -> None:
    model, rows = multimodal(name), sequences(1, 3, 7, 12)
    layers = [f"model.language_model.layers.{number}.mlp.down_proj" for number in (0, 1)]
    found = loosely(model, [padded_batch(rows, "right")], select=layers, method=method, steps=2)
    for layer in layers:
        expected = reference(model, rows, layer, "logprob", "midpoint", 2).scores
        assert relative_error(found.scores[layer], expected) < 1e-5


def test_an_unknown_dependence_on_the_cache_is_found_by_the_spot_check_of_a_method_that_was_asked_for() -> None:
    # Llama 4 scales queries by where the cache ends, which no configuration key says in general.
    config = transformers.Llama4TextConfig(
        **TEXT,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=4,
        floor_scale=4,
        attn_scale=0.5,
        no_rope_layers=[1, 0],
        moe_layers=[],
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = enlivened(transformers.Llama4ForCausalLM(config))
    rows = sequences(1, 3, 7, 12)
    layers = [f"model.layers.{number}.feed_forward.down_proj" for number in (0, 1)]
    options = {"select": layers, "steps": 2}
    for method in FAST:
        with pytest.raises(ValueError, match=f"For Llama4ForCausalLM, {method} is off by a factor of"):
            loosely(model, [padded_batch(rows, "right")], method=method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = loosely(model, [padded_batch(rows, "right")], **options)
    for layer in layers:
        expected = reference(model, rows, layer, "logprob", "midpoint", 2).scores
        assert relative_error(found.scores[layer], expected) < 1e-5


def test_what_breaks_a_method_that_was_asked_for_is_raised_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(packed.Pack, "logits", broken)
    with pytest.raises(RuntimeError, match="no such kernel") as caught:
        loosely(lively("llama"), [padded_batch(sequences(6), "right")], method="packed", steps=2)
    assert "packed fails" in " ".join(caught.value.__notes__)
