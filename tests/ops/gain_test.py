"""The arithmetic of AdaScale against closed forms, NumPy and exact sums."""

import fractions

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tests import golden
from tf_adascale.ops import gain as gain_ops
from tf_adascale.ops.gain import Averages, Moments, ScaleInvariantStep

# Rounding of a dozen operations.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
EPSILONS = (0.0, gain_ops.RATIO_EPSILON)


def float64(value):
    return tf.constant(value, tf.float64)


def pair(variance, sqnorm, dtype="float64"):
    return Moments(tf.constant(variance, dtype), tf.constant(sqnorm, dtype))


def start(value=0.0, *, count=0, dtype="float64"):
    return Averages(pair(value, value, dtype), tf.constant(count, tf.int64))


def vectors(row, dtype):
    """Returns the samples of a golden row as an array of shape [n, d]."""
    return np.array(
        [np.concatenate([x.ravel() for x in s]) for s in row.samples], dtype
    )


def moments_of(samples, scale):
    """Returns the moments of samples of shape [..., n, d], in their type."""
    return gain_ops.moments(
        tf.constant(np.sum(samples**2, axis=-1).mean(-1)),
        tf.constant(np.sum(samples.mean(-2) ** 2, axis=-1)),
        num_samples=samples.shape[-2],
        scale=scale,
    )


def oracle_moments(samples, scale):
    """Returns the moments from the sample covariance, not from A and T."""
    samples = np.asarray(samples, np.float64)
    # One sample stands for S/n base batches.
    trace = np.trace(np.cov(samples.T, ddof=1))
    variance = trace * scale / len(samples)
    return variance, np.sum(samples.mean(0) ** 2) - trace / len(samples)


def oracle_gain(variance, sqnorm, scale):
    return (variance + sqnorm) / (variance / scale + sqnorm)


@pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
def test_golden_rows(row):
    for dtype, tolerance in TOLERANCE.items():
        moments = moments_of(vectors(row, dtype), row.resolved_scale)
        averages = gain_ops.update_averages(
            start(dtype=dtype), gain_ops.clamp_moments(moments), smoothing=0.9
        )
        gain = gain_ops.ratio(averages.moments, scale=row.resolved_scale)
        results = [*averages.moments, gain]
        assert all(result.dtype == dtype for result in results)
        np.testing.assert_allclose(
            [result.numpy() for result in results],
            [row.variance, row.sqnorm, row.gain],
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
def test_golden_rows_agree_with_the_oracle(row):
    scale = row.resolved_scale
    variance, sqnorm = oracle_moments(vectors(row, "float64"), scale)
    sqnorm = max(sqnorm, 0.0)
    np.testing.assert_allclose(
        [row.variance, row.sqnorm, row.gain],
        [variance, sqnorm, oracle_gain(variance, sqnorm, scale)],
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
def test_the_gain_does_not_depend_on_the_size_of_float32_gradients(row):
    for size in (1e-12, 1e-6, 1e6, 1e15):
        samples = vectors(row, "float32") * np.float32(size)
        moments = gain_ops.clamp_moments(
            moments_of(samples, row.resolved_scale)
        )
        gain = gain_ops.ratio(moments, scale=row.resolved_scale)
        # The floor, 1e-30, is 1e-6 of squares of 1e-24.
        np.testing.assert_allclose(gain, row.gain, rtol=1e-5)


samples_of_integers = st.integers(2, 5).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-8, 8), min_size=3, max_size=3),
        min_size=n,
        max_size=n,
    )
)


@given(samples=samples_of_integers, scale=st.floats(0.125, 4096.0, width=32))
def test_the_gain_of_any_gradients_is_the_oracles(samples, scale):
    if not np.any(samples):
        return
    variance, sqnorm = oracle_moments(samples, scale)
    expected = oracle_gain(max(variance, 1e-30), max(sqnorm, 0.0), scale)
    # A - T loses digits where the samples are nearly equal, and T - sigma^2 / S
    # where they nearly cancel: A is at most 192 and the denominator, if not 0,
    # at least 1/25.
    for dtype, rtol in (("float32", 2e-3), ("float64", 1e-10)):
        moments = moments_of(np.array(samples, dtype), scale)
        gain = gain_ops.ratio(gain_ops.clamp_moments(moments), scale=scale)
        np.testing.assert_allclose(gain, expected, rtol=rtol)


