"""Columns are the entries of a tensor whose neuron is selected, and nothing but those is ever written."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import normal, seeds
from torch_simu.columns import Columns, compact_shape, dims_of, neurons_first, num_columns

pytestmark = pytest.mark.usefixtures("device")


@st.composite
def cases(draw):
    """A shape, what counts its neurons, and some of them, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    places = st.sampled_from(range(-len(shape), len(shape)))
    several = st.lists(places, min_size=1, max_size=len(shape), unique_by=lambda each: each % len(shape)).map(tuple)
    dim = draw(st.one_of(places, several))
    count = len(list(neurons_of(shape, dim)))
    return shape, dim, draw(st.lists(st.integers(0, count - 1), unique=True))


def neurons_of(shape, dim):
    """The neuron of a tensor at each place along the dimensions that count it, counted by hand."""
    return itertools.product(*(range(shape[each]) for each in dims_of(dim)))


def entries(shape, dim, neuron):
    """The places of a neuron's entries, in order."""
    coordinates = list(neurons_of(shape, dim))[neuron]
    dims = [each % len(shape) for each in dims_of(dim)]
    for place in itertools.product(*map(range, shape)):
        if all(place[each] == where for each, where in zip(dims, coordinates, strict=True)):
            yield place


def naive_gather(tensor, dim, neurons):
    """One neuron after another; along one dimension they go back to where that dimension was."""
    rest = [size for each, size in enumerate(tensor.shape) if each not in [d % tensor.dim() for d in dims_of(dim)]]
    parts = [
        torch.tensor([tensor[place] for place in entries(tensor.shape, dim, k)], dtype=tensor.dtype) for k in neurons
    ]
    first = torch.stack(parts).reshape(len(neurons), *rest) if neurons else tensor.new_zeros(0, *rest)
    return first.movedim(0, dim) if isinstance(dim, int) else first


def mask_of(shape, dim, neurons):
    """True at each selected entry."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for neuron in neurons:
        for place in entries(shape, dim, neuron):
            mask[place] = True
    return mask


def columns(dim, neurons):
    return Columns(dim, torch.tensor(neurons, dtype=torch.int64))


@given(cases(), seeds)
def test_gathering_takes_the_entries_of_each_neuron(case, seed):
    shape, dim, neurons = case
    tensor = normal(seed, *shape)
    found = columns(dim, neurons).gather(tensor)
    assert torch.equal(found, naive_gather(tensor, dim, neurons))
    assert found.shape == columns(dim, neurons).shape_in(shape)
    assert num_columns(shape, dim) == len(list(neurons_of(shape, dim)))


@given(cases(), seeds)
def test_what_is_written_is_gathered_again_and_nothing_else_changes(case, seed):
    shape, dim, neurons = case
    tensor, chosen = normal(seed, *shape), columns(dim, neurons)
    before = tensor.clone()
    value = normal(seed + 1, *chosen.shape_in(shape))
    chosen.write_(tensor, value)
    assert torch.equal(chosen.gather(tensor), value)
    assert torch.equal(tensor[~mask_of(shape, dim, neurons)], before[~mask_of(shape, dim, neurons)])


@given(cases(), seeds, st.booleans())
def test_adding_is_gathering_and_writing_the_sum(case, seed, transposed):
    shape, dim, neurons = case
    tensor, chosen = normal(seed, *shape), columns(dim, neurons)
    if transposed:
        tensor = tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    expected, value = tensor.clone(), normal(seed + 1, *chosen.shape_in(shape))
    chosen.write_(expected, chosen.gather(expected) + value)
    chosen.add_(tensor, value)
    assert torch.equal(tensor, expected)


@given(cases(), seeds)
def test_flipping_the_same_bits_twice_changes_nothing(case, seed):
    shape, dim, neurons = case
    bits, chosen = normal(seed, *shape).view(torch.int32), columns(dim, neurons)
    before, change = bits.clone(), normal(seed + 1, *chosen.shape_in(shape)).view(torch.int32)
    chosen.xor_(bits, change)
    expected = torch.where(mask_of(shape, dim, neurons), bits, before)
    assert torch.equal(bits, expected)
    assert torch.equal(chosen.gather(bits), chosen.gather(before) ^ change)
    chosen.xor_(bits, change)
    assert torch.equal(bits, before)


@given(cases(), seeds)
def test_all_entries_are_the_tensor_itself(case, seed):
    shape, dim, _ = case
    tensor, every = normal(seed, *shape), Columns(dim, None)
    assert every.gather(tensor) is tensor
    assert every.shape_in(shape) == tensor.shape == compact_shape(shape, dim, None)
    before = tensor.clone()
    every.add_(tensor, torch.ones(shape))
    assert torch.equal(tensor, before + 1)
    every.write_(tensor, before)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(("dim", "shape"), [(-1, (4, 2, 3)), (1, (3, 2, 4)), ((0, 2), (2, 4, 3)), ((2, 0), (4, 2, 3))])
def test_neurons_first_moves_their_dimensions_and_shares_memory(dim, shape):
    tensor = torch.zeros(2, 3, 4)
    moved = neurons_first(tensor, dim)
    assert moved.shape == shape
    moved.fill_(1)
    assert tensor.all()
