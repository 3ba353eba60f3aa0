"""The arithmetic of AdaScale against NumPy, exact sums and known laws."""

import fractions
import itertools

import golden
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tf_adascale import gain
from tf_adascale.gain import Averages, Moments, ScaleInvariantStep

MODES = {
    "eager": lambda function: function,
    "function": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}
# Rounding of a dozen operations.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def float64(value):
    return tf.constant(value, tf.float64)


def pair(variance, sqnorm, dtype="float64"):
    return Moments(tf.constant(variance, dtype), tf.constant(sqnorm, dtype))


def norms_of(samples):
    """Returns A and T of an array of shape [n, d]."""
    mean_sqnorm = np.mean(np.sum(samples**2, axis=1), dtype=samples.dtype)
    return mean_sqnorm, np.sum(np.mean(samples, axis=0) ** 2)


def oracle_moments(samples, scale):
    """The two moments from the sample covariance, not from A and T."""
    samples = np.asarray(samples, np.float64)
    num_samples = len(samples)
    # One sample stands for S/n base batches.
    trace = np.trace(np.cov(samples.T, ddof=1))
    variance = trace * scale / num_samples
    return variance, np.sum(samples.mean(0) ** 2) - trace / num_samples


def oracle_gain(variance, sqnorm, scale):
    return (variance + sqnorm) / (variance / scale + sqnorm)


def vectors(row, dtype):
    """The samples of a golden row as an array of shape [n, d]."""
    return np.array(
        [np.concatenate([x.ravel() for x in s]) for s in row.samples], dtype
    )


def gain_of(samples, scale):
    """The gain after one step with these samples, of the samples' type."""
    mean_sqnorm, sqnorm_of_mean = norms_of(samples)
    moments = gain.moments(
        tf.constant(mean_sqnorm),
        tf.constant(sqnorm_of_mean),
        num_samples=len(samples),
        scale=scale,
    )
    return gain.ratio(gain.floored(moments), scale=scale).numpy()