def test_differenced_moments_by_hand():
    # g = (3, 1), g' = (1, 2): |g - g'|^2 = 4 + 1 = 5, <g, g'> = 3 + 2 = 5.
    # sigma^2 = 6 * 5 / 2 = 15, mu^2 = 5.
    moments = gain_ops.differenced_moments(float64(5.0), float64(5.0), scale=6)
    np.testing.assert_allclose(moments, [15.0, 5.0], rtol=1e-12)


class TestUnbiased:
    """Means over many steps are within four standard errors of the moments."""

    def samples(self, num_samples, per_sample):
        """Returns means of `per_sample` base batches each: [40000, n, 3]."""
        random = np.random.default_rng(7)
        # |mean|^2 = 0.36 + 0.09 + 0.04 = 0.49; trace = 1 + 4 + 0.25 = 5.25.
        mean, deviation = np.array([0.6, -0.3, 0.2]), np.array([1.0, 2.0, 0.5])
        noise = random.normal(size=(40_000, num_samples, 3))
        return mean + noise * deviation / np.sqrt(per_sample)

    def check(self, moments):
        for values, expected in zip(moments, (5.25, 0.49)):
            values = values.numpy()
            error = values.std() / np.sqrt(len(values))
            assert error < 0.03  # A wrong factor shifts it by more.
            assert abs(values.mean() - expected) < 4 * error

    @pytest.mark.parametrize("num_samples, scale", [(2, 2), (4, 10), (3, 1.5)])
    def test_moments(self, num_samples, scale):
        samples = self.samples(num_samples, scale / num_samples)
        self.check(moments_of(samples, scale))

    def test_differenced_moments(self):
        now, before = self.samples(2, 6).transpose(1, 0, 2)
        self.check(
            gain_ops.differenced_moments(
                float64(np.sum((now - before) ** 2, axis=1)),
                float64(np.sum(now * before, axis=1)),
                scale=6,
            )
        )


def test_moments_are_clamped_from_below():
    clamped = gain_ops.clamp_moments(pair(-1.0, -2.0))
    assert [float(x) for x in clamped] == [1e-30, 0.0]
    clamped = gain_ops.clamp_moments(pair(3.0, 4.0))
    assert [float(x) for x in clamped] == [3.0, 4.0]
    # In float32 the floor divided by a large scale is a normal number.
    clamped = gain_ops.clamp_moments(pair(0.0, 0.0, "float32"))
    assert clamped.gradient_variance / 1e6 > np.finfo("float32").tiny


def test_the_default_smoothing_remembers_1000_samples():
    # 1 - 64 / 1000 = 0.936.
    assert gain_ops.default_smoothing(64) == pytest.approx(0.936, abs=1e-12)
    assert gain_ops.default_smoothing(1000) == 0.0
    assert gain_ops.default_smoothing(1001) == 0.0


