"""The paper's propositions and bounds, on a problem that meets all assumptions.

The objective is F(w) = 1/2 w'Hw with a diagonal H, whose gradient on one base
batch is Hw plus normal noise of mean 0 and a fixed diagonal covariance. Then

    alpha, beta = smallest and largest eigenvalue of H    (assumptions 1 and 2)
    V = trace of the covariance, at every w               (assumption 3)
    F* = F(0) = 0

Equation (3) has expectations over training runs. Here they are means over many
simultaneous runs that share their gain, like the multi-trajectory curve of
Figure 2. Since H is diagonal, E[w_i^2] also obeys a recursion without sampling:

    E[w_i^2] <- (1 - eta r h_i)^2 E[w_i^2] + (eta r)^2 covariance_i / S

for a gain r that depends on expectations only. The recursion must meet the
bounds without slack. The sampled runs agree with it to four standard errors,
which shows that it describes the algorithm.

With the constants below:

    gamma = eta alpha (2 - eta beta) = 0.1 * 0.25 * (2 - 0.2) = 0.045
    Delta = eta^2 beta V / (2 gamma) = 0.01 * 2 * 0.9 / 0.09  = 0.2
    F(w_0) = (0.25 * 16 + 1 * 4 + 2 * 4) / 2                  = 8
    AdaScale's bound needs S <= 1 / gamma       = 22.2
    linear scaling's needs S < 2 / (eta beta)   = 10
"""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tf_adascale.ops import gain as gain_ops
from tf_adascale.ops.gain import Averages, Moments

EIGENVALUES = np.array([0.25, 1.0, 2.0])
ALPHA, BETA = 0.25, 2.0
START = np.array([4.0, 2.0, 2.0])
# Noise along the steepest direction, where it hurts linear scaling most.
COVARIANCE = np.array([0.0, 0.0, 0.9])
VARIANCE = 0.9
LEARNING_RATE = 0.1
GAMMA = 0.045
DELTA = 0.2
START_OBJECTIVE = 8.0

TOTAL_STEPS = 100  # (1 - 0.045)^100 = 0.01: the bound is nearly Delta then
RUNS = 2000


def test_constants():
    assert min(EIGENVALUES) == ALPHA
    assert max(EIGENVALUES) == BETA
    assert sum(COVARIANCE) == VARIANCE
    gamma = LEARNING_RATE * ALPHA * (2 - LEARNING_RATE * BETA)
    assert gamma == pytest.approx(GAMMA, rel=1e-12)
    delta = LEARNING_RATE**2 * BETA * VARIANCE / (2 * gamma)
    assert delta == pytest.approx(DELTA, rel=1e-12)
    assert objective(START) == START_OBJECTIVE


def objective(weights):
    """F of weights [..., 3]."""
    return (EIGENVALUES * weights**2).sum(-1) / 2


def float64(value):
    return tf.constant(value, tf.float64)


def exact_gain(sqnorm, scale):
    """Equation (3), from E[mu^2] and sigma^2."""
    moments = Moments(float64(VARIANCE), float64(sqnorm))
    return float(gain_ops.ratio(moments, scale=scale))


def adascale_gain(scale):
    return lambda sqnorm: exact_gain(sqnorm, scale)


def linear_gain(scale):
    """The linear scaling rule as a gain that is always S."""
    return lambda sqnorm: scale


def expected_runs(gain_of, *, scale, num_steps=None):
    """Follows E[w_i^2] without sampling.

    Args:
        gain_of: function from E[mu^2] to the gain.
        scale: number, S.
        num_steps: int, or None for as many as tau needs to reach the total.

    Returns:
        Arrays of shape [steps + 1]: E[F(w_t)], tau_t.
    """
    squares = START**2
    objectives, taus = [START_OBJECTIVE], [0.0]
    while (
        taus[-1] < TOTAL_STEPS if num_steps is None else len(taus) <= num_steps
    ):
        r = gain_of((EIGENVALUES**2 * squares).sum())
        rate = LEARNING_RATE * r
        squares = (1 - rate * EIGENVALUES) ** 2 * squares
        squares = squares + rate**2 * COVARIANCE / scale
        objectives.append((EIGENVALUES * squares).sum() / 2)
        taus.append(taus[-1] + r)
    return np.array(objectives), np.array(taus)


