"""The preconditioner of an adaptive optimizer: what it divides gradients by.

Adam and its variants step by m / (sqrt(v-hat) + epsilon), where v is a moving
average of squared gradients. The noise of their step is the noise of gradients
in these units.

Relies on slots of Keras's optimizers that are not public API. Checked on Keras
3.10 to 3.15, these are `_velocities`, `_velocity_hats` (AMSGrad),
`_average_gradients` (centered RMSprop) and `_u` (Adamax).
"""

from typing import Any

import keras
import tensorflow as tf

from tf_adascale.ops import norms

# Steps after which v-hat is an average worth dividing by. AdaptDL's number.
WARM_STEPS = 5

# Least divisor, relative to the root mean square of a variable's divisors. A
# unit that was dead, or an embedding's row that was never used, has next to no
# second moment at its first gradient. Divided by that, a hundred such entries
# would outweigh all others together.
FLOOR = 0.01

_KNOWN = (
    keras.optimizers.Adam,  # And AdamW.
    keras.optimizers.Adamax,
    keras.optimizers.Lamb,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
)


def check(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises a ValueError if an optimizer has no second moment.

    Args:
        optimizer: Keras optimizer, not a wrapper.

    Example:

    >>> check(keras.optimizers.AdamW())
    """
    if not isinstance(optimizer, _KNOWN):
        names = ", ".join(known.__name__ for known in _KNOWN)
        raise ValueError(
            "`inner_optimizer` must keep a second moment of its gradients if "
            f"preconditioned=True: be one of {names}, or a subclass of these. "
            f"Received: inner_optimizer={optimizer!r}"
        )


def is_warm(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """Returns whether the second moment averages enough steps, scalar bool.

    Example:

    >>> bool(is_warm(keras.optimizers.Adam()))
    False
    """
    return tf.convert_to_tensor(optimizer.iterations) >= WARM_STEPS


def divisors(optimizer: keras.optimizers.Optimizer, slot: int) -> tf.Tensor:
    """Returns what the next step divides a variable's gradient by.

        sqrt(v / (1 - beta^t)) + epsilon

    with v and t as they are before the step. Under AMSGrad v is the largest so
    far. Adamax has u + epsilon instead, a norm from the start. RMSprop has rho
    for beta; if it is centered, it subtracts the squared mean first.

    The first term is at least `FLOOR` times its root mean square over the
    variable.

    Args:
        optimizer: Keras optimizer that passes `check`, built.
        slot: int, the variable's place among those the optimizer was built on.

    Returns:
        Tensor of the variable's shape, float32 or wider; ones until the second
        moment is warm.

    Example:

    >>> adam = keras.optimizers.Adam(epsilon=0.5)
    >>> weight = keras.Variable([0.0])
    >>> for _ in range(5):
    ...     adam.apply([tf.constant([2.0])], [weight])
    >>> divisors(adam, 0).numpy().round(3).tolist()
    [2.5]

    Reference: Qiao et al., "Pollux: Co-adaptive Cluster Scheduling for
    Goodput-Optimized Deep Learning", OSDI 2021, AdamScale.
    """
    if isinstance(optimizer, keras.optimizers.Adamax):
        root = _read(optimizer._u[slot])
    else:
        root = tf.sqrt(_second_moment(optimizer, slot))
    root = tf.maximum(root, FLOOR * tf.sqrt(tf.reduce_mean(root**2)))
    divisor = root + optimizer.epsilon
    return tf.where(is_warm(optimizer), divisor, tf.ones_like(divisor))


def precondition(
    gradients: list[Any], divisors: list[tf.Tensor] | None
) -> list[Any]:
    """Returns gradients divided entry by entry, float32 or wider.

    Args:
        gradients: list of floating tensors, `tf.IndexedSlices` or None.
        divisors: list of tensors of the variables' shapes; None for 1.

    Returns:
        List like `gradients`.

    Example:

    >>> half, none = precondition(
    ...     [tf.constant([3.0]), None], [tf.constant([6.0])] * 2)
    >>> half.numpy().tolist(), none
    ([0.5], None)
    """
    if divisors is None:
        return gradients
    return [
        None if gradient is None else _divide(gradient, divisor)
        for gradient, divisor in zip(gradients, divisors)
    ]


def squared_norm(
    gradients: list[Any], divisors: list[tf.Tensor] | None
) -> tf.Tensor:
    """Returns the squared norm of preconditioned gradients, scalar float32.

    Args:
        gradients: as for `precondition`.
        divisors: likewise.

    Example:

    >>> float(squared_norm([tf.constant([3.0])], [tf.constant([6.0])]))
    0.25
    """
    preconditioned = precondition(gradients, divisors)
    return tf.cast(norms.squared_norm(preconditioned), tf.float32)


def _divide(gradient, divisor):
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.cast(gradient, divisor.dtype) / divisor
    return tf.IndexedSlices(
        tf.cast(gradient.values, divisor.dtype)
        / tf.gather(divisor, gradient.indices),
        gradient.indices,
        gradient.dense_shape,
    )


def _second_moment(optimizer, slot):
    """Returns the bias-corrected second moment."""
    is_rmsprop = isinstance(optimizer, keras.optimizers.RMSprop)
    decay = optimizer.rho if is_rmsprop else optimizer.beta_2
    slots = optimizer._velocities
    if getattr(optimizer, "amsgrad", False):
        slots = optimizer._velocity_hats
    velocity = _read(slots[slot])
    steps = tf.cast(tf.convert_to_tensor(optimizer.iterations), velocity.dtype)
    # 1 - decay^t; 0 at the start, when nothing is divided yet.
    weight = -tf.math.expm1(steps * tf.math.log(tf.cast(decay, velocity.dtype)))
    weight = tf.where(steps > 0, weight, tf.ones_like(weight))
    moment = velocity / weight
    if getattr(optimizer, "centered", False):
        mean = _read(optimizer._average_gradients[slot]) / weight
        moment = tf.maximum(moment - mean**2, 0.0)
    return moment


def _read(slot):
    value = tf.convert_to_tensor(slot)
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)
