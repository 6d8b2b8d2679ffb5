"""Pairs are a pure function of the seed and the index, and no row of either set is left out."""

from __future__ import annotations

import pytest
import torch

from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, SEED
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.data.pairs import ForgetRetainPairs, Pair, PairCollator


def test_pairs_in_order_are_the_batches_of_both_sets():
    pairs = ForgetRetainPairs(FORGET, RETAIN, seed=SEED, num_pairs=40)
    for step in range(10):
        batch = PairCollator()([pairs[index] for index in range(4 * step, 4 * step + 4)])
        for name, rows, seed in (("forget", FORGET, 3 * SEED), ("retain", RETAIN, 3 * SEED + 1)):
            torch.testing.assert_close(batch[name], Batches(rows, 4, seed).batch(step))


def test_a_pair_depends_on_the_seed_and_the_index_alone():
    pairs = ForgetRetainPairs(FORGET, RETAIN, num_pairs=30)
    forward = list(pairs)
    assert len(forward) == 30 and [pairs[index] for index in reversed(range(30))] == forward[::-1]
    assert list(ForgetRetainPairs(FORGET, RETAIN, num_pairs=30, seed=1)) != forward
    default = ForgetRetainPairs(FORGET, RETAIN)
    assert {pair.retain for pair in default} == set(RETAIN) and {pair.forget for pair in default} == set(FORGET)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForgetRetainPairs([], RETAIN), "The forget set is empty, expected at least one example"),
        (lambda: ForgetRetainPairs(FORGET, []), "The retain set is empty, expected at least one example"),
        (lambda: ForgetRetainPairs(FORGET, RETAIN, num_pairs=0), "num_pairs is 0"),
        (lambda: ForgetRetainPairs(FORGET, RETAIN)[9], "index is 9, expected 0 <= index < 9"),
        (lambda: ForgetRetainPairs(FORGET, RETAIN)[-1], "index is -1"),
        (lambda: PairCollator()([{"labels": [1]}]), "The batch holds dict, expected Pair or Example"),
        (lambda: PairCollator()([Pair(*FORGET[:2]), FORGET[0]]), "The batch holds Example, Pair"),
    ],
)
def test_wrong_pairs_are_refused(make, message):
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        make()
