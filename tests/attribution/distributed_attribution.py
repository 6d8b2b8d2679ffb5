"""What two processes attribute together; run by tests/distributed/distributed_run.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.attribution.reference_attribution import lively, loosely, padded_batch, sequences


def shared_attribution_equals_that_of_one_process(rank: int, folder: Path) -> None:
    """Also where one of them has more rows than the other, or none."""
    model, group = lively("llama"), dist.group.WORLD
    for num_rows in (1, 5):
        batches = [padded_batch(sequences(2, num_rows), "right")]
        calls: list[tuple[int, int]] = []
        expected = loosely(model, batches, steps=2)
        found = loosely(
            model,
            batches,
            steps=2,
            max_completeness_error=None,
            group=group,
            progress=lambda *call, to=calls: to.append(call),
        )
        assert found.num_samples == expected.num_samples
        assert found.provenance == expected.provenance
        for layer, scores in expected.scores.items():
            torch.testing.assert_close(found.scores[layer], scores, rtol=1e-5, atol=1e-6 * scores.norm().item())
            assert abs(found.completeness_error[layer] - expected.completeness_error[layer]) < 1e-4
        assert all(done <= total for done, total in calls)
        assert bool(calls) == (num_rows > 1 or rank == 0)


def a_shared_estimate_is_the_same_everywhere(rank: int, folder: Path) -> None:
    """The mean of many such estimates is that of exact scores; here, that nothing of them is lost on the way."""
    model, group = lively("llama", num_hidden_layers=6), dist.group.WORLD
    batches = [padded_batch(sequences(2, 4), "right")]
    found = loosely(model, batches, method="packed", budget=2, group=group)
    everyone: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
    for part in (found.scores, found.standard_error, found.difference):
        assert len(part) == len(found.scores)
        dist.all_gather_object(everyone, dict(part), group=group)
        assert all(torch.equal(each[layer], scores) for each in everyone for layer, scores in part.items())
    exact = loosely(model, batches, method="packed", budget=1000, group=group)
    assert found.incompleteness == {} != exact.incompleteness
    for layer, scores in exact.scores.items():
        assert 0 < (found.scores[layer] - scores).norm() < 3 * found.standard_error[layer].norm()


def processes_with_other_rows_are_refused(rank: int, folder: Path) -> None:
    """Parts of the data in each, say."""
    batches = [padded_batch(sequences(rank), "right")]
    try:
        loosely(lively("llama"), batches, group=dist.group.WORLD)
    except ValueError as error:
        message = str(error)
    else:
        message = "nothing"
    assert "2 of 2 processes attribute something else, expected the same model, batches and options in all" in message


SCENARIOS = [
    shared_attribution_equals_that_of_one_process,
    a_shared_estimate_is_the_same_everywhere,
    processes_with_other_rows_are_refused,
]