class TestUpdateAverages:
    def test_is_a_plain_mean_then_exponential(self):
        # theta = 0.75: up to the fourth step the mean, 2.5 for 1, 2, 3, 4;
        # then 2.5 + (7.5 - 2.5) / 4 = 3.75, where a mean would give 3.5.
        averages, means = start(), []
        for number, value in enumerate((1.0, 2.0, 3.0, 4.0, 7.5), start=1):
            averages = gain_ops.update_averages(
                averages, pair(value, 2 * value), smoothing=0.75
            )
            means.append(float(averages.moments.gradient_variance))
            assert float(averages.moments.gradient_sqnorm) == 2 * means[-1]
            assert averages.count.numpy() == number
            assert averages.count.dtype == tf.int64
        assert means == [1.0, 1.5, 2.0, 2.5, 3.75]

    @pytest.mark.parametrize(
        # The very first step, and any step without smoothing.
        "count, smoothing",
        [(0, 0.9), (5, 0.0)],
    )
    @pytest.mark.parametrize("held", [0.0, 1e20, -1e20])
    def test_forgets_to_the_bit_what_counts_nothing(
        self, held, count, smoothing
    ):
        averages = gain_ops.update_averages(
            start(held, count=count, dtype="float32"),
            pair(0.1, 3.0, "float32"),
            smoothing=smoothing,
        )
        assert averages.moments.gradient_variance.numpy() == np.float32(0.1)
        assert averages.moments.gradient_sqnorm.numpy() == np.float32(3.0)

    def test_keeps_constant_moments_to_the_bit(self):
        moments = pair(0.1, 0.7, "float32")
        averages = start(dtype="float32")
        for _ in range(30):
            averages = gain_ops.update_averages(
                averages, moments, smoothing=0.9
            )
        assert np.array_equal(averages.moments, moments)

    def test_weighs_steps_past_a_float32_count(self):
        averages = gain_ops.update_averages(
            start(1.0, count=2**40), pair(2.0, 1.0), smoothing=0.9
        )
        assert averages.count.numpy() == 2**40 + 1
        # 1 + 0.1 (2 - 1) = 1.1.
        np.testing.assert_allclose(averages.moments, [1.1, 1.0], rtol=1e-12)


# Squares of gradients between 1e-12 and 1e12, and zero.
SQUARES = np.array([0.0, *10.0 ** np.linspace(-24, 24, 33)])
GRID = np.meshgrid(SQUARES, SQUARES, indexing="ij")
SCALES = (0.125, 0.5, 1, 1.5, 2, 3.5, 64, 32768)


