"""What a step does to the variables of a Keras optimizer, on every device.

The functions are for inside what `replicas.hand_off` calls, where Keras's own
`apply` cannot be used: it would reduce the gradients, and leave the context.
Values are each device's own.

Leans on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _apply_weight_decay              done by `update` instead
    _backend_update_step             likewise; Nadam's is the only one known
    _use_weight_decay                whether a variable decays
    _trainable_variables             the variables an optimizer was built on
    _model_variables_moving_average  the slots of `use_ema`
    _u_product                       Nadam's, which belongs to no variable
"""

import keras
import tensorflow as tf

from tf_adascale import ema, replicas


def check(optimizer, *, name):
    """Raises a ValueError if an optimizer steps otherwise than `update` does.

    Args:
        optimizer: Keras optimizer, not a wrapper.
        name: str, who asks.

    Example:

    >>> check(keras.optimizers.SGD(), name="AdaScale")
    """
    for hook in ("_apply_weight_decay", "_backend_update_step"):
        known = [
            getattr(cls, hook)
            for cls in (keras.optimizers.Optimizer, keras.optimizers.Nadam)
        ]
        if getattr(type(optimizer), hook) not in known:
            raise ValueError(
                "The inner optimizer steps in a way of its own, which "
                f"{name} cannot follow. Expected one that does not override "
                f"{hook} of keras.optimizers.Optimizer. Received: "
                f"optimizer={optimizer!r}"
            )


def update(strategy, optimizer, variables, gradients, rate):
    """Takes an optimizer's step: weight decay, slots and weights.

    Args:
        strategy: `tf.distribute.Strategy`.
        optimizer: Keras optimizer that passes `check`, built.
        variables: list of those to update.
        gradients: list of tensors or `tf.IndexedSlices`.
        rate: scalar, the learning rate.

    Example:

    >>> sgd, weight = keras.optimizers.SGD(), keras.Variable([1.0])
    >>> sgd.build([weight])
    >>> update(replicas.strategy(), sgd, [weight], [tf.constant([2.0])], 0.25)
    >>> weight.numpy().tolist()
    [0.5]
    """

    def update_one(variable, gradient, rate):
        # Keras's _apply_weight_decay would leave the context of the update.
        if optimizer.weight_decay is not None and optimizer._use_weight_decay(
            variable
        ):
            decay = tf.cast(optimizer.weight_decay, variable.dtype)
            variable.assign_sub(
                variable * decay * tf.cast(rate, variable.dtype)
            )
        optimizer.update_step(gradient, variable, rate)

    if gradients and isinstance(optimizer, keras.optimizers.Nadam):
        _advance_nadam(strategy, optimizer)
    for variable, gradient in zip(variables, gradients):
        replicas.update(strategy, variable, update_one, gradient, rate)


def averaged_weights(optimizer):
    """Returns the list of the variables that `use_ema` averages.

    Example:

    >>> averaged_weights(keras.optimizers.SGD())
    []
    """
    return optimizer._trainable_variables if optimizer.use_ema else []


def average(strategy, optimizer, *, before, base_steps):
    """Advances the averages of `use_ema`, once the weights are updated.

    To be called before the optimizer's iterations are incremented.

    Args:
        strategy: `tf.distribute.Strategy`.
        optimizer: Keras optimizer, built.
        before: list of tensors, `averaged_weights` before the step.
        base_steps: scalar, base steps that the step stands for, see
            `ema.advanced`; None for one, as Keras has it.

    Example:

    >>> sgd = keras.optimizers.SGD(use_ema=True, ema_momentum=0.5)
    >>> weight = keras.Variable([1.0])
    >>> sgd.build([weight])
    >>> average(replicas.strategy(), sgd, before=[], base_steps=None)
    >>> sgd._model_variables_moving_average[0].numpy().tolist()
    [1.0]
    """
    momentum = optimizer.ema_momentum if optimizer.use_ema else None
    period = optimizer.ema_overwrite_frequency
    iterations = optimizer.iterations.value

    def by_one(average, variable):
        started = tf.cast(iterations > 0, average.dtype)
        average.assign(ema.averaged(average, variable, started * momentum))

    def by_several(average, variable, before, steps):
        steps = tf.cast(steps, average.dtype)
        first = before + (variable - before) / steps
        start = tf.where(iterations > 0, average, first)
        average.assign(
            ema.advanced(
                start, before, variable, momentum=momentum, steps=steps
            )
        )

    def overwrite(variable, average):
        due = (iterations + 1) % period == 0
        variable.assign(tf.where(due, average, variable))

    for place, variable in enumerate(averaged_weights(optimizer)):
        slot = optimizer._model_variables_moving_average[place]
        if base_steps is None:
            replicas.update(strategy, slot, by_one, variable)
        else:
            replicas.update(
                strategy, slot, by_several, variable, before[place], base_steps
            )
        if period:
            replicas.update(strategy, variable, overwrite, slot)


def constrain(strategy, variable):
    """Applies a variable's constraint, if it has one.

    Example:

    >>> layer = keras.layers.Dense(1, kernel_constraint="non_neg")
    >>> layer.build((1, 1))
    >>> _ = layer.kernel.assign([[-1.0]])
    >>> constrain(replicas.strategy(), layer.kernel)
    >>> float(layer.kernel.numpy().item())
    0.0
    """
    constraint = getattr(variable, "constraint", None)
    if constraint is not None:
        replicas.update(strategy, variable, lambda v: v.assign(constraint(v)))


def assign(strategy, variables, values):
    """Assigns values to variables.

    Example:

    >>> weight = keras.Variable(1.0)
    >>> assign(replicas.strategy(), [weight], [tf.constant(2.0)])
    >>> float(weight.numpy())
    2.0
    """
    for variable, value in zip(variables, values):
        replicas.update(strategy, variable, lambda v, x: v.assign(x), value)


def increment(strategy, variable):
    """Adds 1 to a variable.

    Example:

    >>> count = tf.Variable(1)
    >>> increment(replicas.strategy(), count)
    >>> int(count)
    2
    """
    replicas.update(strategy, variable, lambda v: v.assign_add(1))


def _advance_nadam(strategy, nadam):
    """Does what Nadam does once per step, for all variables.

    u <- u beta_1 (1 - 0.96^(t+1) / 2)
    """
    step = tf.cast(nadam.iterations.value + 1, nadam._u_product.dtype)
    factor = 1 - 0.5 * 0.96**step
    replicas.update(
        strategy,
        nadam._u_product,
        lambda u, x: u.assign(u * nadam.beta_1 * x),  # In the order of Keras.
        factor,
    )
