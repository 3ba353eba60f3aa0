"""Checks of arguments: accepted values, refused values and messages."""

import fractions
import math

import numpy as np
import pytest

from tests import harness
from tf_adascale.ops import _arguments

NO_NUMBERS = ["1", None, True, math.nan, math.inf, -math.inf, 10**400, [1], 1j]


@pytest.mark.parametrize(
    "check, accepted, refused",
    [
        (
            _arguments.positive_number,
            [1, 0.5, 1e-300, np.float32(2), np.int64(3), fractions.Fraction(1)],
            [0, -1, *NO_NUMBERS],
        ),
        (_arguments.nonnegative_number, [0, 2.5], [-1e-9, *NO_NUMBERS]),
        (
            lambda *a: _arguments.number_in(*a, interval="[0, 1)"),
            [0, 0.5],
            [-0.1, 1, *NO_NUMBERS],
        ),
        (
            lambda *a: _arguments.number_in(*a, interval="(0, 1]"),
            [0.5, 1],
            [0, 1.1, *NO_NUMBERS],
        ),
        (
            _arguments.integer,
            [1, np.int64(5), 2**70],
            [0, -1, 1.0, *NO_NUMBERS[:6]],
        ),
        (
            lambda *a: _arguments.integer(*a, least=-1),
            [-1],
            [-2],
        ),
        (
            lambda *a: _arguments.one_of(*a, choices=["a", "b"]),
            ["a", "b"],
            ["c", "", None, ["a"]],
        ),
    ],
    ids=["positive", "nonnegative", "[0, 1)", "(0, 1]", ">= 1", ">= -1", "of"],
)
def test_a_check_returns_what_it_accepts(check, accepted, refused):
    for value in accepted:
        checked = check("name", value)
        assert checked == value
        assert type(checked) in (float, int, str)
    for value in refused:
        with harness.refused("`name` must be ", f"name={value!r}"):
            check("name", value)


def test_the_first_sentence_says_what_the_argument_means():
    with pytest.raises(
        ValueError,
        match=r"^`scale` must be a finite number > 0: the batch\. "
        r"Received: scale=-1$",
    ):
        _arguments.positive_number("scale", -1, "the batch")