@pytest.mark.parametrize("dtype", TOLERANCE)
class TestRatio:
    def test_is_equation_3_at_any_scale(self, dtype):
        variance, sqnorm = (x[1:, 1:] for x in GRID)
        for scale in SCALES:
            np.testing.assert_allclose(
                gain_ops.ratio(pair(variance, sqnorm, dtype), scale=scale),
                oracle_gain(variance, sqnorm, scale),
                rtol=TOLERANCE[dtype],
            )

    def test_forecasts_from_the_moments_of_another_scale(self, dtype):
        # Row "between": at S = 2 variance 8, sqnorm 16, gain 24/20. The same
        # two numbers at S = 4: 24 / (2 + 16) = 4/3; at S = 8: 24 / 17.
        moments = pair(8.0, 16.0, dtype)
        gains = [float(gain_ops.ratio(moments, scale=s)) for s in (2, 4, 8)]
        np.testing.assert_allclose(
            gains, [1.2, 4 / 3, 24 / 17], rtol=TOLERANCE[dtype]
        )

    def test_is_1_where_nothing_is_known(self, dtype):
        for scale in (0.5, 1, 8):
            for epsilon in EPSILONS:
                gain = gain_ops.ratio(
                    pair(0.0, 0.0, dtype), scale=scale, epsilon=epsilon
                )
                assert float(gain) == 1.0

    def test_is_clipped_where_a_moment_is_negative(self, dtype):
        # (1 + 0.5) / max(1/4 - 0.3, 0): more noise than S allows.
        assert float(gain_ops.ratio(pair(1.0, -0.3, dtype), scale=4)) == 4.0
        # (-1 + 2) / (-1/4 + 2) = 4/7: less than no noise.
        assert float(gain_ops.ratio(pair(-1.0, 2.0, dtype), scale=4)) == 1.0
        # Below one base batch the gain lies in [S, 1] instead:
        # (1 - 0.3) / (2 - 0.3) = 0.41 < 1/2 and (-1 + 3) / (-2 + 3) = 2 > 1.
        assert float(gain_ops.ratio(pair(1.0, -0.3, dtype), scale=0.5)) == 0.5
        assert float(gain_ops.ratio(pair(-1.0, 3.0, dtype), scale=0.5)) == 1.0
        # Measured at S = 2: A = 3, T = 1/2 gives variance 2 * 5/2 = 5, sqnorm
        # 1/2 - 5/2 = -2. At S = 8 the step's mean squared norm would be
        # 5/8 - 2 < 0: full gain.
        for epsilon in EPSILONS:
            moments = pair(5.0, -2.0, dtype)
            gain = gain_ops.ratio(moments, scale=8, epsilon=epsilon)
            assert float(gain) == 8.0

    def test_lies_between_1_and_the_scale(self, dtype):
        """The bounds hold for all moments, up to the limits of float32."""
        extremes = [0.0, 1e-45, 1e-38, 1e-30, 1e-24, 1.0, 1e24, 3.4e38]
        values = np.array([*np.negative(extremes), *extremes])
        moments = pair(*np.meshgrid(values, values), dtype)
        for scale in SCALES:
            for epsilon in EPSILONS:
                for each in (moments, gain_ops.clamp_moments(moments)):
                    gain = gain_ops.ratio(each, scale=scale, epsilon=epsilon)
                    assert np.all(gain >= min(1.0, scale))
                    assert np.all(gain <= max(1.0, scale))
        # (3e38 + 3e38) / (3e38/4 + 3e38) = 6 / 3.75 = 1.6, though 6e38 is no
        # float32.
        gain = gain_ops.ratio(pair(3e38, 3e38, dtype), scale=4)
        np.testing.assert_allclose(gain, 1.6, rtol=1e-6)

    def test_rises_with_the_noise_and_falls_with_the_signal(self, dtype):
        """Noise moves the gain from 1 towards S, up to rounding."""
        for scale in SCALES:
            gain = gain_ops.ratio(pair(*GRID, dtype), scale=scale).numpy()
            away = (gain - 1) * np.sign(scale - 1)
            slack = TOLERANCE[dtype] * max(scale, 1)
            assert np.all(np.diff(away, axis=0) >= -slack)
            assert np.all(np.diff(away, axis=1) <= slack)

    def test_rises_with_the_scale(self, dtype):
        gains = np.array(
            [gain_ops.ratio(pair(*GRID, dtype), scale=s) for s in SCALES]
        )
        slack = TOLERANCE[dtype] * gains[1:]
        assert np.all(np.diff(gains, axis=0) >= -slack)


class TestRatioEstimator:
    """Section 3.4: (m1 + epsilon) / (m2 + epsilon) of unclamped averages."""

    def test_is_the_ratio_of_averaged_norms(self):
        random = np.random.default_rng(3)
        smoothing, averages, m1, m2, clipped = 0.8, start(), 0.0, 0.0, 0
        for t in range(60):
            # Pure noise, at a magnitude where epsilon matters, puts the raw
            # ratio on both sides of S = 4.
            samples = random.normal(size=(4, 2)) * 1e-3
            averages = gain_ops.update_averages(
                averages, moments_of(samples, 4), smoothing=smoothing
            )
            weight = max(1 / (t + 1), 1 - smoothing)
            m1 += weight * (np.sum(samples**2, axis=1).mean() - m1)
            m2 += weight * (np.sum(samples.mean(0) ** 2) - m2)
            for epsilon in EPSILONS:
                unclipped = (m1 + epsilon) / (m2 + epsilon)
                clipped += unclipped > 4
                np.testing.assert_allclose(
                    gain_ops.ratio(averages.moments, scale=4, epsilon=epsilon),
                    np.clip(unclipped, 1, 4),
                    rtol=1e-11,  # m2 is a difference of larger numbers.
                )
        assert 10 < clipped < 110

    def test_opposite_gradients_are_clipped(self):
        # g = (1, 1) and -g at S = n = 2: m1 = 2, m2 = 0, and unclipped
        # (2 + 1e-6) / 1e-6 = 2000001.
        moments = moments_of(np.array([[1.0, 1.0], [-1.0, -1.0]]), 2)
        gain = gain_ops.ratio(moments, scale=2, epsilon=gain_ops.RATIO_EPSILON)
        assert float(gain) == 2.0


