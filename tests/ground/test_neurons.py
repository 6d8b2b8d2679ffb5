"""A NeuronSelection is a checked, immutable set of neurons per layer, with set algebra, files and parameter groups."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_simu import NeuronSelection
from torch_simu._files import save_tensors

SIZES = {"a.down": 5, "b.down": 1, "c": 8}
KINDS = {"list": list, "tuple": tuple, "iterator": iter, "tensor": lambda v: torch.tensor(v, dtype=torch.int16)}


@st.composite
def contents(draw: st.DrawFn) -> dict[str, set[int]]:
    """Neurons of some of the layers of `SIZES`, as sets."""
    chosen = draw(st.sets(st.sampled_from(sorted(SIZES))))
    return {layer: draw(st.sets(st.integers(0, SIZES[layer] - 1))) for layer in sorted(chosen)}


selections = contents().map(lambda neurons: NeuronSelection(neurons, SIZES))


def as_sets(selection: NeuronSelection) -> dict[str, set[int]]:
    """Every layer's neurons as a plain set."""
    return {layer: set(selection[layer].tolist()) for layer in selection}


class TestContent:
    @given(contents(), st.randoms(use_true_random=False), st.sampled_from(sorted(KINDS)))
    def test_indices_are_sorted_and_without_duplicates_whatever_they_came_as(self, neurons, random, kind):
        given_as = {}
        for layer, chosen in neurons.items():
            shuffled = [*chosen, *list(chosen)[:2]]
            random.shuffle(shuffled)
            given_as[layer] = KINDS[kind](shuffled)
        selection = NeuronSelection(given_as, SIZES)
        for layer in SIZES:
            assert selection[layer].tolist() == sorted(neurons.get(layer, ()))
            assert selection[layer].dtype == torch.int64

    @given(contents())
    def test_counts_masks_and_fraction_agree_with_the_sets(self, neurons):
        selection = NeuronSelection(neurons, SIZES)
        count = sum(map(len, neurons.values()))
        assert selection.num_selected == count
        assert selection.fraction == count / 14
        assert selection.num_neurons == SIZES
        assert repr(selection) == f"NeuronSelection(3 layers, {count} of 14 neurons, {100 * count / 14:.3g} %)"
        for layer, size in SIZES.items():
            mask = selection.mask(layer)
            assert mask.dtype == torch.bool and mask.shape == (size,)
            assert set(mask.nonzero()[:, 0].tolist()) == neurons.get(layer, set())

    @given(selections)
    def test_a_selection_is_the_one_its_masks_make(self, selection):
        assert NeuronSelection.from_masks({layer: selection.mask(layer) for layer in selection}) == selection

    @given(selections)
    def test_it_is_a_mapping_from_every_layer_to_its_indices(self, selection):
        assert list(selection) == list(SIZES) and len(selection) == 3
        assert "c" in selection and "d" not in selection and 3 not in selection
        assert {layer: set(index.tolist()) for layer, index in selection.items()} == as_sets(selection)

    def test_without_layers_it_is_empty(self):
        empty = NeuronSelection({}, {})
        assert (len(empty), empty.num_selected, empty.fraction) == (0, 0, 0.0)


class TestImmutability:
    @given(contents())
    def test_nothing_that_goes_in_or_comes_out_is_shared(self, neurons):
        sizes, chosen = dict(SIZES), {layer: torch.tensor(sorted(v)) for layer, v in neurons.items() if v}
        selection = NeuronSelection(chosen, sizes)
        before = hash(selection), as_sets(selection)
        sizes["c"] = 99
        for index in chosen.values():
            index.zero_()
        for layer in selection:
            selection[layer].fill_(0)
            selection.mask(layer).fill_(True)
        assert (hash(selection), as_sets(selection)) == before
        assert selection.num_neurons == SIZES

    def test_it_takes_no_assignment(self):
        selection = NeuronSelection({"c": [1]}, SIZES)
        with pytest.raises(TypeError):
            selection["c"] = torch.tensor([2])
        with pytest.raises(TypeError):
            selection.num_neurons["c"] = 3
        with pytest.raises(AttributeError):
            selection.fraction = 1.0
        with pytest.raises(AttributeError):
            selection.note = "mine"


