"""Keras's dynamic loss scale, without Keras's step.

A `keras.optimizers.LossScaleOptimizer` reads from one replica whether the
gradients are finite. Here it only keeps the scale; the caller decides whether
the step is taken.
"""

from typing import Any

import keras
import tensorflow as tf

# Methods of `LossScaleOptimizer` that a wrapper does without.
REPLACED = (
    "apply",
    "apply_gradients",
    "check_finite",
    "_common_apply",
    "_stateful_handle_finite_grads",
    "_stateful_handle_non_finite_grads",
    "_tf_apply",
)


def is_dynamic(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether an optimizer is a `LossScaleOptimizer`.

    Example:

    >>> is_dynamic(keras.optimizers.SGD())
    False
    """
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def unwrap(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """Returns the optimizer inside a `LossScaleOptimizer`, or the one given.

    Example:

    >>> sgd = keras.optimizers.SGD()
    >>> unwrap(keras.optimizers.LossScaleOptimizer(sgd)) is sgd
    True
    """
    return optimizer.inner_optimizer if is_dynamic(optimizer) else optimizer


def factor(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the factor that the loss was multiplied by, or None for 1.

    Args:
        optimizer: Keras optimizer; a `LossScaleOptimizer` must be built.

    Returns:
        Scalar float32, a number (the static `loss_scale_factor`), or None.

    Example:

    >>> factor(keras.optimizers.SGD(loss_scale_factor=128.0))
    128.0
    """
    if is_dynamic(optimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    return optimizer.loss_scale_factor


def unscale(gradient: Any, factor: Any) -> Any:
    """Returns the gradient of a loss from that of the multiplied loss.

    Args:
        gradient: floating tensor or `tf.IndexedSlices`, of a loss that was
            multiplied by `factor`.
        factor: scalar, or None for 1.

    Returns:
        Like `gradient`, of the type that Keras's division has: float32 for
        half precision and a factor that is a tensor of float32. Half precision
        is divided in float32, because a factor of 65536 is infinite in float16.

    Example:

    >>> half = tf.constant([8192.0], "float16")
    >>> [unscale(half, x).dtype.name for x in (2.0**16, tf.constant(2.0**16))]
    ['float16', 'float32']
    """
    if factor is None:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        values = unscale(gradient.values, factor)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    wide = tf.float64 if gradient.dtype == tf.float64 else tf.float32
    quotient = tf.cast(gradient, wide) / tf.cast(factor, wide)
    return (
        quotient if tf.is_tensor(factor) else tf.cast(quotient, gradient.dtype)
    )


def assignments(
    optimizer: keras.optimizers.Optimizer, *, finite: bool
) -> list[tuple[Any, tf.Tensor]]:
    """Returns how a step changes the scale.

    A step whose gradients are not finite halves it. `dynamic_growth_steps`
    finite steps in a row double it.

    Args:
        optimizer: Keras optimizer; a `LossScaleOptimizer` must be built.
        finite: bool, whether the step's gradients are finite.

    Returns:
        List of `(variable, value)`; empty if the scale is not dynamic.

    Example:

    >>> optimizer = keras.optimizers.LossScaleOptimizer(
    ...     keras.optimizers.SGD(), initial_scale=8.0)
    >>> optimizer.build([])
    >>> (_, halved), (_, steps) = assignments(optimizer, finite=False)
    >>> float(halved), int(steps)
    (4.0, 0)
    """
    if not is_dynamic(optimizer):
        return []
    scale, counter = optimizer.dynamic_scale, optimizer.step_counter
    if not finite:
        return [(scale, scale / 2), (counter, tf.zeros_like(counter))]
    steps = counter + 1
    due = tf.equal(steps, optimizer.dynamic_growth_steps)
    return [
        (scale, tf.where(due, scale * 2, scale)),
        (counter, tf.where(due, tf.zeros_like(steps), steps)),
    ]
