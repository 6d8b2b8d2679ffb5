"""No row is both the attacker's and scored; shots stand before a row and leave its scored part as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import normal
from torch_simu.unlearning.attack.rounding import rounded_in_groups, rounded_to_4_bits, rounded_to_8_bits
from torch_simu.unlearning.attack.rows import split_rows, with_shots
from torch_simu.unlearning.data.examples import Example

questions = st.lists(st.integers(0, 20), min_size=1, max_size=30)


def row(question: int, place: str = "") -> Example:
    return Example((question, 1, 2), (-100, 1, 2), place, 1)


@given(questions, st.integers(2, 5))
def test_the_parts_are_disjoint_and_together_the_set_whatever_is_there_twice(numbers: list[int], every: int) -> None:
    rows = [row(number, place=f"rows.jsonl:{line}") for line, number in enumerate(numbers)]
    if len(set(numbers)) < 2:
        with pytest.raises(ValueError, match="expected at least two"):
            split_rows(rows, every=every)
        return
    attacker, scored = split_rows(rows, every=every)
    assert attacker and scored and not set(attacker) & set(scored)
    assert sorted(each.input_ids for each in attacker + scored) == sorted({each.input_ids for each in rows})
    assert len(attacker) == -(-len(set(numbers)) // every)


@given(questions, st.integers(1, 4), st.integers(0, 3), st.integers(3, 20))
def test_shots_are_rows_of_the_attacker_and_the_scored_part_stays(
    numbers: list[int], shots: int, seed: int, longest: int
) -> None:
    attacker, scored = [row(number) for number in sorted(set(numbers))], [row(30), row(31)]
    found = with_shots(scored, attacker, shots=shots, seed=seed, longest=longest)
    for before, after in zip(scored, found, strict=True):
        assert after.input_ids[-3:] == before.input_ids and after.labels[-3:] == before.labels
        assert set(after.labels[:-3]) <= {-100} and len(after.input_ids) <= longest and after.num_end == 1
        used = [after.input_ids[start : start + 3] for start in range(0, len(after.input_ids) - 3, 3)]
        assert set(used) <= {each.input_ids for each in attacker} and len(set(used)) == len(used)
        assert len(used) == min(shots, len(attacker), longest // 3 - 1)
    assert found == with_shots(scored, attacker, shots=shots, seed=seed, longest=longest)


def test_eight_bits_leave_at_most_half_a_level_of_the_row_and_four_bits_sixteen_values_of_a_block() -> None:
    weight = normal(0, 6, 128)
    weight[2] = 0
    level = weight.abs().amax(dim=1, keepdim=True) / 127
    found = rounded_to_8_bits(weight)
    assert ((found - weight).abs() <= 0.501 * level).all() and not (found == weight).all()
    assert ((found / level.clamp(min=1e-30)).round() - found / level.clamp(min=1e-30)).abs().max() < 1e-3
    for rounded in (rounded_to_4_bits, rounded_in_groups):
        blocks = rounded(weight).flatten().unflatten(0, (-1, 64))
        assert all(len(block.unique()) <= 16 for block in blocks)
        assert (rounded(weight) - weight).norm() < 0.2 * weight.norm()


def test_weights_keep_shape_and_dtype() -> None:
    weight = normal(1, 3, 5, 7).bfloat16()
    for rounded in (rounded_to_8_bits, rounded_to_4_bits, rounded_in_groups):
        assert rounded(weight).shape == weight.shape and rounded(weight).dtype == weight.dtype


def test_four_bits_do_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    weight = normal(2, 4, 64)
    assert (rounded_to_4_bits(weight) == rounded_in_groups(weight)).all()
