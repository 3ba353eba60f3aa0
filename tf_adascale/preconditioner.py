"""What an adaptive optimizer divides its gradients by.

Adam and its kin step by m / (sqrt(v-hat) + epsilon), where v is a moving
average of squared gradients. In these units, and not in those of the gradient,
the noise of a step counts.

Leans on slots of Keras's optimizers that are not public API. Checked on Keras
3.10 to 3.15, these are `_velocities`, `_velocity_hats` (AMSGrad),
`_average_gradients` (centered RMSprop) and `_u` (Adamax).
"""

import keras
import tensorflow as tf

# Steps after which v-hat is an average worth dividing by. AdaptDL's number.
WARM_STEPS = 5

# A unit that was dead, or a row of an embedding that was not used, has next to
# no second moment when its first gradient comes. Divided by that, the gradients
# of a hundred entries outweigh those of all the others together.
FLOOR = 0.01

_KNOWN = (
    keras.optimizers.Adam,  # And AdamW.
    keras.optimizers.Adamax,
    keras.optimizers.Lamb,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
)


def check(optimizer):
    """Raises a ValueError if an optimizer has no second moment.

    Args:
        optimizer: Keras optimizer, not a wrapper.

    Example:

    >>> check(keras.optimizers.AdamW())
    """
    if not isinstance(optimizer, _KNOWN):
        names = ", ".join(known.__name__ for known in _KNOWN)
        raise ValueError(
            "The inner optimizer keeps no second moment of its gradients to "
            f"divide them by. Expected one of {names} or a subclass of these, "
            f"or preconditioned=False. Received: optimizer={optimizer!r}"
        )


def is_warm(optimizer):
    """Returns whether the second moment averages enough steps, scalar bool.

    Example:

    >>> bool(is_warm(keras.optimizers.Adam()))
    False
    """
    return tf.convert_to_tensor(optimizer.iterations) >= WARM_STEPS


def divisors(optimizer, slot):
    """Returns what the next step divides a variable's gradient by.

        sqrt(v / (1 - beta^t)) + epsilon

    with v and t as they are before the step. v is the largest so far under
    AMSGrad. Adamax has u + epsilon in its place, a norm from the start; RMSprop
    has rho for beta, and takes the mean off first if it is centered.

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
        scale = _read(optimizer._u[slot])
    else:
        scale = tf.sqrt(_second_moment(optimizer, slot))
    scale = tf.maximum(scale, FLOOR * tf.sqrt(tf.reduce_mean(scale**2)))
    divisor = scale + optimizer.epsilon
    return tf.where(is_warm(optimizer), divisor, tf.ones_like(divisor))


def divided(gradient, divisor):
    """Returns a gradient divided entry by entry, float32 or wider.

    Args:
        gradient: floating tensor or `tf.IndexedSlices`.
        divisor: tensor of the variable's shape.

    Example:

    >>> divided(tf.constant([3.0]), tf.constant([2.0])).numpy().tolist()
    [1.5]
    """
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