def test_at_the_noise_scale_noise_equals_signal():
    assert float(gain_ops.noise_scale(pair(6.0, 2.0))) == 3.0
    # There the gain is (6 + 2) / (6/3 + 2) = 2.
    assert float(gain_ops.ratio(pair(6.0, 2.0), scale=3)) == 2.0
    assert float(gain_ops.noise_scale(pair(6.0, 0.0))) == np.inf
    assert np.isnan(float(gain_ops.noise_scale(pair(0.0, 0.0))))


def state(averages=None, *, whole=0, fraction=0.0):
    averages = averages or start(dtype="float32")
    step = ScaleInvariantStep(
        tf.constant(whole, tf.int64), tf.constant(fraction)
    )
    return gain_ops.State(averages, step)


class TestAdvance:
    """Algorithm 2, a step at a time."""

    def check(self, result, gain, averages, count, step):
        received, (averages_after, step_after) = result
        assert float(received) == gain
        assert np.array_equal(averages_after.moments, averages)
        assert averages_after.count.numpy() == count
        assert exact(step_after) == step

    def test_averages_the_moments_and_adds_the_gain_to_tau(self):
        # r = (4 + 1) / (4/4 + 1) = 2.5.
        first = gain_ops.advance(
            state(), pair(4.0, 1.0, "float32"), scale=4, smoothing=0.9
        )
        self.check(first, 2.5, [4, 1], 1, 2.5)
        # The mean of 4 and 12 is 8: r = (8 + 1) / (8/4 + 1) = 3.
        second = gain_ops.advance(
            first[1], pair(12.0, 1.0, "float32"), scale=4, smoothing=0.9
        )
        self.check(second, 3.0, [8, 1], 2, 5.5)
        # Without smoothing only this step: r = (8 + 4) / (8/4 + 4) = 2.
        third = gain_ops.advance(
            second[1], pair(8.0, 4.0, "float32"), scale=4, smoothing=0.0
        )
        self.check(third, 2.0, [8, 4], 3, 7.5)

    def test_a_step_that_measures_nothing_leaves_the_averages(self):
        # The averages give the gain at any scale: (8 + 1) / (8/8 + 1) = 4.5.
        before = state(Averages(pair(8.0, 1.0, "float32"), tf.constant(2)))
        nan = pair(np.nan, np.nan, "float32")
        for moments, is_measured in [(None, None), (nan, tf.constant(False))]:
            result = gain_ops.advance(
                before,
                moments,
                scale=8,
                smoothing=0.9,
                is_measured=is_measured,
            )
            self.check(result, 4.5, [8, 1], 2, 4.5)

    def test_what_the_graph_finds_measured_is_averaged(self):
        result = gain_ops.advance(
            state(),
            pair(4.0, 1.0, "float32"),
            is_measured=tf.constant(True),
            scale=4,
            smoothing=0.9,
        )
        self.check(result, 2.5, [4, 1], 1, 2.5)

    def test_the_gain_is_1_before_anything_is_measured(self):
        """Averages with a count of 0 are ignored, at a huge tau too."""
        before = state(start(1e9, dtype="float32"), whole=2**40, fraction=0.75)
        result = gain_ops.advance(before, None, scale=4, smoothing=0.9)
        self.check(result, 1.0, [1e9, 1e9], 0, 2**40 + 1.75)

    def test_passes_epsilon_on(self):
        # (4 + 1 + 1) / (4/4 + 1 + 1) = 2.
        result = gain_ops.advance(
            state(),
            pair(4.0, 1.0, "float32"),
            epsilon=1.0,
            scale=4,
            smoothing=0.9,
        )
        self.check(result, 2.0, [4, 1], 1, 2.0)


