"""The losses that Keras sums, apart from the others.

`fidelity_test.py` trains with them.
"""

import keras
import numpy as np
import pytest

from tf_adascale.training import losses

SUM = keras.losses.MeanAbsoluteError(reduction="sum")
MEAN = keras.losses.MeanAbsoluteError()

Y = np.zeros((3, 1), "float32")
PREDICTED = np.array([[1.0], [2.0], [4.0]], "float32")


@pytest.mark.parametrize(
    "loss",
    [None, "mse", MEAN, [MEAN, "mse"], {"a": MEAN}, lambda y, x: x],
    ids=["none", "name", "mean", "list", "dict", "function"],
)
def test_there_are_none(loss):
    assert losses.summed(loss, None, None) is None


def test_weights_of_examples_count():
    function = losses.summed(SUM, None, None)
    # 1 + 2 + 4, and 1 + 2 * 0.5.
    assert float(function(Y, PREDICTED, None)) == 7.0
    weights = np.array([1.0, 0.5, 0.0], "float32")
    assert float(function(Y, PREDICTED, weights)) == 2.0


@pytest.mark.parametrize("loss", [[SUM, MEAN, SUM], (SUM, "mse", SUM)])
def test_of_several_outputs_the_weighted_sum(loss):
    function = losses.summed(loss, [2.0, 100.0, 0.5], None)
    # 2 * 7 + 0.5 * 14.
    outputs = [PREDICTED, PREDICTED, 2 * PREDICTED]
    assert float(function([Y] * 3, outputs, None)) == 21.0


def test_of_outputs_by_name():
    function = losses.summed(
        {"a": MEAN, "b": SUM}, {"a": 100.0, "b": 3.0}, ["a", "b"]
    )
    received = function(
        {"a": Y, "b": Y}, {"a": PREDICTED, "b": PREDICTED}, None
    )
    assert float(received) == 21.0  # 3 * 7.
