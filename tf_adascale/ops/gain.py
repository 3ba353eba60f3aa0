"""The arithmetic of AdaScale: from gradient norms to the gain and its sum.

Symbols of Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
Distributed Training", ICML 2020, and their names in this library:

    ======== ======================== ========================================
    paper    code                     meaning
    ======== ======================== ========================================
    n        num_samples              independent gradient samples per step
    S        scale                    batch of one step / base batch
    g_i      gradient sample i        mean gradient of 1/n of the step's batch
    g-bar    mean gradient            mean of the n samples
    sigma^2  gradient_variance        trace of the gradient covariance at the
                                      base batch size
    mu^2     gradient_sqnorm          squared norm of the true gradient
    r        gain                     base steps that a step is worth, in
                                      [1, S]
    tau      scale_invariant_step     sum of the gains
    theta    smoothing                parameter of the moving averages
    epsilon  epsilon                  keeps the gain defined at 0 / 0
    ======== ======================== ========================================

Both moments are at the *base* batch size, so the same two numbers give the gain
at every scale and a change of the scale needs no rescaling.

`advance` is one step of algorithm 2. All functions are pure, take and return
scalar tensors of one floating type (float32 or float64; Python numbers take the
type of the tensors beside them), and work eagerly, in a `tf.function` and under
XLA.
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
    """Moments of the gradient at the base batch size: of one step or averaged.

    Attributes:
        gradient_variance: scalar, sigma^2.
        gradient_sqnorm: scalar, mu^2.
    """

    gradient_variance: tf.Tensor
    gradient_sqnorm: tf.Tensor


class Averages(NamedTuple):
    """Moving averages of `Moments`.

    Attributes:
        moments: `Moments`, the averages; meaningless while `count` is 0.
        count: scalar int64, number of steps averaged so far.
    """

    moments: Moments
    count: tf.Tensor


class ScaleInvariantStep(NamedTuple):
    """tau as a whole number and a fraction, because it outgrows a float32.

    A gain between 1 and 2^24 is a multiple of 2^-23, and so is the fraction.
    Their sum below 2 fits 24 bits, so adding gains is exact.

    Attributes:
        whole: scalar int64, floor(tau).
        fraction: scalar float32 in [0, 1).
    """

    whole: tf.Tensor
    fraction: tf.Tensor


class State(NamedTuple):
    """All that AdaScale remembers between steps.

    Attributes:
        averages: `Averages`.
        step: `ScaleInvariantStep`.
    """

    averages: Averages
    step: ScaleInvariantStep


def advance(
    state: State,
    moments: Moments | None,
    *,
    scale: float,
    smoothing: float,
    epsilon: float = 0.0,
    is_measured: tf.Tensor | None = None,
) -> tuple[tf.Tensor, State]:
    """Returns one step's gain, and the state after it.

    Algorithm 2: average the moments, compute the gain r from the averages, add
    it to tau.

    Args:
        state: `State` before the step.
        moments: `Moments` of this step, or None if it measures nothing. The
            averages then stay, and the gain follows from them.
        scale: number > 0, S of this step.
        smoothing: float in [0, 1), theta.
        epsilon: number >= 0, see `ratio`.
        is_measured: scalar bool, whether `moments` hold a measurement, where
            only the graph can tell; None for yes.

    Returns:
        Scalar, r; and `State`.

    Example:

    >>> zero = tf.constant(0.0)
    >>> state = State(
    ...     Averages(Moments(zero, zero), tf.constant(0, tf.int64)),
    ...     ScaleInvariantStep(tf.constant(0, tf.int64), zero))
    >>> moments = Moments(tf.constant(4.0), tf.constant(4.0))
    >>> gain, state = advance(state, moments, scale=3, smoothing=0.99)
    >>> # r = (4 + 4) / (4/3 + 4) = 1.5
    >>> float(gain), int(state.step.whole), float(state.step.fraction)
    (1.5, 1, 0.5)

    Reference: Johnson et al. 2020, algorithm 2 and equation (3).
    """
    averages = state.averages
    if moments is not None:
        averages = update_averages(averages, moments, smoothing=smoothing)
    if is_measured is not None:
        averages = tf.nest.map_structure(
            lambda new, old: tf.where(is_measured, new, old),
            averages,
            state.averages,
        )
    gain = current(averages, scale=scale, epsilon=epsilon)
    return gain, State(averages, advance_step(state.step, gain))


def moments(
    mean_sqnorm: tf.Tensor,
    sqnorm_of_mean: tf.Tensor,
    *,
    num_samples: int,
    scale: float,
) -> Moments:
    """Returns unbiased estimates of the two moments from one step's gradients.

    With A = (1/n) sum |g_i|^2 and T = |g-bar|^2:

        sigma^2 = S / (n - 1) (A - T),    mu^2 = T - sigma^2 / S

    which for n = S is appendix B.3. A sample covers S/n base batches, so its
    variance is sigma^2 n / S; hence the factor S instead of n.

    Args:
        mean_sqnorm: scalar, A, in units of the squared gradient.
        sqnorm_of_mean: scalar, T.
        num_samples: int >= 2, n.
        scale: number > 0, S.

    Returns:
        `Moments`. Either may be negative: see `clamp_moments`.

    Example:

    >>> # Two orthogonal gradients of norm 2, each on one base batch.
    >>> m = moments(tf.constant(4.0), tf.constant(2.0), num_samples=2, scale=2)
    >>> float(m.gradient_variance), float(m.gradient_sqnorm)
    (4.0, 0.0)

    Reference: Johnson et al. 2020, appendix B.3.
    """
    variance = (mean_sqnorm - sqnorm_of_mean) * (scale / (num_samples - 1))
    return Moments(variance, sqnorm_of_mean - variance / scale)


def differenced_moments(
    sqnorm_of_difference: tf.Tensor, dot: tf.Tensor, *, scale: float
) -> Moments:
    """Returns estimates of the two moments from two successive mean gradients.

    With g of this step and g' of the step before, at nearly the same weights:

        sigma^2 = S |g - g'|^2 / 2,    mu^2 = <g, g'>

    This estimate needs one gradient sample per step: one device that takes one
    large batch.

    Args:
        sqnorm_of_difference: scalar, |g - g'|^2.
        dot: scalar, <g, g'>.
        scale: number > 0, S.

    Returns:
        `Moments`. `gradient_sqnorm` may be negative: see `clamp_moments`.

    Example:

    >>> m = differenced_moments(tf.constant(2.0), tf.constant(3.0), scale=4)
    >>> float(m.gradient_variance), float(m.gradient_sqnorm)
    (4.0, 3.0)
    """
    return Moments(sqnorm_of_difference * (scale / 2), dot)


def clamp_moments(moments: Moments) -> Moments:
    """Returns the moments with sigma^2 >= 1e-30 and mu^2 >= 0.

    Clamping before averaging keeps the gain within [1, S].

    Args:
        moments: `Moments` of one step.

    Returns:
        `Moments`.

    Example:

    >>> m = clamp_moments(Moments(tf.constant(-1.0), tf.constant(-2.0)))
    >>> float(m.gradient_variance) > 0, float(m.gradient_sqnorm)
    (True, 0.0)

    Reference: Johnson et al. 2020, appendix B.3.
    """
    return Moments(
        tf.maximum(moments.gradient_variance, VARIANCE_FLOOR),
        tf.maximum(moments.gradient_sqnorm, 0.0),
    )


def default_smoothing(num_samples: int) -> float:
    """Returns theta = max(1 - n / 1000, 0), the paper's for S = n.

    Args:
        num_samples: int >= 1, n.

    Returns:
        Float in [0, 1).

    Example:

    >>> default_smoothing(8), default_smoothing(2000)
    (0.992, 0.0)

    Reference: Johnson et al. 2020, section 3.4; appendix C shows that results
    hardly depend on it.
    """
    return max(1 - num_samples / 1000, 0.0)


def update_averages(
    averages: Averages, moments: Moments, *, smoothing: float
) -> Averages:
    """Returns the averages with one more step's moments included.

        x-bar <- x-bar + w (x - x-bar),    w = max(1 - theta, 1 / (t + 1))

    where t steps were averaged before: a plain mean at first, exponential
    later.

    Args:
        averages: `Averages` so far; any finite numbers while the count is 0.
        moments: `Moments` of this step.
        smoothing: float in [0, 1), theta.

    Returns:
        `Averages`.

    Example:

    >>> zero, one, three = tf.constant(0.0), tf.constant(1.0), tf.constant(3.0)
    >>> averages = Averages(Moments(zero, zero), tf.constant(0))
    >>> for variance in (one, three):
    ...     step = Moments(variance, one)
    ...     averages = update_averages(averages, step, smoothing=0.9)
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
        # Where the weight is 1, the old average must not round x.
        return tf.where(weight < 1, a + weight * (x - a), x)

    return Averages(Moments(*map(average, averages.moments, moments)), count)