class TestEquality:
    @given(contents(), contents())
    def test_equal_and_equally_hashed_exactly_when_the_content_is(self, one, two):
        first, second = NeuronSelection(one, SIZES), NeuronSelection(two, SIZES)
        same = all(one.get(layer, set()) == two.get(layer, set()) for layer in SIZES)
        assert (first == second) == same
        assert (first != second) != same
        assert len({first, second}) == (1 if same else 2)

    @given(contents())
    def test_the_order_of_the_layers_does_not_matter_and_their_sizes_do(self, neurons):
        selection = NeuronSelection(neurons, SIZES)
        turned = NeuronSelection(dict(reversed(neurons.items())), dict(reversed(SIZES.items())))
        assert selection == turned and hash(selection) == hash(turned)
        assert selection != NeuronSelection(neurons, {**SIZES, "c": 9})
        assert selection != NeuronSelection(neurons, {**SIZES, "d": 1})
        assert selection != as_sets(selection)

    @given(selections)
    def test_copies_and_pickles_are_equal(self, selection):
        for twin in (copy.copy(selection), copy.deepcopy(selection), pickle.loads(pickle.dumps(selection))):
            assert twin == selection and hash(twin) == hash(selection)


class TestAlgebra:
    @given(contents(), contents())
    def test_the_operators_are_those_of_sets_layer_by_layer(self, one, two):
        first, second = NeuronSelection(one, SIZES), NeuronSelection(two, SIZES)
        for layer in SIZES:
            a, b = one.get(layer, set()), two.get(layer, set())
            assert as_sets(first | second)[layer] == a | b
            assert as_sets(first & second)[layer] == a & b
            assert as_sets(first - second)[layer] == a - b

    @given(contents(), contents())
    def test_a_layer_that_one_side_lacks_has_no_neuron_there(self, one, two):
        first = NeuronSelection(one, SIZES)
        second = NeuronSelection({f"x.{layer}": v for layer, v in two.items()}, {f"x.{k}": v for k, v in SIZES.items()})
        assert (first | second).num_selected == first.num_selected + second.num_selected
        assert (first & second).num_selected == 0
        assert as_sets(first - second) == {**as_sets(first), **{layer: set() for layer in second}}

    def test_selections_of_other_sizes_or_kinds_do_not_mix(self):
        selection = NeuronSelection({}, SIZES)
        with pytest.raises(ValueError, match="Layer 'c' has 8 and 9 neurons, expected selections of the same model"):
            selection | NeuronSelection({}, {"c": 9})
        with pytest.raises(TypeError, match="unsupported operand"):
            selection - {"c": [1]}


class TestErrors:
    @pytest.mark.parametrize(
        ("neurons", "error", "message"),
        [
            ({"c": [8]}, ValueError, "Layer 'c' selects neuron 8, expected 0 <= index < 8. Was the selection made on"),
            ({"c": [0, -1]}, ValueError, "selects neuron -1, expected 0 <= index < 8"),
            ({"c": torch.tensor([9])}, ValueError, "selects neuron 9"),
            ({"d": [0]}, ValueError, "Layer 'd' has neurons but no size, expected num_neurons for each of"),
            ({"c": [1.0]}, TypeError, "selects neuron 1.0, expected whole numbers"),
            ({"c": [1, True]}, TypeError, "selects neuron True, expected whole numbers"),
            ({"c": "12"}, TypeError, "The neurons of layer 'c' are '12', expected an iterable of whole numbers"),
            ({"c": 3}, TypeError, "The neurons of layer 'c' are 3, expected an iterable"),
            ({"c": [[1]]}, TypeError, r"selects neuron \[1\], expected whole numbers"),
            ({"c": torch.ones(8)}, TypeError, "are torch.float32, expected whole numbers"),
            ({"c": torch.ones(8, dtype=torch.bool)}, TypeError, "are torch.bool, .* Use NeuronSelection.from_masks"),
        ],
    )
    def test_neurons_that_are_none_are_refused(self, neurons, error, message):
        with pytest.raises(error, match=message):
            NeuronSelection(neurons, SIZES)

    @pytest.mark.parametrize(
        ("size", "error", "message"),
        [
            (0, ValueError, r"num_neurons\['c'\] is 0, expected a whole number >= 1"),
            (2.0, TypeError, r"num_neurons\['c'\] is 2.0 of type float"),
        ],
    )
    def test_sizes_that_are_none_are_refused(self, size, error, message):
        with pytest.raises(error, match=message):
            NeuronSelection({}, {"c": size})

    @pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(3, 1, dtype=torch.bool)])
    def test_masks_that_are_none_are_refused(self, mask):
        with pytest.raises(ValueError, match=r"The mask of layer 'c' has dtype .* and shape .*, expected a 1-D bool"):
            NeuronSelection.from_masks({"c": mask})

    def test_an_unknown_layer_is_refused_with_the_known_ones(self):
        selection = NeuronSelection({}, {"c": 8})
        for ask in (selection.__getitem__, selection.mask):
            with pytest.raises(KeyError, match=r"Layer 'd' is not in the selection, expected one of \['c'\]"):
                ask("d")
        assert selection.get("d") is None


