"""An attribution says nothing of its data but the scores: no hash by which a guess could be tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attribution.reference_attribution import lively, loosely
from tests.attribution.test_attribution_resume import _batches, _interrupted, small_groups
from torch_simu import attribute_neurons
from torch_simu._files import load_tensors

__all__ = ["small_groups"]


def test_provenance_tells_nothing_of_the_data() -> None:
    one, two = (attribute_neurons(lively("llama"), [batch], method="packed") for batch in _batches()[:2])
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
