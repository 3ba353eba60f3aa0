"""The moving average of weights: closed forms, equal memory at all scales."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tf_adascale.ops import ema as ema_ops


def float64(value):
    return tf.constant(value, tf.float64)


def line(steps, momentum, average):
    """Returns the average after base steps to 1, 2, ..., by definition."""
    for position in range(1, steps + 1):
        average = momentum * average + (1 - momentum) * position
    return average


def test_the_momentum_of_a_step_is_a_power_of_the_gain():
    # 0.9^1 = 0.9, 0.9^2 = 0.81, 0.9^0.5 = 0.948683...
    for gain, expected in [(1.0, 0.9), (2.0, 0.81), (0.5, 0.9**0.5)]:
        momentum = ema_ops.scaled_momentum(0.9, float64(gain))
        np.testing.assert_allclose(momentum, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gain_1_leaves_the_momentum_to_the_bit(dtype):
    for momentum in (0.0, 0.5, 0.99, 0.9999, 1.0):
        scaled = ema_ops.scaled_momentum(momentum, tf.ones((), dtype))
        assert scaled.dtype == dtype
        assert scaled.numpy() == np.asarray(momentum, dtype)


def test_an_average_is_updated():
    # 0.75 * (4, 8) + 0.25 * (8, 0) = (5, 6).
    average = ema_ops.update_average(
        tf.constant([4.0, 8.0]), tf.constant([8.0, 0.0]), tf.constant(0.75)
    )
    assert average.numpy().tolist() == [5.0, 6.0]


def test_momentum_0_starts_the_average():
    value = tf.constant([0.1, -3e7])
    average = ema_ops.update_average(tf.zeros(2), value, 0.0)
    assert np.array_equal(average, value)


def test_the_momentum_takes_the_type_of_the_average():
    # bfloat16 holds all of these: 0.5 * 2 + 0.5 * 4 = 3.
    average = ema_ops.update_average(
        tf.constant(2.0, tf.bfloat16),
        tf.constant(4.0, tf.bfloat16),
        tf.constant(0.5, tf.float32),
    )
    assert average.dtype == tf.bfloat16
    assert float(average) == 3.0


def test_memory_depends_on_the_sum_of_the_gains_only():
    # rho^1.5 rho^2.25 rho^0.25 = rho^4, in every order.
    for gains in itertools.permutations([1.5, 2.25, 0.25]):
        average = float64(1.0)
        for gain in gains:
            momentum = ema_ops.scaled_momentum(0.8, float64(gain))
            average = ema_ops.update_average(average, float64(0.0), momentum)
        np.testing.assert_allclose(average, 0.8**4, rtol=1e-12)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_function(jit_compile):
    @tf.function(jit_compile=jit_compile)
    def step(average, after, steps):
        return ema_ops.advance_average(
            average, tf.zeros_like(after), after, momentum=0.5, steps=steps
        )

    # 0, 0 and 0 + 1/2, then 1/4 + 2/2, then 5/8 + 3/2 = 17/8.
    average = step(tf.constant(0.0), tf.constant(3.0), tf.constant(3.0))
    np.testing.assert_allclose(average, 17 / 8, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 5000])
def test_one_step_averages_like_the_base_steps_it_stands_for(momentum, steps):
    expected = line(steps, momentum, average=-3.0)
    # In float32, 1 - rho is rounded: for 0.9999 by 3e-8 of 1e-4.
    for dtype, rtol in (("float64", 1e-11), ("float32", 3e-4)):
        received = ema_ops.advance_average(
            tf.constant(-3.0, dtype),
            tf.constant(0.0, dtype),
            tf.constant(float(steps), dtype),
            momentum=momentum,
            steps=tf.constant(float(steps), dtype),
        )
        # Relative to the range in which the average has moved.
        np.testing.assert_allclose(
            received, expected, atol=rtol * (steps + 3), rtol=0
        )


def test_two_steps_average_like_their_base_steps():
    # From 0 to 3 in three base steps, then to 8 in five.
    average = float64(0.5)
    for before, after in [(0.0, 3.0), (3.0, 8.0)]:
        average = ema_ops.advance_average(
            average,
            float64(before),
            float64(after),
            momentum=0.8,
            steps=float64(after - before),
        )
    np.testing.assert_allclose(average, line(8, 0.8, 0.5), rtol=1e-12)


def test_averages_grow_smoothly_between_whole_steps():
    """The two formulas join smoothly where one replaces the other."""
    ways = ema_ops.advance_average(
        tf.zeros(4000, tf.float64),
        tf.zeros(4000, tf.float64),
        tf.ones(4000, tf.float64),
        momentum=0.99,
        steps=float64(np.linspace(0.5, 400, 4000)),
    ).numpy()
    assert np.all(np.diff(ways) > 0)
    # Third differences of a smooth function are tiny; a jump's are not.
    assert np.abs(np.diff(ways, 3)[10:]).max() < 1e-6
