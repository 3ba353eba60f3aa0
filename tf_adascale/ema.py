"""The exponential moving average of a model's weights, at any scale."""

import math

import tensorflow as tf


def scaled_momentum(momentum, gain):
    """Returns the momentum that makes one step count as `gain` base steps.

        rho <- rho^r

    so that the average has the same memory, in scale-invariant steps, at every
    scale.

    Args:
        momentum: number in [0, 1], rho, tuned at the base batch size.
        gain: scalar tensor, r, the base steps that this step stands for.

    Returns:
        Scalar of the gain's type.

    Example:

    >>> float(scaled_momentum(0.5, tf.constant(3.0)))
    0.125
    >>> # The target network of BYOL, after each step of the online network:
    >>> def follow(target, online, optimizer, momentum=0.99):
    ...     momentum = scaled_momentum(momentum, optimizer.gain)
    ...     for average, weight in zip(target.weights, online.weights):
    ...         average.assign(averaged(average, weight, momentum))

    Reference: Busbridge et al., "How to Scale Your EMA", NeurIPS 2023, with
    the gain for their kappa.
    """
    return tf.constant(momentum, gain.dtype) ** gain


def averaged(average, value, momentum):
    """Returns the moving average with one more value included.

        average <- rho average + (1 - rho) value

    Args:
        average: floating tensor, the average so far.
        value: tensor of the same type and shape.
        momentum: number or scalar in [0, 1], rho; 0 starts the average at
            `value`.

    Returns:
        Tensor like `average`.

    Example:

    >>> float(averaged(tf.constant(1.0), tf.constant(3.0), tf.constant(0.75)))
    1.5
    """
    if not tf.is_tensor(momentum):
        momentum = tf.constant(momentum, average.dtype)
    momentum = tf.cast(momentum, average.dtype)
    return momentum * average + (1 - momentum) * value


def advanced(average, before, after, *, momentum, steps):
    """Returns the moving average after one step that counts as several.

    As if the weights had moved from w to w' in r equal base steps, each of them
    averaged:

        average <- rho^r average + (1 - rho^r) x,
        x = w + (w' - w) sum over j = 1..r of w_j j / r,
        w_j = rho^(r-j) (1 - rho) / (1 - rho^r)

    for any r > 0. With r = 1 that is `averaged(average, after, momentum)`. The
    simpler rho^r average + (1 - rho^r) w' would take every base step for the
    last of them, and so lag by (r - 1) / 2 base steps too little.

    Args:
        average: floating tensor, the average so far. One that starts with the
            first base step is w + (w' - w) / r.
        before: tensor of the same type and shape, w.
        after: tensor of the same type and shape, w'.
        momentum: number in [0, 1], rho, tuned at the base batch size.
        steps: scalar tensor > 0 of the same type, r: the gain.

    Returns:
        Tensor like `average`.

    Example:

    >>> # Base steps of 1, rho = 1/2: averages 0, then (0 + 1) / 2 = 0.5, then
    >>> # (0.5 + 2) / 2 = 1.25.
    >>> zero, two = tf.constant(0.0), tf.constant(2.0)
    >>> average = advanced(zero, zero, two, momentum=0.5, steps=two)
    >>> round(float(average), 6)
    1.25

    Reference: Busbridge et al., "How to Scale Your EMA", NeurIPS 2023, whose
    rule leaves out the terms of the order of the learning rate that x holds.
    """
    position = after
    if 0 < momentum < 1:
        way = _mean_way(momentum, steps)
        position = before + tf.cast(way, before.dtype) * (after - before)
    return averaged(average, position, scaled_momentum(momentum, steps))


def _mean_way(momentum, steps):
    """Returns sum over j of w_j j / r, see `advanced`; for rho in (0, 1)."""
    # It is 1 / (1 - rho^r) - c / r with c = rho / (1 - rho), which are both
    # huge for rho near 1. Written as 1/2 + L(y/2)/2 + (1/y - c/r), with
    # y = -r log(rho) and L(z) = coth(z) - 1/z, no term is.
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
