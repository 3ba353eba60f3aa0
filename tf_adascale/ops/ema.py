"""The exponential moving average of a model's weights, at any scale.

Scale S is the batch of one step divided by the base batch, the batch size that
the hyperparameters were tuned for. Gain r is the number of steps at the base
batch that one step is worth, see `tf_adascale.ops.gain`.

All functions are pure. They work eagerly, in a `tf.function` and under XLA.
"""

import math

import tensorflow as tf


def scaled_momentum(momentum: float, gain: tf.Tensor) -> tf.Tensor:
    """Returns the momentum that makes one step count as `gain` base steps.

        rho <- rho^r                                                        (1)

    The average then has the same memory at every scale, in base steps.

    Args:
        momentum: number in [0, 1], rho, tuned at the base batch size.
        gain: floating scalar, r, the base steps that this step is worth.

    Returns:
        Scalar of the gain's dtype.

    Example:

    >>> float(scaled_momentum(0.5, tf.constant(3.0)))
    0.125
    >>> # The target network of BYOL, after each step of the online network:
    >>> def follow(target, online, optimizer, momentum=0.99):
    ...     momentum = scaled_momentum(momentum, optimizer.gain)
    ...     for average, weight in zip(target.weights, online.weights):
    ...         average.assign(update_average(average, weight, momentum))

    Reference: Busbridge et al., "How to Scale Your EMA", NeurIPS 2023, whose
    kappa is the gain here.
    """
    return tf.constant(momentum, gain.dtype) ** gain


def update_average(
    average: tf.Tensor, value: tf.Tensor, momentum: float | tf.Tensor
) -> tf.Tensor:
    """Returns the moving average after one more value.

        average <- rho average + (1 - rho) value                            (2)

    Args:
        average: floating tensor, the average so far.
        value: tensor of the same dtype and shape.
        momentum: number or scalar in [0, 1], rho. 0 returns `value`.

    Returns:
        Tensor of the same dtype and shape.

    Example:

    >>> float(update_average(tf.constant(1.0), tf.constant(3.0), 0.75))
    1.5
    """
    if not tf.is_tensor(momentum):
        momentum = tf.constant(momentum, average.dtype)
    momentum = tf.cast(momentum, average.dtype)
    return momentum * average + (1 - momentum) * value


def advance_average(
    average: tf.Tensor,
    before: tf.Tensor,
    after: tf.Tensor,
    *,
    momentum: float,
    steps: tf.Tensor,
) -> tf.Tensor:
    """Returns the moving average after one step that is worth several.

    The result is what the average would be if the weights had moved from w to
    w' in r equal base steps, with one update of the average after each:

        average <- rho^r average + (1 - rho^r) x                            (3)
        x = w + (w' - w) sum over j = 1..r, w_j j / r
        w_j = rho^(r-j) (1 - rho) / (1 - rho^r)

    r may be any number > 0. With r = 1 this is equation (2) with w' as the
    value. The simpler rho^r average + (1 - rho^r) w' would treat every base
    step as the last one, and its lag would be (r - 1) / 2 base steps too short.

    Args:
        average: floating tensor, the average so far. For an average that starts
            with the first base step, pass w + (w' - w) / r.
        before: tensor of the same dtype and shape, w.
        after: tensor of the same dtype and shape, w'.
        momentum: number in [0, 1], rho, tuned at the base batch size.
        steps: scalar > 0 of the same dtype, r, the gain.

    Returns:
        Tensor of the same dtype and shape.

    Example:

    >>> # Base steps of 1, rho = 1/2: averages 0, then (0 + 1) / 2 = 0.5, then
    >>> # (0.5 + 2) / 2 = 1.25.
    >>> zero, two = tf.constant(0.0), tf.constant(2.0)
    >>> average = advance_average(zero, zero, two, momentum=0.5, steps=two)
    >>> round(float(average), 6)
    1.25

    Reference: Busbridge et al., "How to Scale Your EMA", NeurIPS 2023. Their
    rule omits the terms of the order of the learning rate that x contains.
    """
    position = after
    if 0 < momentum < 1:
        share = _mean_share(momentum, steps)
        position = before + tf.cast(share, before.dtype) * (after - before)
    return update_average(average, position, scaled_momentum(momentum, steps))


def _mean_share(momentum, steps):
    """Returns sum over j, w_j j / r of equation (3), for rho in (0, 1)."""
    # The sum is 1 / (1 - rho^r) - c / r with c = rho / (1 - rho). Both terms
    # are huge for rho near 1. With y = -r log(rho) and L(z) = coth(z) - 1/z it
    # is 1/2 + L(y/2)/2 + (1/y - c/r), where no term is.
    rate = -math.log(momentum)
    offset = 1 / rate - momentum / (1 - momentum)
    z = steps * (rate / 2)
    small = z < 0.25
    safe = tf.where(small, tf.ones_like(z), z)
    langevin = tf.where(
        small,
        z / 3 - z**3 / 45 + 2 * z**5 / 945,
        1 / tf.tanh(safe) - 1 / safe,
    )
    return 0.5 + langevin / 2 + offset / steps
