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


def line(steps, momentum, average):
    """The average after base steps to 1, 2, ..., by the definition."""
    for position in range(1, steps + 1):
        average = momentum * average + (1 - momentum) * position
    return average


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 5000])
def test_one_step_averages_like_the_base_steps_it_stands_for(momentum, steps):
    expected = line(steps, momentum, average=-3.0)
    # In float32, 1 - rho is rounded: for 0.9999 by 3e-8 of 1e-4.
    for dtype, rtol in (("float64", 1e-11), ("float32", 3e-4)):
        got = ema.advanced(
            tf.constant(-3.0, dtype),
            tf.constant(0.0, dtype),
            tf.constant(float(steps), dtype),
            momentum=momentum,
            steps=tf.constant(float(steps), dtype),
        )
        # Relative to what the average has moved through.
        np.testing.assert_allclose(
            got, expected, atol=rtol * (steps + 3), rtol=0
        )


def test_two_steps_average_like_their_base_steps():
    # From 0 to 3 in three base steps, on to 8 in five.
    average = float64(0.5)
    for before, after in [(0.0, 3.0), (3.0, 8.0)]:
        average = ema.advanced(
            average,
            float64(before),
            float64(after),
            momentum=0.8,
            steps=float64(after - before),
        )
    np.testing.assert_allclose(average, line(8, 0.8, 0.5), rtol=1e-12)


def test_advanced_by_one_step_is_averaged():
    before, after = float64([1.0, -2.0]), float64([0.5, 4.0])
    average = float64([3.0, 0.25])
    got = ema.advanced(
        average, before, after, momentum=0.9999, steps=float64(1.0)
    )
    expected = ema.averaged(average, after, float64(0.9999))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_advanced_between_whole_steps():
    """Grows smoothly with the steps, below and above the switch of formulas."""
    steps = np.linspace(0.5, 400, 4000)
    way = np.array(
        [
            ema.advanced(
                float64(0.0),
                float64(0.0),
                float64(1.0),
                momentum=0.99,
                steps=float64(r),
            )
            for r in steps
        ]
    )
    assert np.all(np.diff(way) > 0)
    # Third differences of a smooth function are tiny; a jump's are not.
    assert np.abs(np.diff(way, 3)[10:]).max() < 1e-6