def current(
    averages: Averages, *, scale: float, epsilon: float = 0.0
) -> tf.Tensor:
    """Returns the gain that averages give, 1 before they hold anything.

    Args:
        averages: `Averages`.
        scale: number > 0, S; any scale.
        epsilon: number >= 0, see `ratio`.

    Returns:
        Scalar, r.

    Example:

    >>> one = tf.constant(1.0)
    >>> [round(float(current(Averages(Moments(one, one), count), scale=4)), 6)
    ...  for count in (0, 1)]
    [1.0, 1.6]
    """
    gain = ratio(averages.moments, scale=scale, epsilon=epsilon)
    return tf.where(averages.count > 0, gain, tf.ones_like(gain))


def ratio(moments: Moments, *, scale: float, epsilon: float = 0.0) -> tf.Tensor:
    """Returns the gain.

        r = (sigma^2 + mu^2 + epsilon) / (sigma^2 / S + mu^2 + epsilon)

    clipped to [1, S], or [S, 1] where S < 1.

    With epsilon = 0 and clamped averages this is equation (3). With
    epsilon > 0 and averages that were not clamped it is section 3.4's
    (m1 + epsilon) / (m2 + epsilon), for m1 = sigma^2 + mu^2 is the mean squared
    norm of a base batch's gradient and m2 = sigma^2 / S + mu^2 that of the
    step's. At a scale other than the one they were measured at, averages that
    were not clamped may make either moment negative; it then counts as 0.

    Args:
        moments: `Moments`, averaged.
        scale: number > 0, S; any scale, not only the one of the measurement.
        epsilon: number >= 0, in units of the squared gradient.

    Returns:
        Scalar, r. 1 where both moments and epsilon are 0, clamped or not.

    Example:

    >>> # Orthogonal gradients at S = 2: nothing but noise, so the full gain.
    >>> float(ratio(Moments(tf.constant(4.0), tf.constant(0.0)), scale=2))
    2.0
    >>> # As much signal as noise at S = 3: r = (4 + 4) / (4/3 + 4).
    >>> float(ratio(Moments(tf.constant(4.0), tf.constant(4.0)), scale=3))
    1.5

    Reference: Johnson et al. 2020, equation (3) and section 3.4.
    """
    # Halves, so that the sum of two finite moments is finite.
    variance, sqnorm = (moment / 2 for moment in moments)
    epsilon = epsilon / 2
    numerator = tf.maximum(variance + sqnorm, 0.0) + epsilon
    denominator = tf.maximum(variance / scale + sqnorm, 0.0) + epsilon
    one = tf.ones_like(numerator)
    is_zero = denominator <= 0  # Numerics checks would see the division.
    gain = tf.where(is_zero, max(1.0, scale) * one, numerator)
    gain /= tf.where(is_zero, one, denominator)
    # If every sample is zero, the gain is undefined: 1.
    gain = tf.where(numerator > VARIANCE_FLOOR, gain, one)
    return tf.clip_by_value(gain, min(1.0, scale), max(1.0, scale))


def noise_scale(moments: Moments) -> tf.Tensor:
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


def advance_step(
    step: ScaleInvariantStep, gain: tf.Tensor
) -> ScaleInvariantStep:
    """Returns the scale-invariant step one gain later, exactly.

        tau <- tau + r

    Args:
        step: `ScaleInvariantStep`.
        gain: scalar float32 in [0, 2^24), r.

    Returns:
        `ScaleInvariantStep`. Exact for gains of 1 and more.

    Example:

    >>> step = ScaleInvariantStep(tf.constant(2**40), tf.constant(0.75))
    >>> step = advance_step(step, tf.constant(1.5))
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
