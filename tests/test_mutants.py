"""The laws of the core fail on implementations that break them, and hold on the right one with the same arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests import laws, mutants
from tests.ground import test_curvature, test_neurons
from tests.strategies import Layer, Options
from torch_simu import NeuronSelection, SIMUOptimizer, gauss_newton_loss
from torch_simu._files import load_tensors
from torch_simu.curvature import scored_logits

SEEDS = (0, 1, 2)
OPTIONS = Options(lr=0.05, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=0.1, clip=0.5, interval=2)


def layer(seed: int, neurons: tuple[int, ...] = (1, 4)) -> Layer:
    """A small layer, of the layout that the seed says."""
    return Layer(num_neurons=6, width=3, dim=(-1, 0)[seed % 2], contiguous=seed < 2, neurons=neurons, seed=seed)


def assert_killed(law: Callable[..., None], right: Any, mutant: Any, cases: list[tuple], **extra: Any) -> None:
    """The law holds on the right implementation in every case, and fails on the mutant in one at least."""
    for case in cases:
        law(right, *case, **extra)

    def all_cases(implementation):
        for case in cases:
            law(implementation, *case, **extra)

    with mutants.implementation(mutant) as implementation, pytest.raises(AssertionError):
        all_cases(implementation)


def refuses_another_selection(implementation: laws.Implementation, seed: int) -> None:
    """Law 5, last part: state of other neurons is refused, also where the shapes are the same."""
    param, optimizer = laws.make(implementation, layer(seed), OPTIONS)
    laws.train(param, optimizer, seed, 0, 2)
    _, other = laws.make(implementation, layer(seed, neurons=(1, 3)), OPTIONS)
    try:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    except ValueError:
        return
    raise AssertionError("the state of another selection was loaded")


class TestOptimizer:
    @pytest.mark.parametrize(
        ("mutant", "dtype"),
        [
            (mutants.DecaysEveryColumn, torch.float32),
            (mutants.DecaysEveryColumn, torch.bfloat16),
            (mutants.steps_beside_the_neurons, torch.float32),
            (mutants.TakesTheOtherDimension, torch.float32),
            (mutants.RoundsTheWholeWeight, torch.float32),
        ],
    )
    def test_law_1_fails_when_other_weights_move(self, mutant, dtype):
        # In bfloat16 a small decay is lost by rounding, so the law is shown at a large one.
        strong = Options(lr=0.5, beta1=0.5, beta2=0.9, rho=1.0, weight_decay=1.0, clip=0.5, interval=2)
        cases = [(layer(seed, (0, 2)), strong, dtype, seed) for seed in SEEDS]
        assert_killed(laws.unselected_weights_stay, SIMUOptimizer, mutant, cases)

    @pytest.mark.parametrize("mutant", [mutants.keeps_dense_state, mutants.keeps_a_third_moment])
    def test_law_2_fails_on_state_that_is_not_compact(self, mutant):
        cases = [(layer(seed), OPTIONS, seed) for seed in SEEDS]
        assert_killed(laws.state_is_compact, SIMUOptimizer, mutant, cases)

    @pytest.mark.parametrize(
        "mutant",
        [
            mutants.forgets_to_clip,
            mutants.decays_without_the_step_size,
            mutants.updates_momentum_twice,
            mutants.ForgetsTheBatchFactor,
            mutants.SwapsTheBetas,
            mutants.SquaresEveryGradient,
            mutants.FoldsCurvatureInLate,
            mutants.RefreshesOneIntervalLate,
            mutants.IsAlwaysDue,
            mutants.DecaysEveryColumn,
            mutants.steps_beside_the_neurons,
        ],
    )
    def test_law_3_fails_on_steps_of_another_method(self, mutant):
        cases = [(layer(seed), OPTIONS, seed) for seed in SEEDS]
        assert_killed(laws.steps_match_the_reference, SIMUOptimizer, mutant, cases)

    @pytest.mark.parametrize("forgotten", ["_foreach_clamp_min_", "_foreach_clamp_max_", "_foreach_lerp_"])
    def test_law_3_fails_on_fused_kernels_that_leave_one_out(self, forgotten, monkeypatch):
        cases = [(layer(seed), OPTIONS, seed) for seed in SEEDS]

        def mutant(*args, **options):
            monkeypatch.setattr(torch, forgotten, lambda *_: None)
            return SIMUOptimizer(*args, **options)

        assert_killed(laws.steps_match_the_reference, SIMUOptimizer, mutant, cases, foreach=True)

    def test_law_4_fails_on_steps_that_are_not_clipped(self):
        cases = [(layer(seed), OPTIONS, seed, 1.0) for seed in SEEDS]
        assert_killed(laws.steps_are_bounded, SIMUOptimizer, mutants.forgets_to_clip, cases)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        "mutant", [mutants.forgets_the_finite_check, mutants.replaces_nan_by_zero, mutants.skips_in_silence]
    )
    def test_law_4_fails_when_a_non_finite_gradient_goes_through(self, mutant, bad):
        cases = [(layer(seed), OPTIONS, seed, bad) for seed in SEEDS]
        assert_killed(laws.non_finite_gradients_change_nothing, SIMUOptimizer, mutant, cases)

    @pytest.mark.parametrize(
        ("mutant", "extra"),
        [
            (mutants.LoadsWithTheBaseClassOnly, {}),
            (mutants.ForgetsTheRefreshCounter, {}),
            (mutants.RestartsTheSteps, {}),
            (mutants.ForgetsTheMasterWeights, {"master_weights": True}),
            (mutants.draws_another_rounding_after_loading, {"stochastic_rounding": True}),
        ],
    )
    def test_law_5_fails_when_loading_loses_something(self, mutant, extra):
        cases = [(layer(seed), OPTIONS, torch.bfloat16, seed) for seed in SEEDS]
        assert_killed(laws.reload_continues_identically, SIMUOptimizer, mutant, cases, **extra)

    @pytest.mark.parametrize("mutant", [mutants.accepts_another_selection, mutants.LoadsWithTheBaseClassOnly])
    def test_law_5_fails_when_another_selection_is_loaded(self, mutant):
        assert_killed(refuses_another_selection, SIMUOptimizer, mutant, [(seed,) for seed in SEEDS])


def with_true_labels(logits, labels, *, generator=None):
    """The empirical Fisher: the loss on the labels of the data."""
    logits, labels = scored_logits(logits, labels)
    return functional.cross_entropy(logits, labels), labels.numel()


def with_likeliest_labels(logits, labels, *, generator=None):
    """The loss on the model's first choice, without sampling."""
    logits, labels = scored_logits(logits, labels)
    return functional.cross_entropy(logits, logits.argmax(-1)), labels.numel()


