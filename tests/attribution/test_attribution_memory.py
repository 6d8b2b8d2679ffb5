"""A pass takes the memory that it may; one that runs out goes on in smaller passes, with the same scores."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.speed.live_bytes import LiveBytes
from tests.attribution.reference_attribution import lively, loosely, padded_batch, sequences
from tests.attribution.test_attribution import relative_error
from torch_simu.attribution.methods import decode, layerwise, prefix
from torch_simu.attribution.methods.memory import bytes_per_token
from torch_simu.attribution.methods.packed import sums as packed
from torch_simu.attribution.methods.packed.growing import blocks_of
from torch_simu.layers import down_projections


def test_memory_that_runs_out_halves_the_passes_and_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = lively("llama"), padded_batch(sequences(3), "right")
    for method, module in (("packed", packed), ("decode", decode), ("prefix", prefix), ("layerwise", layerwise)):
        expected = loosely(model, [batch], method=method, steps=3)
        name = {"decode": "_token_values", "prefix": "_prefix_values"}.get(method, "_values")
        original, refused = getattr(module, name), []

        def scarce(*args: object, original: Callable = original, refused: list = refused) -> object:
            alphas, part = args[-2:] if isinstance(args[-1], slice) else (args[-1], slice(0, 1))
            if len(alphas) * (part.stop - part.start) > 1:
                refused.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, scarce)
            found = loosely(model, [batch], method=method, steps=3)
        assert refused
        for layer, scores in expected.scores.items():
            assert relative_error(found.scores[layer], scores) < 1e-5
            assert found.completeness_error[layer] == pytest.approx(expected.completeness_error[layer], abs=1e-4)


def test_memory_that_does_not_suffice_for_one_query_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packed, "_values", nothing)
    with pytest.raises(torch.OutOfMemoryError):
        loosely(lively("llama"), [padded_batch(sequences(3), "right")], method="packed")


def passes_of(model: nn.Module) -> list[int]:
    """Fills with the streams that the head gives logits of, a number for each pass."""
    found: list[int] = []
    model.get_submodule("lm_head").register_forward_hook(lambda *call: found.append(len(call[2])))
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_layers_share_a_pass_and_score_as_in_passes_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = copy.deepcopy(lively(name, num_hidden_layers=3)), padded_batch(sequences(3), "right")
    monkeypatch.setattr("torch_simu.attribution.attribute.check_exact", lambda *_: None)
    streams = passes_of(model)
    shared = loosely(model, [batch], method="packed", steps=4)
    # One pass with a gradient, and one at zero.
    assert [each for each in streams if each > 1] == [1 + 3 * 4, 1 + 3]
    streams.clear()
    monkeypatch.setattr(packed, "blocks_of", lambda *_: {})
    alone = loosely(model, [batch], method="packed", steps=4)
    assert [each for each in streams if each > 1] == [4] * 3
    for layer, scores in alone.scores.items():
        assert relative_error(shared.scores[layer], scores) < 1e-5
        assert shared.completeness_error[layer] == pytest.approx(alone.completeness_error[layer], abs=1e-4)


def test_layers_of_one_block_share_it_and_a_layer_outside_of_lists_has_none() -> None:
    model = lively("llama")
    layers = {name: model.get_submodule(name) for name in ("model.layers.0.self_attn.o_proj", *down_projections(model))}
    blocks = blocks_of(model, layers)
    assert list(blocks.values()) == [model.model.layers[0], *model.model.layers]
    assert blocks_of(model, {**layers, "lm_head": model.lm_head}) == {}
    batch, select = padded_batch(sequences(3), "right"), list(layers)
    found, expected = (loosely(model, [batch], method=each, select=select, steps=2) for each in ("packed", "prefix"))
    for layer, scores in expected.scores.items():
        assert relative_error(found.scores[layer], scores) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_token_takes_is_measured(name: str) -> None:
    model = copy.deepcopy(lively(name, num_hidden_layers=4)).requires_grad_(False)
    ids = torch.arange(3, 15)
    with LiveBytes() as live:
        embeddings = model.get_input_embeddings()(ids[None]).requires_grad_()
        model(inputs_embeds=embeddings).logits.log_softmax(-1).sum().backward()
    assert 0.8 < len(ids) * bytes_per_token(model, ids) / live.peak < 1.25


@pytest.mark.parametrize("method", ["packed", "decode", "prefix"])
def test_passes_fill_the_memory_that_is_given(method: str) -> None:
    model, batch = lively("llama", num_hidden_layers=6), padded_batch(sequences(3, num_rows=8), "right")
    peaks = {}
    for memory in (2**18, 2**20):
        with LiveBytes() as live:
            loosely(model, [batch], method=method, steps=8, memory=memory)
        peaks[memory] = live.peak
        # Beside what passes hold there are the clean keys and values, sums, and what the passes' ends need.
        assert live.peak < 2.0 * memory
    assert peaks[2**18] < 0.5 * peaks[2**20]


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        (0, ValueError, "memory is 0"),
        (1000.5, ValueError, "memory is 1000.5, expected whole bytes"),
        ("1", TypeError, "memory is '1'"),
    ],
)
def test_a_memory_that_is_none_is_named(memory: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loosely(lively("llama"), [padded_batch(sequences(3), "right")], memory=memory)