def test_eager_function_and_xla_agree():
    def chain(state, mean_sqnorm, sqnorm_of_mean, dot, is_measured):
        scale = 6.5
        moments = gain_ops.moments(
            mean_sqnorm, sqnorm_of_mean, num_samples=4, scale=scale
        )
        first, state = gain_ops.advance(
            state, gain_ops.clamp_moments(moments), scale=scale, smoothing=0.9
        )
        second, state = gain_ops.advance(
            state,
            gain_ops.differenced_moments(mean_sqnorm, dot, scale=scale),
            scale=0.5,
            smoothing=0.3,
            epsilon=1e-6,
            is_measured=is_measured,
        )
        noise = gain_ops.noise_scale(state.averages.moments)
        return state, moments, first, second, noise

    others = [tf.function(chain), tf.function(chain, jit_compile=True)]
    random = np.random.default_rng(4)
    before = state(whole=2**40, fraction=0.75)
    for step in range(6):
        norms = [tf.constant(x, "float32") for x in random.uniform(1, 4, 3)]
        arguments = before, *norms, tf.constant(step % 2 == 0)
        eager = chain(*arguments)
        for other in others:
            for left, right in zip(
                tf.nest.flatten(eager), tf.nest.flatten(other(*arguments))
            ):
                assert left.dtype == right.dtype
                np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        before = eager[0]


def exact(step):
    """Returns a `ScaleInvariantStep` as a fraction."""
    fraction = step.fraction.numpy()
    assert fraction.dtype == np.float32
    assert 0 <= fraction < 1
    assert step.whole.dtype == tf.int64
    return int(step.whole) + fractions.Fraction(float(fraction))


class TestAdvanceStep:
    SIZE = 10_000

    @staticmethod
    @tf.function(jit_compile=True)
    def advanced(gains, whole):
        """Returns the step after many gains."""
        _, step = tf.while_loop(
            lambda i, _: i < TestAdvanceStep.SIZE,
            lambda i, step: (i + 1, gain_ops.advance_step(step, gains[i])),
            (0, ScaleInvariantStep(whole, tf.constant(0.0))),
        )
        return step

    def total(self, gains, whole):
        gains = tf.constant(gains, tf.float32, [self.SIZE])
        return exact(self.advanced(gains, tf.constant(whole, tf.int64)))

    def test_is_exact_over_many_steps(self):
        random = np.random.default_rng(5)
        gains = random.uniform(1, 1000, size=self.SIZE).astype("float32")
        expected = sum(fractions.Fraction(float(gain)) for gain in gains)
        assert self.total(gains, 2**24) == 2**24 + expected

    def test_is_exact_where_a_sum_of_floats_stands_still(self):
        # 2^24 + 1 is no float32: a float32 sum would stay at 2^24.
        assert self.total(1.0, 2**24) == 2**24 + self.SIZE
        # A gain's last bit is 2^-23. With 2^40 before the point, even a float64
        # keeps only 2^-12.
        excess = self.SIZE * fractions.Fraction(1, 2**23)
        assert self.total(1 + 2.0**-23, 2**40) == 2**40 + self.SIZE + excess

    def test_gains_below_1_stay_within_rounding(self):
        # At a scale below 1 each sum rounds by at most half of 2^-24.
        random = np.random.default_rng(6)
        gains = random.uniform(0.01, 1, size=self.SIZE).astype("float32")
        expected = sum(fractions.Fraction(float(gain)) for gain in gains)
        error = self.total(gains, 2**40) - 2**40 - expected
        assert abs(error) < self.SIZE * 2.0**-24

    @given(
        gain=st.floats(1.0, 2.0**23, width=32),
        whole=st.integers(0, 2**61),
        fraction=st.integers(0, 2**23 - 1),
    )
    def test_is_exact_for_any_gain(self, gain, whole, fraction):
        before = ScaleInvariantStep(
            tf.constant(whole, tf.int64), tf.constant(fraction / 2**23)
        )
        after = gain_ops.advance_step(before, tf.constant(gain))
        assert exact(after) == exact(before) + fractions.Fraction(gain)
