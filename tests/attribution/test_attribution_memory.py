"""An attribution that runs out of memory goes on in smaller passes, with the same scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.attribution.reference_attribution import lively, loosely, padded_batch, sequences
from tests.attribution.test_attribution import relative_error
from torch_simu.attribution.methods import decode, layerwise, packed, prefix


def test_memory_that_runs_out_halves_the_passes_and_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = lively("llama"), padded_batch(sequences(3), "right")
    for method, module in (("packed", packed), ("decode", decode), ("prefix", prefix), ("layerwise", layerwise)):
        expected = loosely(model, [batch], method=method, steps=3)
        name = {"packed": "_stream_values", "decode": "_token_values", "prefix": "_prefix_values"}.get(
            method, "_values"
        )
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

    monkeypatch.setattr(packed, "_stream_values", nothing)
    with pytest.raises(torch.OutOfMemoryError):
        loosely(lively("llama"), [padded_batch(sequences(3), "right")], method="packed")