def with_every_position(logits, labels, *, generator=None):
    """Counts positions that are not scored."""
    loss, _ = gauss_newton_loss(logits, labels, generator=generator)
    return loss, labels.numel()


def with_a_sum(logits, labels, *, generator=None):
    """The summed instead of the mean loss."""
    loss, num_tokens = gauss_newton_loss(logits, labels, generator=generator)
    return loss * num_tokens, num_tokens


def without_the_shift(logits, labels):
    """Pairs a logit with the label at its own position."""
    scored = labels != -100
    return logits[scored], labels[scored]


class TestCurvature:
    @pytest.mark.parametrize(
        ("replaced", "mutant", "law", "cases"),
        [
            ("gauss_newton_loss", with_true_labels, "labels_only_say_which_positions_count", [(0, 2, 4), (1, 1, 3)]),
            ("gauss_newton_loss", with_true_labels, "the_estimate_is_unbiased", [(0, 4)]),
            ("gauss_newton_loss", with_likeliest_labels, "the_estimate_is_unbiased", [(0, 4)]),
            ("gauss_newton_loss", with_every_position, "labels_only_say_which_positions_count", [(0, 2, 4)]),
            ("gauss_newton_loss", with_a_sum, "the_estimate_is_unbiased", [(0, 4)]),
            ("bartlett_diagonal", lambda g, n: g.square(), "the_estimate_is_unbiased", [(0, 4)]),
            ("bartlett_diagonal", lambda g, n: n * g.abs(), "the_estimate_is_unbiased", [(0, 4)]),
            ("scored_logits", without_the_shift, "logits_are_paired_with_the_label_one_position_later", [(0,), (1,)]),
        ],
    )
    def test_the_laws_fail_on_another_estimate(self, replaced, mutant, law, cases, monkeypatch):
        right = getattr(test_curvature, replaced)
        check = getattr(test_curvature, f"test_{law}").hypothesis.inner_test

        def with_implementation(implementation, *case):
            monkeypatch.setattr(test_curvature, replaced, implementation)
            check(*case)

        assert_killed(with_implementation, right, mutant, cases)


