"""An attribution goes on after an interruption, from a file that is bound to its options, its model and its data."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.attribution.reference_attribution import lively, loosely, padded_batch, sequences
from torch_simu import _files
from torch_simu._files import load_tensors

BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, -100, 8]])}


def _interrupted(path: Path, after: int, **options: object) -> None:
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loosely(lively("llama"), _batches(), resume=path, progress=stop, **{"method": "packed", **options})


def _batches() -> list[dict[str, Tensor]]:
    return [padded_batch(sequences(seed), "right") for seed in range(3)]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_simu.attribution.attribute._PACK_TOKENS", 8)


@pytest.mark.usefixtures("small_groups")
def test_an_interrupted_attribution_goes_on_where_it_stopped_and_deletes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "partial.safetensors"
    whole = loosely(lively("llama"), _batches(), method="packed")
    _interrupted(path, after=6)
    _, header = _files.load_tensors(path, "AttributionSums")
    assert header["num_sequences"] > 0
    calls: list[tuple[int, int]] = []
    resumed = loosely(
        lively("llama"), _batches(), method="packed", resume=path, progress=lambda *call: calls.append(call)
    )
    assert calls[0][0] > calls[0][1] // (2 * 9)
    assert calls[-1][0] == calls[-1][1]
    assert not path.exists()
    assert resumed.completeness_error == whole.completeness_error
    assert resumed.provenance == whole.provenance
    for layer, scores in whole.scores.items():
        assert torch.equal(resumed.scores[layer], scores)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "steps 10, expected 3"),
        ({"objective": "prob"}, "objective 'logprob', expected 'prob'"),
        ({"method": "prefix"}, "method 'packed', expected 'prefix'"),
        ({"select": r"layers\.0\.mlp\.down_proj"}, "layers"),
    ],
)
def test_another_attribution_is_not_continued(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = tmp_path / "partial.safetensors"
    _interrupted(path, after=6)
    with pytest.raises(ValueError, match=f"was written with {message}"):
        loosely(lively("llama"), _batches(), resume=path, **{"method": "packed", **options})
    assert path.exists()


@pytest.mark.usefixtures("small_groups")
def test_other_weights_or_data_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "partial.safetensors"
    _interrupted(path, after=6)
    with pytest.raises(ValueError, match="was written for other data, or its key is gone"):
        loosely(lively("llama"), _batches()[:2], resume=path, method="packed")
    changed = copy.deepcopy(lively("llama"))
    with torch.no_grad():
        changed.get_submodule("model.norm").weight[0] += 1e-6
    with pytest.raises(ValueError, match="was written with weights"):
        loosely(changed, _batches(), resume=path, method="packed")


@pytest.mark.usefixtures("small_groups")
def test_partial_sums_are_written_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "partial.safetensors"
    monkeypatch.setattr("torch_simu.attribution.checkpoint._SECONDS", 0.0)
    seen: list[bool] = []
    loosely(lively("llama"), _batches(), resume=path, progress=lambda *_: seen.append(path.exists()))
    assert seen[-1] and not seen[0]
    assert not path.exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "partial.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is unreadable"):
        loosely(lively("llama"), [BATCH], resume=path)


def test_provenance_tells_nothing_of_the_data() -> None:
    one, two = (loosely(lively("llama"), [batch], method="packed") for batch in _batches()[:2])
    assert one.provenance == two.provenance


@pytest.mark.usefixtures("small_groups")
def test_partial_sums_name_their_data_under_a_key_of_their_own(tmp_path: Path) -> None:
    """Who has the file alone cannot test guesses of the data: the same data is named in another way every time."""
    named = []
    for name in ("one", "two"):
        _interrupted(tmp_path / name, after=6)
        named.append(load_tensors(tmp_path / name, "AttributionSums")[1]["data"])
        key = (tmp_path / f"{name}.key").read_text()
        assert key.encode() not in (tmp_path / name).read_bytes()
    assert named[0] != named[1] and {len(str(each)) for each in named} == {64}
    (tmp_path / "two.key").unlink()
    with pytest.raises(ValueError, match="its key is gone, expected the same samples. Delete the file"):
        loosely(lively("llama"), _batches(), resume=tmp_path / "two", method="packed")
    loosely(lively("llama"), _batches(), resume=tmp_path / "one", method="packed")
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
