"""What two processes attribute together; run by tests/distributed/distributed_run.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.attribution.reference_attribution import lively, padded_batch, sequences
from torch_simu import attribute_neurons


def shared_attribution_equals_that_of_one_process(rank: int, folder: Path) -> None:
    """Also where one of them has more rows than the other, or none."""
    model, group = lively("llama"), dist.group.WORLD
    for num_rows in (1, 5):
        batches = [padded_batch(sequences(2, num_rows), "right")]
        calls: list[tuple[int, int]] = []
        expected = attribute_neurons(model, batches, steps=2)
        found = attribute_neurons(
            model, batches, steps=2, group=group, progress=lambda *call, to=calls: to.append(call)
        )
        assert found.num_samples == expected.num_samples
        assert found.provenance == expected.provenance
        for layer, scores in expected.scores.items():
            torch.testing.assert_close(found.scores[layer], scores, rtol=1e-5, atol=1e-6 * scores.norm().item())
            assert abs(found.completeness_error[layer] - expected.completeness_error[layer]) < 1e-4
        assert all(done <= total for done, total in calls)
        assert bool(calls) == (num_rows > 1 or rank == 0)


def processes_with_other_rows_are_refused(rank: int, folder: Path) -> None:
    """Parts of the data in each, say."""
    batches = [padded_batch(sequences(rank), "right")]
    try:
        attribute_neurons(lively("llama"), batches, group=dist.group.WORLD)
    except ValueError as error:
        message = str(error)
    else:
        message = "nothing"
    assert "2 of 2 processes attribute something else, expected the same model, batches and options in all" in message


SCENARIOS = [shared_attribution_equals_that_of_one_process, processes_with_other_rows_are_refused]