def start(dtype="float64", value=0.0):
    return Averages(pair(value, value, dtype), tf.constant(0, tf.int64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
def test_golden_rows(row, mode):
    scale = row.resolved_scale

    @MODES[mode]
    def step(averages, mean_sqnorm, sqnorm_of_mean):
        moments = gain.moments(
            mean_sqnorm,
            sqnorm_of_mean,
            num_samples=row.num_samples,
            scale=scale,
        )
        averages = gain.averaged(averages, gain.floored(moments), smoothing=0.9)
        return *averages.moments, gain.ratio(averages.moments, scale=scale)

    for dtype, tolerance in TOLERANCE.items():
        norms = (tf.constant(x) for x in norms_of(vectors(row, dtype)))
        results = step(start(dtype), *norms)
        assert all(result.dtype == dtype for result in results)
        np.testing.assert_allclose(
            [result.numpy() for result in results],
            [row.variance, row.sqnorm, row.gain],
            rtol=tolerance,
            atol=tolerance,
        )


def test_golden_rows_agree_with_the_oracle():
    for row in golden.ROWS:
        scale = row.resolved_scale
        variance, sqnorm = oracle_moments(vectors(row, "float64"), scale)
        sqnorm = max(sqnorm, 0.0)
        np.testing.assert_allclose(
            [row.variance, row.sqnorm, row.gain],
            [variance, sqnorm, oracle_gain(variance, sqnorm, scale)],
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("num_samples, scale", [(2, 2), (5, 5), (3, 7.5)])
def test_moments_are_those_of_the_sample_covariance(num_samples, scale):
    random = np.random.default_rng(num_samples)
    samples = random.normal(size=(num_samples, 6)) + 0.5
    moments = gain.moments(
        *(float64(x) for x in norms_of(samples)),
        num_samples=num_samples,
        scale=scale,
    )
    np.testing.assert_allclose(
        moments, oracle_moments(samples, scale), rtol=1e-12
    )


def test_differenced_moments():
    # g = (3, 1), g' = (1, 2): |g - g'|^2 = 4 + 1 = 5, <g, g'> = 3 + 2 = 5.
    # sigma^2 = 6 * 5 / 2 = 15, mu^2 = 5.
    moments = gain.differenced_moments(float64(5.0), float64(5.0), scale=6)
    np.testing.assert_allclose(moments, [15.0, 5.0], rtol=1e-12)


def test_differenced_moments_are_moments_of_two_samples_of_half_the_batch():
    # Two samples on S base batches each are one step of scale 2 S with n = 2.
    random = np.random.default_rng(0)
    now, before = random.normal(size=(2, 6))
    differenced = gain.differenced_moments(
        float64(np.sum((now - before) ** 2)), float64(now @ before), scale=3
    )
    expected = oracle_moments([now, before], 6)
    np.testing.assert_allclose(differenced, expected, rtol=1e-12)


def test_floors():
    floored = gain.floored(pair(-1.0, -2.0))
    assert [float(x) for x in floored] == [1e-30, 0.0]
    assert [float(x) for x in gain.floored(pair(3.0, 4.0))] == [3.0, 4.0]
    # In float32 the floor over a large scale is still a normal number.
    small = gain.floored(pair(0.0, 0.0, "float32")).gradient_variance / 1e6
    assert float(small) > np.finfo("float32").tiny


def test_default_smoothing():
    # 1 - 64 / 1000 = 0.936.
    assert gain.default_smoothing(64) == pytest.approx(0.936, abs=1e-12)
    assert gain.default_smoothing(1000) == 0.0
    assert gain.default_smoothing(1001) == 0.0


class TestAveraged:
    @pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.75, 0.875, 0.992])
    def test_is_a_plain_mean_then_exponential(self, smoothing):
        random = np.random.default_rng(1)
        steps = random.uniform(1.0, 5.0, size=(40, 2))
        averages = start()
        expected = None
        for t, step in enumerate(steps):
            averages = gain.averaged(averages, pair(*step), smoothing=smoothing)
            # The mean of t + 1 steps, as long as t < 1 / (1 - theta).
            if t * (1 - smoothing) < 1:
                expected = steps[: t + 1].mean(0)
            else:
                expected = smoothing * expected + (1 - smoothing) * step
            np.testing.assert_allclose(averages.moments, expected, rtol=1e-12)
            assert averages.count.numpy() == t + 1
            assert averages.count.dtype == tf.int64

    def test_weights_around_the_change(self):
        # theta = 0.75: up to the fourth step the mean, of 1, 2, 3, 4 2.5;
        # then 2.5 + (7.5 - 2.5) / 4 = 3.75, where a mean would give 3.5.
        averages = start()
        means = []
        for value in (1.0, 2.0, 3.0, 4.0, 7.5):
            averages = gain.averaged(averages, pair(value, 0.0), smoothing=0.75)
            means.append(float(averages.moments.gradient_variance))
        assert means == [1.0, 1.5, 2.0, 2.5, 3.75]

    @pytest.mark.parametrize("value", [0.0, 1.0, 1e20, -1e20])
    def test_first_step_forgets_what_the_state_held(self, value):
        averages = gain.averaged(
            start("float32", value), pair(2.0, 1.0, "float32"), smoothing=0.9
        )
        assert [float(x) for x in averages.moments] == [2.0, 1.0]

    def test_no_smoothing_is_the_step_itself(self):
        averages = Averages(pair(1e8, 1e8, "float32"), tf.constant(5, "int64"))
        averages = gain.averaged(
            averages, pair(0.1, 3.0, "float32"), smoothing=0.0
        )
        assert averages.moments.gradient_variance.numpy() == np.float32(0.1)
        assert averages.moments.gradient_sqnorm.numpy() == np.float32(3.0)

    def test_constant_moments_stay_to_the_bit(self):
        averages = start("float32")
        for _ in range(30):
            averages = gain.averaged(
                averages, pair(0.1, 0.7, "float32"), smoothing=0.9
            )
        assert averages.moments.gradient_variance.numpy() == np.float32(0.1)
        assert averages.moments.gradient_sqnorm.numpy() == np.float32(0.7)

    def test_weighs_steps_past_a_float32_count(self):
        averages = Averages(pair(1.0, 1.0), tf.constant(2**40, tf.int64))
        averages = gain.averaged(averages, pair(2.0, 1.0), smoothing=0.9)
        assert averages.count.numpy() == 2**40 + 1
        # 1 + 0.1 (2 - 1) = 1.1.
        np.testing.assert_allclose(averages.moments, [1.1, 1.0], rtol=1e-12)


class TestRatio:
    @pytest.mark.parametrize("scale", [0.25, 1, 2, 3.5, 64, 32768])
    def test_equals_equation_3_at_any_scale(self, scale):
        random = np.random.default_rng(2)
        for variance, sqnorm in random.uniform(0.01, 100.0, size=(20, 2)):
            result = gain.ratio(pair(variance, sqnorm), scale=scale)
            np.testing.assert_allclose(
                result, oracle_gain(variance, sqnorm, scale), rtol=1e-12
            )

    def test_forecast_from_moments_of_another_scale(self):
        # Row "between": at S = 2 variance 8, sqnorm 16, gain 24/20. The same
        # two numbers at S = 4: 24 / (2 + 16) = 4/3; at S = 8: 24 / 17.
        moments = pair(8.0, 16.0)
        gains = [float(gain.ratio(moments, scale=s)) for s in (2, 4, 8)]
        np.testing.assert_allclose(gains, [1.2, 4 / 3, 24 / 17], rtol=1e-12)

    def test_is_1_where_nothing_is_known(self):
        for scale in (0.5, 1, 8):
            assert float(gain.ratio(pair(0.0, 0.0), scale=scale)) == 1.0

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_is_clipped(self, dtype):
        # (1 + 0.5) / max(1/4 - 0.3, 0): more noise than S allows.
        assert float(gain.ratio(pair(1.0, -0.3, dtype), scale=4)) == 4.0
        # (-1 + 2) / (-1/4 + 2) = 4/7: less than no noise.
        assert float(gain.ratio(pair(-1.0, 2.0, dtype), scale=4)) == 1.0
        # Below one base batch the gain lies in [S, 1] instead:
        # (1 - 0.3) / (2 - 0.3) = 0.41 < 1/2 and (-1 + 3) / (-2 + 3) = 2 > 1.
        assert float(gain.ratio(pair(1.0, -0.3, dtype), scale=0.5)) == 0.5
        assert float(gain.ratio(pair(-1.0, 3.0, dtype), scale=0.5)) == 1.0

    def test_unfloored_average_below_zero_at_another_scale(self):
        # Measured at S = 2: A = 3, T = 1/2 gives variance 5, sqnorm -2. At
        # S = 8 the step's mean squared norm would be 5/8 - 2 < 0: full gain.
        moments = gain.moments(
            float64(3.0), float64(0.5), num_samples=2, scale=2
        )
        np.testing.assert_allclose(moments, [5.0, -2.0], rtol=1e-12)
        for epsilon in (0.0, gain.RATIO_EPSILON):
            assert float(gain.ratio(moments, scale=8, epsilon=epsilon)) == 8.0


class TestRatioEstimator:
    """Section 3.4: (m1 + epsilon) / (m2 + epsilon) of unfloored averages."""

    def test_equals_the_ratio_of_averaged_norms(self):
        random = np.random.default_rng(3)
        num_samples, smoothing, epsilon = 4, 0.8, gain.RATIO_EPSILON
        averages, m1, m2 = start(), 0.0, 0.0
        clipped = 0
        for t in range(60):
            # Noise alone at a magnitude where epsilon matters: the raw ratio
            # falls on both sides of S = 4.
            samples = random.normal(size=(num_samples, 2)) * 1e-3
            mean_sqnorm, sqnorm_of_mean = norms_of(samples)
            averages = gain.averaged(
                averages,
                gain.moments(
                    float64(mean_sqnorm),
                    float64(sqnorm_of_mean),
                    num_samples=num_samples,
                    scale=num_samples,
                ),
                smoothing=smoothing,
            )
            weight = max(1 / (t + 1), 1 - smoothing)
            m1 = (1 - weight) * m1 + weight * mean_sqnorm
            m2 = (1 - weight) * m2 + weight * sqnorm_of_mean
            for eps in (0.0, epsilon):
                unclipped = (m1 + eps) / (m2 + eps)
                clipped += unclipped > num_samples
                np.testing.assert_allclose(
                    gain.ratio(averages.moments, scale=4, epsilon=eps),
                    np.clip(unclipped, 1, num_samples),
                    rtol=1e-11,  # m2 is a difference of larger numbers
                )
        assert 10 < clipped < 110

    def test_opposite_gradients_are_clipped(self):
        # g = (1, 1) and -g at S = n = 2: m1 = 2, m2 = 0, and unclipped
        # (2 + 1e-6) / 1e-6 = 2000001.
        moments = gain.moments(
            float64(2.0), float64(0.0), num_samples=2, scale=2
        )
        variance, sqnorm = (float(x) for x in moments)
        epsilon = gain.RATIO_EPSILON
        unclipped = (variance + sqnorm + epsilon) / (
            variance / 2 + sqnorm + epsilon
        )
        assert unclipped == pytest.approx(2000001.0, rel=1e-9)
        assert float(gain.ratio(moments, scale=2, epsilon=epsilon)) == 2.0

    def test_zero_gradients_give_1(self):
        moments = gain.moments(
            float64(0.0), float64(0.0), num_samples=2, scale=2
        )
        result = gain.ratio(moments, scale=2, epsilon=gain.RATIO_EPSILON)
        assert float(result) == 1.0


def test_noise_scale():
    assert float(gain.noise_scale(pair(6.0, 2.0))) == 3.0
    assert float(gain.noise_scale(pair(6.0, 0.0))) == np.inf
    assert np.isnan(float(gain.noise_scale(pair(0.0, 0.0))))
    # There noise is as large as signal: gain = (6 + 2) / (6/3 + 2) = 2.
    assert float(gain.ratio(pair(6.0, 2.0), scale=3)) == 2.0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_eager_function_and_xla_agree(dtype):
    def chain(averages, step, mean_sqnorm, sqnorm_of_mean, dot):
        scale = 6.5
        moments = gain.moments(
            mean_sqnorm, sqnorm_of_mean, num_samples=4, scale=scale
        )
        differenced = gain.differenced_moments(mean_sqnorm, dot, scale=scale)
        floored = gain.floored(moments)
        averages = gain.averaged(averages, floored, smoothing=0.9)
        averages = gain.averaged(averages, differenced, smoothing=0.3)
        first = gain.ratio(averages.moments, scale=scale)
        second = gain.ratio(moments, scale=0.5, epsilon=1e-6)
        step = gain.advanced(step, tf.cast(first, tf.float32))
        noise = gain.noise_scale(averages.moments)
        return moments, differenced, averages, first, second, noise, step

    functions = [wrap(chain) for wrap in MODES.values()]
    random = np.random.default_rng(4)
    averages = start(dtype)
    step = ScaleInvariantStep(tf.constant(2**40), tf.constant(0.75))
    for _ in range(10):
        norms = [tf.constant(x, dtype) for x in random.uniform(1, 4, size=3)]
        results = [f(averages, step, *norms) for f in functions]
        eager, *others = (tf.nest.flatten(result) for result in results)
        for other in others:
            for left, right in zip(eager, other):
                assert left.dtype == right.dtype
                np.testing.assert_allclose(left, right, rtol=TOLERANCE[dtype])
        averages, step = results[0][2], results[0][6]


class TestAdvanced:
    @staticmethod
    def run(gains, whole, fraction=0.0):
        @tf.function(jit_compile=True)
        def loop(gains, whole, fraction):
            _, step = tf.while_loop(
                lambda i, _: i < tf.size(gains),
                lambda i, step: (i + 1, gain.advanced(step, gains[i])),
                (0, ScaleInvariantStep(whole, fraction)),
            )
            return step

        return loop(
            tf.constant(gains, tf.float32),
            tf.constant(whole, tf.int64),
            tf.constant(fraction, tf.float32),
        )

    @staticmethod
    def total(step):
        fraction = step.fraction.numpy()
        assert 0 <= fraction < 1
        return int(step.whole) + fractions.Fraction(float(fraction))

    def test_is_exact_over_many_steps(self):
        random = np.random.default_rng(5)
        gains = random.uniform(1, 1000, size=100_000).astype("float32")
        step = self.run(gains, whole=2**24)
        expected = 2**24 + sum(fractions.Fraction(float(g)) for g in gains)
        assert self.total(step) == expected
        assert step.whole.dtype == tf.int64
        assert step.fraction.dtype == tf.float32

    def test_is_exact_where_a_float32_sum_stands_still(self):
        # 2^24 + 1 is no float32: a float32 sum would stay at 2^24.
        step = self.run([1.0] * 1000, whole=2**24)
        assert self.total(step) == 2**24 + 1000
        # A gain's last bit is 2^-23; 2^23 of them would be one step. With
        # 2^40 before the point, even a float64 keeps only 2^-12.
        last_bit = float(np.nextafter(np.float32(1), np.float32(2)))
        step = self.run([last_bit] * 1000, whole=2**40)
        expected = 2**40 + 1000 + fractions.Fraction(1000, 2**23)
        assert self.total(step) == expected

    @pytest.mark.parametrize("mode", MODES)
    def test_carries(self, mode):
        # 7.75 + 1.5 = 9.25; the largest fraction twice is 2 - 2^-22.
        advanced = MODES[mode](gain.advanced)
        step = ScaleInvariantStep(tf.constant(7, "int64"), tf.constant(0.75))
        assert self.total(advanced(step, tf.constant(1.5))) == 9.25
        largest = 1 - 2.0**-23
        step = ScaleInvariantStep(tf.constant(0, "int64"), tf.constant(largest))
        total = self.total(advanced(step, tf.constant(1 + largest)))
        assert total == 3 - fractions.Fraction(2, 2**23)

    def test_gains_below_1_stay_within_rounding(self):
        # A scale below 1: each sum may round by half of 2^-24 at most.
        random = np.random.default_rng(6)
        gains = random.uniform(0.01, 1, size=10_000).astype("float32")
        step = self.run(gains, whole=2**40)
        exact = 2**40 + sum(fractions.Fraction(float(g)) for g in gains)
        assert abs(self.total(step) - exact) < 10_000 * 2.0**-24

    @given(
        gains=st.lists(st.floats(1.0, 2.0**23, width=32), max_size=20),
        whole=st.integers(0, 2**61),
        fraction=st.integers(0, 2**23 - 1),
    )
    def test_equals_exact_arithmetic(self, gains, whole, fraction):
        step = ScaleInvariantStep(
            tf.constant(whole, tf.int64),
            tf.constant(fraction / 2**23, tf.float32),
        )
        expected = whole + fractions.Fraction(fraction, 2**23)
        for value in gains:
            step = gain.advanced(step, tf.constant(value, tf.float32))
            expected += fractions.Fraction(value)
        assert self.total(step) == expected


class TestUnbiased:
    """Means over many steps, within four standard errors."""

    TRIALS = 40_000
    MEAN = np.array([0.6, -0.3, 0.2])  # |mean|^2 = 0.36 + 0.09 + 0.04 = 0.49
    DEVIATION = np.array([1.0, 2.0, 0.5])  # trace = 1 + 4 + 0.25 = 5.25

    def samples(self, num_samples, per_sample):
        """Mean gradients of `per_sample` base batches each: [trials, n, 3]."""
        random = np.random.default_rng(7)
        noise = random.normal(size=(self.TRIALS, num_samples, 3))
        return self.MEAN + noise * self.DEVIATION / np.sqrt(per_sample)

    def check(self, moments):
        for values, expected in zip(moments, (5.25, 0.49)):
            values = values.numpy()
            error = values.std() / np.sqrt(len(values))
            assert error < 0.03  # small against what a wrong factor would do
            assert abs(values.mean() - expected) < 4 * error

    @pytest.mark.parametrize("num_samples, scale", [(2, 2), (4, 10), (3, 1.5)])
    def test_moments(self, num_samples, scale):
        samples = self.samples(num_samples, scale / num_samples)
        mean_sqnorm = np.sum(samples**2, axis=2).mean(1)
        sqnorm_of_mean = np.sum(samples.mean(1) ** 2, axis=1)
        self.check(
            gain.moments(
                float64(mean_sqnorm),
                float64(sqnorm_of_mean),
                num_samples=num_samples,
                scale=scale,
            )
        )

    @pytest.mark.parametrize("scale", [2, 6])
    def test_differenced_moments(self, scale):
        now, before = self.samples(2, scale).transpose(1, 0, 2)
        self.check(
            gain.differenced_moments(
                float64(np.sum((now - before) ** 2, axis=1)),
                float64(np.sum(now * before, axis=1)),
                scale=scale,
            )
        )


# Squares of gradients between 1e-12 and 1e12 and zero, as float32 sees them.
squares = st.just(0.0) | st.floats(-24, 24).map(lambda power: 10.0**power)
scales = st.floats(0.125, 4096.0, width=32)
dtypes = st.sampled_from(sorted(TOLERANCE))
entries = st.integers(-8, 8)
gradients = st.integers(2, 5).flatmap(
    lambda n: st.lists(
        st.lists(entries, min_size=3, max_size=3), min_size=n, max_size=n
    )
)


class TestProperties:
    @given(variance=squares, sqnorm=squares, scale=scales, dtype=dtypes)
    def test_gain_is_between_1_and_the_scale(
        self, variance, sqnorm, scale, dtype
    ):
        for moments in (
            pair(variance, sqnorm, dtype),
            gain.floored(pair(variance, sqnorm, dtype)),
            pair(variance, -sqnorm, dtype),
            pair(-variance, sqnorm, dtype),
        ):
            for epsilon in (0.0, gain.RATIO_EPSILON):
                result = gain.ratio(moments, scale=scale, epsilon=epsilon)
                assert min(1.0, scale) <= float(result) <= max(1.0, scale)

    @given(samples=gradients, scale=scales, dtype=dtypes)
    def test_gain_of_gradients_is_the_oracles(self, samples, scale, dtype):
        samples = np.array(samples, dtype)
        variance, sqnorm = oracle_moments(samples, scale)
        variance, sqnorm = max(variance, 1e-30), max(sqnorm, 0.0)
        expected = oracle_gain(variance, sqnorm, scale)
        # A - T loses digits where the samples are nearly equal, and
        # T - sigma^2 / S where they nearly cancel: A is at most 192 and the
        # denominator, if not 0, at least 1/25.
        rtol = {"float32": 2e-3, "float64": 1e-10}[dtype]
        if np.any(samples):
            np.testing.assert_allclose(
                gain_of(samples, scale), expected, rtol=rtol
            )

    @given(
        low=squares, high=squares, sqnorm=squares, scale=scales, dtype=dtypes
    )
    def test_gain_is_monotone_in_the_variance(
        self, low, high, sqnorm, scale, dtype
    ):
        low, high = sorted((low, high))
        first = float(gain.ratio(pair(low, sqnorm, dtype), scale=scale))
        second = float(gain.ratio(pair(high, sqnorm, dtype), scale=scale))
        # More noise moves the gain away from 1, towards S; up to rounding.
        if sqnorm == 0.0 and low == 0.0:
            assert first == 1.0
        slack = TOLERANCE[dtype] * max(first, second)
        if scale >= 1:
            assert second >= first - slack
        else:
            assert second <= first + slack

    @given(
        low=squares, high=squares, variance=squares, scale=scales, dtype=dtypes
    )
    def test_gain_is_monotone_in_the_sqnorm(
        self, low, high, variance, scale, dtype
    ):
        low, high = sorted((low, high))
        first = float(gain.ratio(pair(variance, low, dtype), scale=scale))
        second = float(gain.ratio(pair(variance, high, dtype), scale=scale))
        slack = TOLERANCE[dtype] * max(first, second)
        if scale >= 1:
            assert second <= first + slack
        else:
            assert second >= first - slack

    @given(variance=squares, sqnorm=squares, dtype=dtypes)
    def test_gain_is_monotone_in_the_scale(self, variance, sqnorm, dtype):
        moments = pair(variance, sqnorm, dtype)
        gains = [
            float(gain.ratio(moments, scale=scale))
            for scale in (0.5, 1, 1.5, 2, 16, 1024)
        ]
        assert all(
            right >= left - TOLERANCE[dtype] * right
            for left, right in itertools.pairwise(gains)
        )

    @given(
        samples=gradients,
        scale=scales,
        power=st.floats(-6, 6),
        dtype=dtypes,
    )
    def test_gain_is_invariant_to_the_scale_of_the_loss(
        self, samples, scale, power, dtype
    ):
        samples = np.array(samples, dtype)
        rescaled = samples * np.asarray(10.0**power, dtype)
        # Rounding of the rescaled samples, see the oracle's test above. The
        # floor of 1e-30 is a part of 1e-17 of the smallest squares here.
        rtol = {"float32": 2e-3, "float64": 1e-10}[dtype]
        np.testing.assert_allclose(
            gain_of(rescaled, scale), gain_of(samples, scale), rtol=rtol
        )

    @pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
    def test_extreme_float32_gradients_have_the_same_gain(self, row):
        for size in (1e-12, 1e-6, 1e6, 1e15):
            gradients = vectors(row, "float32") * np.float32(size)
            # Beside squares of 1e-24 the floor of 1e-30 is a part of 1e-6.
            np.testing.assert_allclose(
                gain_of(gradients, row.resolved_scale), row.gain, rtol=1e-5
            )

    @given(variance=squares, sqnorm=squares, dtype=dtypes)
    def test_gain_at_scale_1_is_1(self, variance, sqnorm, dtype):
        for moments in (
            pair(variance, sqnorm, dtype),
            pair(variance, -sqnorm, dtype),
        ):
            assert float(gain.ratio(moments, scale=1)) == 1.0

    @given(
        variance=st.floats(width=32, allow_nan=False, allow_infinity=False),
        sqnorm=st.floats(width=32, allow_nan=False, allow_infinity=False),
        scale=scales,
        epsilon=st.sampled_from([0.0, gain.RATIO_EPSILON]),
    )
    def test_finite_moments_give_a_finite_gain(
        self, variance, sqnorm, scale, epsilon
    ):
        moments = pair(variance, sqnorm, "float32")
        for given_moments in (moments, gain.floored(moments)):
            result = gain.ratio(given_moments, scale=scale, epsilon=epsilon)
            assert min(1.0, scale) <= float(result) <= max(1.0, scale)

    def test_finite_moments_whose_sum_overflows(self):
        # (3e38 + 3e38) / (3e38/4 + 3e38) = 6 / 3.75 = 1.6, though 6e38 is no
        # float32.
        result = gain.ratio(pair(3e38, 3e38, "float32"), scale=4)
        np.testing.assert_allclose(result, 1.6, rtol=1e-6)