def sampled_runs(gain_of, *, scale, num_steps=None, runs=RUNS):
    """Trains many runs that share their gain.

    Returns:
        Arrays of shape [steps + 1]: mean of F(w_t), its standard error, tau_t.
    """
    random = np.random.default_rng(0)
    weights = np.tile(START, (runs, 1))
    means, errors, taus = [START_OBJECTIVE], [0.0], [0.0]
    while (
        taus[-1] < TOTAL_STEPS if num_steps is None else len(taus) <= num_steps
    ):
        gradients = EIGENVALUES * weights
        r = gain_of((gradients**2).sum(1).mean())
        # The mean of S base batches is normal too, with covariance / S.
        noise = random.normal(size=weights.shape) * np.sqrt(COVARIANCE / scale)
        weights = weights - LEARNING_RATE * r * (gradients + noise)
        objectives = objective(weights)
        means.append(objectives.mean())
        errors.append(objectives.std() / np.sqrt(runs))
        taus.append(taus[-1] + r)
    return np.array(means), np.array(errors), np.array(taus)


def adascale_bound(taus):
    """Theorems 1 and 2: (1 - gamma)^tau F(w_0) + Delta."""
    return (1 - GAMMA) ** taus * START_OBJECTIVE + DELTA


def linear_bound(steps, scale):
    """Theorem 3: (1 - gamma / xi)^(S t) F(w_0) + xi Delta."""
    xi = (2 - LEARNING_RATE * BETA) / (2 - scale * LEARNING_RATE * BETA)
    rate = (1 - GAMMA / xi) ** (scale * steps)
    return rate * START_OBJECTIVE + xi * DELTA


class TestProposition1:
    """Without variance, a larger batch changes nothing: identity scaling."""

    @staticmethod
    def train(scale):
        """Trains by AdaScale on `scale` equal samples, for 50 steps."""
        weights = START.astype("float32")
        zero = tf.zeros(())
        averages = Averages(Moments(zero, zero), tf.constant(0, tf.int64))
        for _ in range(50):
            samples = np.tile(
                np.float32(EIGENVALUES) * weights, (scale, 1)
            ).astype("float64")
            # In float64 the sum of equal float32 numbers is exact, so their
            # mean equals each sample.
            mean = samples.mean(0)
            rate = np.float32(LEARNING_RATE)
            if scale > 1:
                moments = gain_ops.moments(
                    tf.constant((samples**2).sum(1).mean(), tf.float32),
                    tf.constant((mean**2).sum(), tf.float32),
                    num_samples=scale,
                    scale=scale,
                )
                averages = gain_ops.update_averages(
                    averages,
                    gain_ops.clamp_moments(moments),
                    smoothing=gain_ops.default_smoothing(scale),
                )
                r = gain_ops.ratio(averages.moments, scale=scale).numpy()
                assert r == 1.0
                rate = rate * r
            weights = weights - rate * mean.astype("float32")
        assert weights.dtype == np.float32
        return weights

    @pytest.mark.parametrize("scale", [2, 3, 8, 64, 1000])
    def test_weights_are_equal_to_the_bit(self, scale):
        np.testing.assert_array_equal(self.train(scale), self.train(1))


