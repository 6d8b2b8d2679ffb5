"""Every check returns its value when it holds, and otherwise says what is wrong, what was expected and what to do."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_simu._checks import check_choice, check_count, check_number, problem

bounds = st.floats(-10, 10)


def test_a_message_says_what_is_wrong_what_was_expected_and_what_to_do_next():
    assert problem("x is 3", "2", "Try 2.") == "x is 3, expected 2. Try 2."
    assert problem("x is 3", "2") == "x is 3, expected 2."


class TestNumbers:
    @given(st.floats() | st.integers(-20, 20), bounds, bounds, st.booleans(), st.booleans())
    def test_a_number_passes_exactly_when_it_is_finite_and_inside(self, value, low, high, low_open, high_open):
        inside = math.isfinite(value) and low <= value <= high
        inside = inside and not (low_open and value == low) and not (high_open and value == high)

        def check():
            return check_number("x", value, low=low, high=high, low_open=low_open, high_open=high_open)

        if inside:
            assert check() == value and type(check()) is float
        else:
            with pytest.raises(ValueError, match=rf"^x is {re.escape(repr(value))}, expected a finite number in [\[(]"):
                check()

    @pytest.mark.parametrize(
        ("arguments", "interval"),
        [
            ({}, "[0, inf)"),
            ({"low_open": True}, "(0, inf)"),
            ({"high": 1.0}, "[0, 1]"),
            ({"high": 1.0, "high_open": True}, "[0, 1)"),
            ({"low": -0.5, "high": 2.5}, "[-0.5, 2.5]"),
        ],
    )
    def test_the_message_names_the_interval(self, arguments, interval):
        with pytest.raises(ValueError, match=rf"^x is -7, expected a finite number in {re.escape(interval)}\.$"):
            check_number("x", -7, **arguments)

    @pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j])
    def test_what_is_no_number_is_refused_by_its_type(self, value):
        with pytest.raises(TypeError, match=rf"^x is .* of type {type(value).__name__}, expected a number in \[0, inf"):
            check_number("x", value)


class TestCounts:
    @given(st.integers(), st.integers())
    def test_a_whole_number_passes_from_the_lowest_on(self, value, low):
        if value >= low:
            assert check_count("n", value, low=low) == value
        else:
            with pytest.raises(ValueError, match=rf"^n is {value}, expected a whole number >= {low}\.$"):
                check_count("n", value, low=low)

    @pytest.mark.parametrize("value", [True, 1.0, "1", None])
    def test_what_is_no_whole_number_is_refused_by_its_type(self, value):
        with pytest.raises(TypeError, match=rf"^n is .* of type {type(value).__name__}, expected a whole number >= 1"):
            check_count("n", value)


class TestChoices:
    @given(st.sampled_from(["left", "midpoint", "right"]))
    def test_a_choice_is_returned(self, choice):
        assert check_choice("rule", choice, ("left", "midpoint", "right")) == choice

    def test_a_near_miss_is_refused_with_a_suggestion(self):
        expected = "rule is 'midpont', expected one of 'left', 'midpoint', 'right'. Did you mean 'midpoint'?"
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            check_choice("rule", "midpont", ("left", "midpoint", "right"))

    @pytest.mark.parametrize("value", ["zzz", 3, None, [1]])
    def test_anything_else_is_refused_without_one(self, value):
        with pytest.raises(ValueError, match=r"expected one of 'left', 'right'\.$"):
            check_choice("rule", value, ("left", "right"))
