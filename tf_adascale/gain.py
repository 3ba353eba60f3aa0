"""The arithmetic of AdaScale: from gradient norms to the gain and its sum.

Symbols of Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
Distributed Training", ICML 2020, and the names this library gives them:

    ======== ======================== ========================================
    paper    here                     meaning
    ======== ======================== ========================================
    n        num_samples              independent gradient samples per step
    S        scale                    batch of one step / base batch
    g_i      gradient sample i        mean gradient of 1/n of the step's batch
    g-bar    mean gradient            mean of the n samples
    sigma^2  gradient_variance        trace of the gradient covariance at the
                                      base batch size
    mu^2     gradient_sqnorm          squared norm of the true gradient
    r        gain (`ratio`)           between 1 and S
    tau      scale_invariant_step     sum of the gains
    theta    smoothing                parameter of the moving averages
    epsilon  epsilon                  keeps the gain defined at 0 / 0
    ======== ======================== ========================================

Both moments are kept at the *base* batch size, so that a change of the scale
needs no rescaling: the same two numbers give the gain at every scale.

All functions are pure, take and return scalar tensors of one floating type
(float32 or float64; Python numbers take the type of the tensors beside them),
and work eagerly, in a `tf.function` and under XLA.
"""

from typing import NamedTuple

import tensorflow as tf

# Floor of the variance in the "moments" estimator. Far below any gradient that
# trains anything, so that rescaling the loss does not change the gain, and far
# enough above float32's smallest normal number for a division by the scale.
VARIANCE_FLOOR = 1e-30

# Added to both moments by the "ratio" estimator, section 3.4 of the paper.
RATIO_EPSILON = 1e-6


class Moments(NamedTuple):
    """Moments of the gradient at the base batch size: one step's or averaged.

    Attributes:
        gradient_variance: scalar, sigma^2.
        gradient_sqnorm: scalar, mu^2.
    """

    gradient_variance: tf.Tensor  # scalar
    gradient_sqnorm: tf.Tensor  # scalar


class Averages(NamedTuple):
    """Moving averages of `Moments`.

    Attributes:
        moments: `Moments`, the averages; of no meaning while `count` is 0.
        count: scalar int64, number of steps averaged so far.
    """

    moments: Moments
    count: tf.Tensor  # scalar int64


class ScaleInvariantStep(NamedTuple):
    """tau as a whole number and a fraction, for it outgrows a float32.

    A gain between 1 and 2^24 is a multiple of 2^-23, and so is the fraction:
    their sum below 2 fits 24 bits, so adding gains is exact.

    Attributes:
        whole: scalar int64, floor(tau).
        fraction: scalar float32 in [0, 1).
    """

    whole: tf.Tensor  # scalar int64
    fraction: tf.Tensor  # scalar float32


def moments(mean_sqnorm, sqnorm_of_mean, *, num_samples, scale):
    """Returns unbiased estimates of the two moments from one step's gradients.

    With A = (1/n) sum |g_i|^2 and T = |g-bar|^2:

        sigma^2 = S / (n - 1) (A - T),    mu^2 = T - sigma^2 / S

    which for n = S is appendix B.3. A sample covers S/n base batches, so its
    variance is sigma^2 n / S; that is where S instead of n comes from.

    Args:
        mean_sqnorm: scalar, A, in units of the squared gradient.
        sqnorm_of_mean: scalar, T.
        num_samples: int >= 2, n.
        scale: number > 0, S.

    Returns:
        `Moments`. Either may be negative: see `floored`.

    Example:

    >>> # Two orthogonal gradients of norm 2, each on one base batch.
    >>> m = moments(tf.constant(4.0), tf.constant(2.0), num_samples=2, scale=2)
    >>> float(m.gradient_variance), float(m.gradient_sqnorm)
    (4.0, 0.0)

    Reference: Johnson et al. 2020, appendix B.3.
    """
    variance = (mean_sqnorm - sqnorm_of_mean) * (scale / (num_samples - 1))
    return Moments(variance, sqnorm_of_mean - variance / scale)


def differenced_moments(sqnorm_of_difference, dot, *, scale):
    """Returns estimates of the two moments from two successive mean gradients.

    With g of this step and g' of the step before, at nearly the same weights:

        sigma^2 = S |g - g'|^2 / 2,    mu^2 = <g, g'>

    This serves one gradient sample per step (one device, one large batch).

    Args:
        sqnorm_of_difference: scalar, |g - g'|^2.
        dot: scalar, <g, g'>.
        scale: number > 0, S.

    Returns:
        `Moments`. `gradient_sqnorm` may be negative: see `floored`.

    Example:

    >>> m = differenced_moments(tf.constant(2.0), tf.constant(3.0), scale=4)
    >>> float(m.gradient_variance), float(m.gradient_sqnorm)
    (4.0, 3.0)
    """
    return Moments(sqnorm_of_difference * (scale / 2), dot)


def floored(moments):
    """Returns the moments with sigma^2 >= 1e-30 and mu^2 >= 0.

    Done before averaging, it keeps the gain within [1, S].

    Args:
        moments: `Moments` of one step.

    Returns:
        `Moments`.

    Example:

    >>> m = floored(Moments(tf.constant(-1.0), tf.constant(-2.0)))
    >>> float(m.gradient_variance) > 0, float(m.gradient_sqnorm)
    (True, 0.0)

    Reference: Johnson et al. 2020, appendix B.3.
    """
    return Moments(
        tf.maximum(moments.gradient_variance, VARIANCE_FLOOR),
        tf.maximum(moments.gradient_sqnorm, 0.0),
    )