class TestProposition2:
    """With variance nu and learning rate 1/nu, linear scaling is exact."""

    TOTAL = 10  # T: the S = 1 run takes nu T steps
    COVARIANCE = np.array([0.4, 0.3, 0.2])

    def expected(self, nu, scale):
        """Returns E[F] after nu T / S steps of rate S eta / nu, unsampled."""
        rate = scale * LEARNING_RATE / nu
        squares = START**2
        for _ in range(nu * self.TOTAL // scale):
            squares = (1 - rate * EIGENVALUES) ** 2 * squares
            squares = squares + rate**2 * nu * self.COVARIANCE / scale
        return (EIGENVALUES * squares).sum() / 2

    def sampled(self, nu, scale):
        random = np.random.default_rng(scale)
        rate = scale * LEARNING_RATE / nu
        deviation = np.sqrt(nu * self.COVARIANCE / scale)
        weights = np.tile(START, (RUNS, 1))
        for _ in range(nu * self.TOTAL // scale):
            noise = random.normal(size=weights.shape) * deviation
            weights = weights - rate * (EIGENVALUES * weights + noise)
        objectives = objective(weights)
        return objectives.mean(), objectives.std() / np.sqrt(RUNS)

    @pytest.mark.parametrize("scale", [2, 8])
    def test_gap_to_a_single_batch_vanishes(self, scale):
        gaps = [
            abs(self.expected(nu, scale) - self.expected(nu, 1))
            for nu in (16, 64, 256, 1024)
        ]
        # Euler's method: the error is of first order in the step, 1/nu.
        for larger, smaller in itertools.pairwise(gaps):
            assert 3 < larger / smaller < 6
        assert gaps[-1] < 1e-3

    def test_sampled_runs_agree_at_large_variance(self):
        nu, scale = 256, 8
        single, single_error = self.sampled(nu, 1)
        scaled, scaled_error = self.sampled(nu, scale)
        assert abs(single - self.expected(nu, 1)) < 4 * single_error
        assert abs(scaled - self.expected(nu, scale)) < 4 * scaled_error
        # The two limits differ by less than the error of the means.
        error = np.hypot(single_error, scaled_error)
        assert abs(scaled - single) < 4 * error
        assert error < 0.02 * single


class TestTheorem1And2:
    """E F(w_t) <= (1 - gamma)^tau F(w_0) + Delta for every S <= 1 / gamma."""

    @pytest.mark.parametrize("scale", [1, 2, 4, 8, 9, 16, 22])
    def test_expectation_meets_the_bound_at_every_step(self, scale):
        objectives, taus = expected_runs(adascale_gain(scale), scale=scale)
        assert np.all(objectives <= adascale_bound(taus))
        # The bound is generous: without variance in the two flat directions the
        # run ends below half of Delta, at every scale.
        assert objectives[-1] < 0.5 * DELTA

    @pytest.mark.parametrize("scale", [1, 4, 16])
    def test_runs_meet_the_bound_and_agree_with_their_expectation(self, scale):
        means, errors, taus = sampled_runs(adascale_gain(scale), scale=scale)
        assert np.all(means <= adascale_bound(taus) + 4 * errors)
        assert np.all(errors <= 0.05 * means)
        expected, expected_taus = expected_runs(
            adascale_gain(scale), scale=scale
        )
        # The shared gain is from the mean over 2000 runs. That keeps it, and so
        # tau, within half a percent.
        assert len(taus) == len(expected_taus)
        np.testing.assert_allclose(taus, expected_taus, rtol=5e-3)
        assert np.all(np.abs(means - expected) <= 4 * errors + 5e-3 * expected)

    def test_larger_scales_need_fewer_steps_but_no_fewer_than_linear(self):
        steps = [
            len(expected_runs(adascale_gain(scale), scale=scale)[0]) - 1
            for scale in (1, 2, 4, 8, 16)
        ]
        assert steps == sorted(steps, reverse=True)
        assert len(set(steps)) == 5
        for scale, taken in zip((1, 2, 4, 8, 16), steps):
            assert taken >= TOTAL_STEPS / scale

    def test_gain_warms_up(self):
        # E[mu^2] falls, so the gain rises: section 3.2.
        _, taus = expected_runs(adascale_gain(8), scale=8)
        gains = np.diff(taus)
        # |H w_0|^2 = 21: (0.9 + 21) / (0.9/8 + 21) = 1.0373.
        assert gains[0] == pytest.approx(21.9 / 21.1125, rel=1e-12)
        assert np.all(np.diff(gains) > 0)
        assert gains[-1] > 3


class TestTheorem3:
    """Linear scaling's bound and its final objective grow with S."""

    @pytest.mark.parametrize("scale", [1, 2, 4, 8, 9])
    def test_expectation_meets_the_bound_at_every_step(self, scale):
        objectives, taus = expected_runs(linear_gain(scale), scale=scale)
        steps = np.arange(len(taus))
        assert np.all(objectives <= linear_bound(steps, scale))

    @pytest.mark.parametrize("scale", [4, 9])
    def test_runs_meet_the_bound_at_every_step(self, scale):
        means, errors, _ = sampled_runs(
            linear_gain(scale), scale=scale, num_steps=60
        )
        steps = np.arange(len(means))
        assert np.all(means <= linear_bound(steps, scale) + 4 * errors)
        expected, _ = expected_runs(
            linear_gain(scale), scale=scale, num_steps=60
        )
        assert np.all(np.abs(means - expected) <= 4 * errors + 1e-12)

    def test_plateau_is_above_adascales_delta(self):
        # E[w^2] along the noise (h = 2, S eta h = 1.8) stops changing at
        # E[w^2] = S eta^2 0.9 / (1 - (1 - 1.8)^2) = 0.081 / 0.36 = 0.225, so
        # F = 2 * 0.225 / 2 = 0.225, over Delta = 0.2 and far below the bound
        # xi Delta = 9 * 0.2.
        objectives, _ = expected_runs(linear_gain(9), scale=9, num_steps=200)
        assert objectives[-1] == pytest.approx(0.225, rel=1e-9)
        means, errors, _ = sampled_runs(
            linear_gain(9), scale=9, num_steps=200, runs=20_000
        )
        assert abs(means[-1] - 0.225) < 4 * errors[-1]
        assert means[-1] > DELTA + 4 * errors[-1]
        # AdaScale at the same scale, for as many steps, ends below Delta.
        objectives, _ = expected_runs(adascale_gain(9), scale=9, num_steps=200)
        assert objectives[-1] < DELTA

    def test_diverges_beyond_its_limit_where_adascale_converges(self):
        # S eta beta = 11 * 0.2 = 2.2: each step multiplies w along the
        # steepest direction by 1 - 2.2, so w^2 by 1.44, and 1.44^50 = 8e7.
        linear, _ = expected_runs(linear_gain(11), scale=11, num_steps=50)
        assert linear[-1] > 1e7 * START_OBJECTIVE
        adascale, _ = expected_runs(adascale_gain(11), scale=11, num_steps=50)
        assert adascale[-1] < DELTA


class TestEstimatedGain:
    """AdaScale in practice: each run estimates its own gain."""

    RUNS = 500

    def train(self, scale, estimator, smoothing):
        """Trains with n = S samples per step, `RUNS` runs side by side.

        Returns:
            Arrays [steps + 1, runs]: F(w_t), tau_t. A run stops when its tau
            reaches the total.
        """
        random = np.random.default_rng(scale)
        weights = np.tile(START, (self.RUNS, 1))
        tau = np.zeros(self.RUNS)
        zero = float64(tau)
        averages = Averages(Moments(zero, zero), tf.constant(0, tf.int64))
        objectives, taus = [objective(weights)], [tau]
        while np.any(tau < TOTAL_STEPS):
            noise = random.normal(size=(scale, self.RUNS, 3))
            samples = EIGENVALUES * weights + noise * np.sqrt(COVARIANCE)
            mean = samples.mean(0)
            moments = gain_ops.moments(
                float64((samples**2).sum(2).mean(0)),
                float64((mean**2).sum(1)),
                num_samples=scale,
                scale=scale,
            )
            epsilon = gain_ops.RATIO_EPSILON
            if estimator == "moments":
                moments, epsilon = gain_ops.clamp_moments(moments), 0.0
            averages = gain_ops.update_averages(
                averages, moments, smoothing=smoothing
            )
            r = gain_ops.ratio(averages.moments, scale=scale, epsilon=epsilon)
            r = np.where(tau < TOTAL_STEPS, r.numpy(), 0.0)
            weights = weights - LEARNING_RATE * r[:, None] * mean
            tau = tau + r
            objectives.append(objective(weights))
            taus.append(tau)
        return np.array(objectives), np.array(taus)

    @pytest.mark.parametrize("smoothing", [None, 0.8])
    @pytest.mark.parametrize(
        "scale, estimator", [(2, "moments"), (16, "moments"), (8, "ratio")]
    )
    def test_meets_the_bound(self, scale, estimator, smoothing):
        if smoothing is None:
            smoothing = gain_ops.default_smoothing(scale)
        objectives, taus = self.train(scale, estimator, smoothing)
        errors = objectives.std(1) / np.sqrt(self.RUNS)
        # The theorems are for a gain of expectations, shared by all runs. Here
        # the mean run meets the mean of the runs' own bounds, to 4 errors.
        bounds = adascale_bound(taus).mean(1)
        assert np.all(objectives.mean(1) <= bounds + 4 * errors)
        assert np.all(taus[-1] >= TOTAL_STEPS)
        # Averages include past steps with larger gradients, so gains are too
        # small: more steps than with exact gains, but fewer than at S = 1.
        exact, _ = expected_runs(adascale_gain(scale), scale=scale)
        steps = np.argmax(taus >= TOTAL_STEPS, axis=0)
        assert len(exact) - 1 <= steps.mean() < TOTAL_STEPS
