"""Batch `i` depends on the seed and on `i` alone, and no example is left out."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import seeds
from torch_simu.unlearning.data.batches import Batches, batches_in_order, batches_of_similar_length
from torch_simu.unlearning.data.examples import Example, collate

examples = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4)).map(
        lambda sizes: Example(
            tuple(range(1, sum(sizes) + 1)), (-100,) * sizes[0] + tuple(range(sizes[0] + 1, sum(sizes) + 1))
        )
    ),
    min_size=1,
    max_size=12,
)


@given(examples, st.integers(0, 9))
def test_collate_pads_on_the_right_and_masks_the_padding(batch, padding):
    result = collate(batch, padding)
    width = max(len(example.input_ids) for example in batch)
    for row, example in enumerate(batch):
        missing = width - len(example.input_ids)
        assert result["input_ids"][row].tolist() == [*example.input_ids, *[padding] * missing]
        assert result["labels"][row].tolist() == [*example.labels, *[-100] * missing]
        assert result["attention_mask"][row].tolist() == [1] * (width - missing) + [0] * missing
    assert {part.dtype for part in result.values()} == {torch.int64}


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="The batch is empty, expected at least one example"):
        collate([], 0)


@given(examples, st.integers(1, 15), seeds, st.integers(0, 30))
def test_a_batch_depends_on_seed_and_step_alone(items, batch_size, seed, step):
    whole = Batches(items, batch_size, seed)
    for earlier in range(3):
        whole.batch(earlier)
    resumed = Batches(items, batch_size, seed).batch(step)
    assert all(torch.equal(part, resumed[name]) for name, part in whole.batch(step).items())


@given(st.integers(1, 12), st.integers(1, 15), seeds)
def test_the_stream_is_one_permutation_after_another(count, batch_size, seed):
    items = [Example((1, i), (-100, i)) for i in range(count)]
    batches = Batches(items, batch_size, seed)
    steps = 3 * batches.steps_per_epoch
    stream = [index for step in range(steps) for index in batches.indices(step)]
    assert all(len(batches.indices(step)) == batch_size for step in range(steps))
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == list(range(count))
    assert set(stream[: batches.steps_per_epoch * batch_size]) == set(range(count))


def test_seeds_and_epochs_give_different_orders():
    items = [Example((1, i), (-100, i)) for i in range(20)]
    orders = {tuple(Batches(items, 20, seed).indices(step)) for seed in range(4) for step in range(4)}
    assert len(orders) == 16


def test_the_draws_are_those_of_random_sample_and_a_draw_costs_no_permutation():
    items = [Example((1, i), (-100, i)) for i in range(30_000)]
    batches = Batches(items, 4, seed=7)
    stream = [index for epoch in range(2) for index in random.Random(f"7 {epoch}").sample(range(30_000), 30_000)]
    for step in (0, 1, 7_499, 7_500):
        assert batches.indices(step) == stream[4 * step : 4 * step + 4]
    began = time.perf_counter()
    for step in range(1_000):
        # A new value for each step, as the driver makes them.
        Batches(items, 4, seed=7).indices(step)
    # A thousand permutations take more than ten seconds.
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], 2), "no example to draw, expected at least one"), (([Example((1,), (1,))], 0), "batch_size is 0")],
)
def test_batches_check_their_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(*arguments)
    with pytest.raises(ValueError, match="step is -1"):
        Batches([Example((1,), (1,))], 1).indices(-1)


@given(examples, st.integers(1, 5))
def test_batches_in_order_yield_each_example_once(items, batch_size):
    rows = [row[row > 0].tolist() for batch in batches_in_order(items, batch_size) for row in batch["input_ids"]]
    assert rows == [list(example.input_ids) for example in items]


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5))
def test_batches_of_similar_length_partition_the_indices_longest_first(lengths, batch_size):
    groups = batches_of_similar_length(lengths, batch_size)
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert all(len(group) <= batch_size for group in groups)