def default_smoothing(num_samples):
    """Returns theta = max(1 - n / 1000, 0), the paper's for S = n.

    Example:

    >>> default_smoothing(8), default_smoothing(2000)
    (0.992, 0.0)

    Reference: Johnson et al. 2020, section 3.4; appendix C shows that results
    hardly depend on it.
    """
    return max(1 - num_samples / 1000, 0.0)


def averaged(averages, moments, *, smoothing):
    """Returns the averages with one more step's moments included.

        x-bar <- x-bar + w (x - x-bar),    w = max(1 - theta, 1 / (t + 1))

    where t steps were averaged before: a plain mean at first, exponential
    later.

    Args:
        averages: `Averages` so far; anything finite while its count is 0.
        moments: `Moments` of this step.
        smoothing: float in [0, 1), theta.

    Returns:
        `Averages`.

    Example:

    >>> zero, one, three = tf.constant(0.0), tf.constant(1.0), tf.constant(3.0)
    >>> averages = Averages(Moments(zero, zero), tf.constant(0))
    >>> for variance in (one, three):
    ...     averages = averaged(averages, Moments(variance, one), smoothing=0.9)
    >>> float(averages.moments.gradient_variance), int(averages.count)
    (2.0, 2)

    Reference: Johnson et al. 2020, appendix B.3.
    """
    count = averages.count + 1
    dtype = moments.gradient_variance.dtype
    weight = tf.maximum(
        tf.constant(1.0 - smoothing, dtype), 1 / tf.cast(count, dtype)
    )

    def average(a, x):
        # Where the weight is 1, what was averaged before must not round x.
        return tf.where(weight < 1, a + weight * (x - a), x)

    return Averages(Moments(*map(average, averages.moments, moments)), count)


def ratio(moments, *, scale, epsilon=0.0):
    """Returns the gain.

        r = (sigma^2 + mu^2 + epsilon) / (sigma^2 / S + mu^2 + epsilon)

    clipped to [1, S], or [S, 1] where S < 1.

    With epsilon = 0 and floored averages this is equation (3). With
    epsilon > 0 and averages that were not floored it is section 3.4's
    (m1 + epsilon) / (m2 + epsilon), for m1 = sigma^2 + mu^2 is the mean squared
    norm of a base batch's gradient and m2 = sigma^2 / S + mu^2 that of the
    step's. At a scale other than the one they were measured at, unfloored
    averages may make either moment negative; it is then taken as 0.

    Args:
        moments: `Moments`, averaged.
        scale: number > 0, S; any scale, not only the one of the measurement.
        epsilon: number >= 0, in units of the squared gradient.

    Returns:
        Scalar, r. 1 where both moments and epsilon are 0, floored or not.

    Example:

    >>> # Orthogonal gradients at S = 2: nothing but noise, so the full gain.
    >>> float(ratio(Moments(tf.constant(4.0), tf.constant(0.0)), scale=2))
    2.0
    >>> # The same run, had it been made on 8 times the base batch.
    >>> float(ratio(Moments(tf.constant(4.0), tf.constant(4.0)), scale=8))
    1.7777777910232544

    Reference: Johnson et al. 2020, equation (3) and section 3.4.
    """
    # Halves, so that the sum of two finite moments is finite.
    variance, sqnorm = (moment / 2 for moment in moments)
    epsilon = epsilon / 2
    numerator = tf.maximum(variance + sqnorm, 0.0) + epsilon
    denominator = tf.maximum(variance / scale + sqnorm, 0.0) + epsilon
    gain = numerator / denominator
    # A gradient that is 0 at every sample says nothing; nor does its floor.
    gain = tf.where(numerator > VARIANCE_FLOOR, gain, tf.ones_like(gain))
    return tf.clip_by_value(gain, min(1.0, scale), max(1.0, scale))


def noise_scale(moments):
    """Returns sigma^2 / mu^2: the base batches in which noise equals signal.

    Args:
        moments: `Moments`, averaged.

    Returns:
        Scalar, in base batches. Infinite where mu^2 is 0, NaN where both are.

    Example:

    >>> float(noise_scale(Moments(tf.constant(6.0), tf.constant(2.0))))
    3.0

    Reference: McCandlish et al., "An Empirical Model of Large-Batch Training",
    2018, "simple noise scale".
    """
    return moments.gradient_variance / moments.gradient_sqnorm


def advanced(step, gain):
    """Returns the scale-invariant step one gain later, exactly.

        tau <- tau + r

    Args:
        step: `ScaleInvariantStep`.
        gain: scalar float32 in [0, 2^24), r.

    Returns:
        `ScaleInvariantStep`. Exact for gains of 1 and more.

    Example:

    >>> step = ScaleInvariantStep(tf.constant(2**40), tf.constant(0.75))
    >>> step = advanced(step, tf.constant(1.5))
    >>> int(step.whole) - 2**40, float(step.fraction)
    (2, 0.25)

    Reference: Johnson et al. 2020, algorithm 2.
    """
    whole = tf.floor(gain)
    # Both terms are below 1 and multiples of 2^-23, see ScaleInvariantStep.
    fraction = step.fraction + (gain - whole)
    carry = tf.floor(fraction)
    return ScaleInvariantStep(
        step.whole + tf.cast(whole + carry, step.whole.dtype), fraction - carry
    )
