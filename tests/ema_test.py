"""The moving average of weights: closed forms, and one memory at all scales."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tf_adascale import ema


def float64(value):
    return tf.constant(value, tf.float64)


def test_scaled_momentum():
    # 0.9^1 = 0.9, 0.9^2 = 0.81, 0.9^0.5 = 0.948683...
    for gain, expected in [(1.0, 0.9), (2.0, 0.81), (0.5, 0.9**0.5)]:
        momentum = ema.scaled_momentum(0.9, float64(gain))
        np.testing.assert_allclose(momentum, expected, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999, 1.0])
def test_gain_1_leaves_the_momentum_to_the_bit(momentum):
    for dtype in ("float32", "float64"):
        scaled = ema.scaled_momentum(momentum, tf.ones((), dtype))
        assert scaled.dtype == dtype
        assert scaled.numpy() == np.asarray(momentum, dtype)


def test_averaged():
    # 0.75 * (4, 8) + 0.25 * (8, 0) = (5, 6).
    average = ema.averaged(
        tf.constant([4.0, 8.0]), tf.constant([8.0, 0.0]), tf.constant(0.75)
    )
    assert average.numpy().tolist() == [5.0, 6.0]


def test_momentum_0_starts_the_average():
    value = tf.constant([0.1, -3e7])
    average = ema.averaged(tf.zeros(2), value, 0.0)
    assert np.array_equal(average, value)


def test_momentum_takes_the_type_of_the_average():
    # bfloat16 holds all of these: 0.5 * 2 + 0.5 * 4 = 3.
    average = ema.averaged(
        tf.constant(2.0, tf.bfloat16),
        tf.constant(4.0, tf.bfloat16),
        tf.constant(0.5, tf.float32),
    )
    assert average.dtype == tf.bfloat16
    assert float(average) == 3.0


@pytest.mark.parametrize("gain", [2, 3, 8])
def test_one_step_at_a_gain_forgets_as_much_as_that_many_base_steps(gain):
    value = float64(5.0)
    base = float64(1.0)
    for _ in range(gain):
        base = ema.averaged(base, value, 0.9)
    scaled = ema.averaged(
        float64(1.0), value, ema.scaled_momentum(0.9, float64(float(gain)))
    )
    np.testing.assert_allclose(scaled, base, rtol=1e-12)


def test_memory_depends_on_the_sum_of_the_gains_only():
    # rho^1.5 rho^2.25 rho^0.25 = rho^4, in every order.
    for gains in itertools.permutations([1.5, 2.25, 0.25]):
        average = float64(1.0)
        for gain in gains:
            momentum = ema.scaled_momentum(0.8, float64(gain))
            average = ema.averaged(average, float64(0.0), momentum)
        np.testing.assert_allclose(average, 0.8**4, rtol=1e-12)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_function(jit_compile):
    @tf.function(jit_compile=jit_compile)
    def step(average, value, gain):
        return ema.averaged(average, value, ema.scaled_momentum(0.5, gain))

    # 0.5^3 = 1/8: 8/8 + 16 * 7/8 = 15.
    average = step(tf.constant(8.0), tf.constant(16.0), tf.constant(3.0))
    np.testing.assert_allclose(average, 15.0, rtol=1e-6)