class TestFiles:
    @given(selections)
    def test_a_saved_selection_is_loaded_as_it_was(self, tmp_path, selection):
        selection.save(tmp_path / "s.safetensors")
        assert NeuronSelection.load(str(tmp_path / "s.safetensors")) == selection

    def test_a_selection_without_layers_is_loaded_as_it_was(self, tmp_path):
        NeuronSelection({}, {}).save(tmp_path / "s")
        assert NeuronSelection.load(tmp_path / "s") == NeuronSelection({}, {})

    @given(selections, st.data())
    def test_a_truncated_file_is_refused(self, tmp_path, selection, data):
        whole = saved_bytes(tmp_path, selection)
        (tmp_path / "s").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(ValueError, match=r"File '.*s' .*, expected"):
            NeuronSelection.load(tmp_path / "s")

    @given(selections, st.data())
    def test_a_file_with_a_damaged_byte_gives_a_clear_error_or_a_valid_selection(self, tmp_path, selection, data):
        whole = bytearray(saved_bytes(tmp_path, selection))
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        (tmp_path / "s").write_bytes(whole)
        try:
            loaded = NeuronSelection.load(tmp_path / "s")
        except ValueError as error:
            assert "expected" in str(error)
        else:
            assert all(0 <= index < loaded.num_neurons[layer] for layer in loaded for index in loaded[layer])

    @pytest.mark.parametrize(
        ("tensors", "header", "message"),
        [
            ({}, {}, "holds no consistent selection .* what NeuronSelection.save wrote. The file is damaged."),
            ({"c": torch.tensor([8])}, {"num_neurons": {"c": 8}}, "holds no consistent selection .*selects neuron 8"),
            ({"c": torch.ones(1)}, {"num_neurons": {"c": 8}}, "holds no consistent selection .*torch.float32"),
            ({}, {"num_neurons": 8}, "holds no consistent selection"),
        ],
    )
    def test_a_file_without_a_consistent_selection_is_refused(self, tmp_path, tensors, header, message):
        save_tensors(tmp_path / "s", "NeuronSelection", tensors, header)
        with pytest.raises(ValueError, match=message):
            NeuronSelection.load(tmp_path / "s")

    def test_another_kind_of_file_is_refused(self, tmp_path):
        save_tensors(tmp_path / "s", "Attribution", {}, {})
        with pytest.raises(ValueError, match=r"has kind 'Attribution', version 2, expected .* 'NeuronSelection'"):
            NeuronSelection.load(tmp_path / "s")

    def test_a_pickle_is_refused_and_not_executed(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return Path.touch, (tmp_path / "executed",)

        torch.save({"neurons": Trap()}, tmp_path / "s")
        (tmp_path / "p").write_bytes(pickle.dumps(Trap()))
        for name in ("s", "p"):
            with pytest.raises(ValueError, match="is unreadable"):
                NeuronSelection.load(tmp_path / name)
        assert not (tmp_path / "executed").exists()

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"File '.*none' does not exist, expected a torch_simu file of kind"
        ):
            NeuronSelection.load(tmp_path / "none")


def saved_bytes(folder: Path, selection: NeuronSelection) -> bytes:
    """The bytes of a saved selection."""
    selection.save(folder / "s")
    return (folder / "s").read_bytes()
