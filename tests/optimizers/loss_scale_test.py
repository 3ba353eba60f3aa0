"""Keras's dynamic loss scale, updated without Keras's step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_adascale.optimizers import loss_scale


def loss_scaled(**kwargs):
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), **kwargs
    )
    optimizer.build([])
    return optimizer


def test_a_plain_optimizer_has_a_static_factor_or_none():
    assert loss_scale.factor(keras.optimizers.SGD()) is None
    sgd = keras.optimizers.SGD(loss_scale_factor=8.0)
    assert loss_scale.factor(sgd) == 8.0
    assert loss_scale.unwrap(sgd) is sgd
    assert loss_scale.assignments(sgd, finite=True) == []
    assert loss_scale.assignments(sgd, finite=False) == []


def test_a_dynamic_factor_is_the_scale_of_now():
    optimizer = loss_scaled(initial_scale=64.0)
    optimizer.dynamic_scale.assign(16.0)
    assert float(loss_scale.factor(optimizer)) == 16.0


@pytest.mark.parametrize("growth_steps", [1, 3])
def test_scale_follows_that_of_keras(growth_steps):
    """The loss scale equals Keras's, which is right on one replica."""
    finite = np.random.default_rng(0).random(20) < 0.8
    arguments = {"initial_scale": 2.0**10, "dynamic_growth_steps": growth_steps}
    variable = keras.Variable([0.0])
    keras_way = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.0), **arguments
    )
    keras_way.build([variable])
    ours = loss_scaled(**arguments)
    for is_finite in finite:
        gradient = tf.constant([0.0 if is_finite else np.inf])
        keras_way.apply([gradient], [variable])
        for target, value in loss_scale.assignments(
            ours, finite=bool(is_finite)
        ):
            target.assign(value)
        assert float(loss_scale.factor(ours)) == float(
            loss_scale.factor(keras_way)
        )
        assert int(ours.step_counter.numpy()) == int(
            keras_way.step_counter.numpy()
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_division_is_wide(dtype):
    """The loss scale may exceed float16's largest number, 65504."""
    gradient = tf.constant([32768.0, -1024.0], dtype)
    divided = loss_scale.unscale(gradient, tf.constant(65536.0))
    # As Keras divides: a fraction that float16 lacks is not lost.
    assert divided.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_array_equal(tf.cast(divided, "float64"), [0.5, -0.015625])
    static = loss_scale.unscale(gradient, 65536.0)
    assert static.dtype == dtype
    np.testing.assert_array_equal(tf.cast(static, "float64"), [0.5, -0.015625])


def test_division_keeps_a_sparse_gradient_sparse():
    gradient = tf.IndexedSlices(tf.constant([[2.0], [4.0]]), [3, 1], [5, 1])
    divided = loss_scale.unscale(gradient, 2.0)
    np.testing.assert_array_equal(divided.values, [[1.0], [2.0]])
    assert divided.indices is gradient.indices
    assert divided.dense_shape is gradient.dense_shape


def test_division_by_nothing_returns_the_gradient():
    gradient = tf.ones(2)
    assert loss_scale.unscale(gradient, None) is gradient
