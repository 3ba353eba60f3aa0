"""Losses that a mean over micro-batches does not suit.

`fidelity_test.py` trains with them.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileLoss

from tests import harness
from tf_adascale.training import losses

SUM = keras.losses.MeanAbsoluteError(reduction="sum")
MEAN = keras.losses.MeanAbsoluteError()

Y = np.zeros((4, 1), "float32")
PREDICTED = np.array([[1.0], [2.0], [4.0], [1.0]], "float32")


def multiplied(*arguments, factor=3, **keywords):
    compiled = CompileLoss(*arguments, **keywords)
    losses.multiply_sums(compiled, lambda: factor)
    return compiled


def marked(y, predicted):
    """Keras averages a function's results, whatever its attributes."""
    return abs(predicted - y)


marked.reduction = "sum"


class Sum(keras.losses.Loss):
    def __init__(self, reduction="sum", **settings):
        super().__init__(reduction=reduction, **settings)

    def call(self, y_true, y_pred):
        return abs(y_pred - y_true)[:, 0]


@pytest.mark.parametrize(
    "loss", ["mae", MEAN, keras.losses.MeanAbsoluteError, marked]
)
def test_a_mean_is_as_it_was(loss):
    assert float(multiplied(loss)(Y, PREDICTED)) == 2.0


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("loss", [SUM, Sum, Sum()])
def test_a_sum_counts_several_times(loss, factor):
    compiled = multiplied(loss, factor=factor)
    assert float(compiled(Y, PREDICTED)) == 8.0 * factor
    weights = np.array([1.0, 0.5, 0.0, 0.0], "float32")
    assert float(compiled(Y, PREDICTED, weights)) == 2.0 * factor


def test_the_factor_is_that_of_the_call():
    factors = iter([2, 5])
    compiled = CompileLoss(SUM)
    losses.multiply_sums(compiled, lambda: next(factors))
    assert [float(compiled(Y, PREDICTED)) for _ in range(2)] == [16.0, 40.0]


@pytest.mark.parametrize("loss", [[SUM, MEAN, SUM], (SUM, "mae", SUM)])
def test_of_several_outputs_the_weighted_sum(loss):
    compiled = multiplied(loss, [2.0, 10.0, 0.5], output_names=["a", "b", "c"])
    # 3 * 2 * 8 + 10 * 2 + 3 * 0.5 * 16.
    outputs = [PREDICTED, PREDICTED, 2 * PREDICTED]
    assert float(compiled([Y] * 3, outputs)) == 92.0
    logs = {metric.name: float(metric.result()) for metric in compiled.metrics}
    assert logs == {"a_loss": 24.0, "b_loss": 2.0, "c_loss": 48.0}


def test_of_outputs_by_name():
    compiled = multiplied(
        {"a": MEAN, "b": SUM}, {"a": 10.0, "b": 3.0}, output_names=["a", "b"]
    )
    received = compiled({"a": Y, "b": Y}, {"a": PREDICTED, "b": PREDICTED})
    assert float(received) == 92.0  # 10 * 2 + 3 * 3 * 8.


def test_a_mask_reaches_the_loss():
    predicted = tf.constant(PREDICTED)
    predicted._keras_mask = tf.constant([True, False, True, False])
    assert float(multiplied(SUM)(Y, predicted)) == 15.0  # 3 * (1 + 4).


@pytest.mark.parametrize("loss", [0.0, tf.constant(1.0), tf.ones(1)])
def test_a_scalar_may_be_averaged(loss):
    losses.check_is_scalar(loss)


def test_a_loss_per_example_is_refused():
    rule = "`compute_loss` must return a scalar with several micro-batches"
    with harness.refused(rule, "a loss of shape (4, 1)"):
        losses.check_is_scalar(tf.constant(Y))


@pytest.mark.parametrize(
    "loss", [None, "mse", SUM, [MEAN, "mse"], {"a": SUM}, lambda y, x: x]
)
def test_losses_with_a_reduction(loss):
    losses.check(loss)
