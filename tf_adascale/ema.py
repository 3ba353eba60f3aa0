"""The exponential moving average of a model's weights, at any scale."""

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