class CountsDuplicates(NeuronSelection):
    """Counts an index as often as it was given."""

    def __init__(self, neurons, num_neurons):
        neurons = {layer: list(chosen) for layer, chosen in neurons.items()}
        super().__init__(neurons, num_neurons)
        self._indices = {layer: tuple(sorted(neurons.get(layer, ()))) for layer in self._indices}


class KeepsTheOrderGiven(NeuronSelection):
    """Does not sort."""

    def __init__(self, neurons, num_neurons):
        neurons = {layer: [int(index) for index in chosen] for layer, chosen in neurons.items()}
        super().__init__(neurons, num_neurons)
        self._indices = {layer: tuple(dict.fromkeys(neurons.get(layer, ()))) for layer in self._indices}


class HandsOutItsOwnTensors(NeuronSelection):
    """Returns the same tensor every time, so that a caller can change the selection."""

    def __getitem__(self, layer):
        return self.__dict__.setdefault(layer, super().__getitem__(layer))


class HashesByIdentity(NeuronSelection):
    """Equal selections hash differently."""

    def __hash__(self):
        return id(self)


class IgnoresTheSizes(NeuronSelection):
    """Takes selections of differently large layers as equal."""

    def __eq__(self, other):
        return isinstance(other, NeuronSelection) and self._indices == other._indices

    __hash__ = NeuronSelection.__hash__


class SubtractsTheWrongWay(NeuronSelection):
    """Returns what only the other has."""

    def __sub__(self, other):
        return NeuronSelection.__sub__(other, self)


class MasksOneTooFar(NeuronSelection):
    """Marks the neuron after each selected one."""

    def mask(self, layer):
        return super().mask(layer).roll(1)


class LoadsUnchecked(NeuronSelection):
    """Takes the file's indices as they are."""

    @classmethod
    def load(cls, path):
        tensors, header = load_tensors(path, "NeuronSelection")
        return NeuronSelection(tensors, dict.fromkeys(header["num_neurons"], 8))


ONE, TWO = {"a.down": {0, 3}, "c": {7, 1, 2}}, {"a.down": {3, 4}, "b.down": {0}}


class TestSelection:
    @pytest.mark.parametrize(
        ("mutant", "group", "law", "arguments"),
        [
            (CountsDuplicates, "Content", "indices_are_sorted_and_without_duplicates_whatever_they_came_as", "list"),
            (KeepsTheOrderGiven, "Content", "indices_are_sorted_and_without_duplicates_whatever_they_came_as", "list"),
            (MasksOneTooFar, "Content", "counts_masks_and_fraction_agree_with_the_sets", (ONE,)),
            (HandsOutItsOwnTensors, "Immutability", "nothing_that_goes_in_or_comes_out_is_shared", (ONE,)),
            (HashesByIdentity, "Equality", "equal_and_equally_hashed_exactly_when_the_content_is", (ONE, ONE)),
            (IgnoresTheSizes, "Equality", "the_order_of_the_layers_does_not_matter_and_their_sizes_do", (ONE,)),
            (SubtractsTheWrongWay, "Algebra", "the_operators_are_those_of_sets_layer_by_layer", (ONE, TWO)),
            (LoadsUnchecked, "Files", "a_saved_selection_is_loaded_as_it_was", "saved"),
        ],
    )
    def test_the_laws_fail_on_another_set(self, mutant, group, law, arguments, monkeypatch, tmp_path):
        check = getattr(getattr(test_neurons, f"Test{group}"), f"test_{law}").hypothesis.inner_test

        def with_implementation(implementation, number):
            monkeypatch.setattr(test_neurons, "NeuronSelection", implementation)
            if arguments == "list":
                case: tuple = (ONE, Reversing(), "list")
            elif arguments == "saved":
                case = (tmp_path, NeuronSelection(ONE, test_neurons.SIZES))
            else:
                case = arguments
            check(None, *case)

        assert_killed(with_implementation, NeuronSelection, mutant, [(number,) for number in range(2)])


class Reversing:
    """A random source whose shuffle turns the list around."""

    def shuffle(self, values: list[int]) -> None:
        """Turn the list around in place."""
        values.reverse()
