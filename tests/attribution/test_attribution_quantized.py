"""Attribution runs through 8-bit layers, with wide sums, and finds what it finds in the float model."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from tests.attribution.reference_attribution import lively, loosely, padded_batch, sequences
from tests.quantized import quantized

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("method", ["packed", "decode", "auto"])
def test_an_8_bit_model_is_attributed_exactly_and_like_the_float_model(method: str) -> None:
    float_model = lively("llama")
    model, batch = quantized(float_model, "8bit"), padded_batch(sequences(4, num_rows=6), "right")
    codes = {name: param.clone() for name, param in model.named_parameters()}
    expected = loosely(model, [batch], steps=4, method="prefix")
    found = loosely(model, [batch], steps=4, method=method)
    unquantized = loosely(float_model, [batch], steps=4)
    for layer, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[layer], scores, rtol=1e-3, atol=1e-5 * scores.norm().item())
        # The codes move the model a little, and the scores with it.
        assert 0.99 < spearmanr(found.scores[layer], unquantized.scores[layer]).statistic < 1.0
    for name, param in model.named_parameters():
        assert torch.equal(param, codes[name])
        assert param.grad is None
