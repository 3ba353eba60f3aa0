"""Updates of variables: where they are allowed, and on every device.

A training step runs once per replica, in *replica context*. Variables are
updated where `hand_off` leads: cross-replica context under MirroredStrategy,
replica context under strategies that have no `merge_call`. `update` works in
both.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def strategy() -> tf.distribute.Strategy:
    """Returns the `tf.distribute.Strategy` in effect, the default if none is.

    Example:

    >>> strategy().num_replicas_in_sync
    1
    """
    return tf.distribute.get_strategy()


def in_replica_context() -> bool:
    """Returns whether the caller runs once per replica.

    Example:

    >>> in_replica_context()
    True
    """
    return tf.distribute.get_replica_context() is not None


def hand_off(
    function: Callable[..., Any],
    strategy: tf.distribute.Strategy,
    *values: Any,
) -> Any:
    """Calls `function(strategy, *values)` where variables may be updated.

    A `tf.cond` around updates is allowed inside `function`, but not around the
    call of `hand_off`.

    Args:
        function: callable; called once for all replicas, or once by each.
        strategy: `tf.distribute.Strategy`.
        *values: nested tensors, each replica's own; `function` gets them merged
            and passes them on to `update`.

    Returns:
        What `function` returns.

    Example:

    >>> float(hand_off(lambda strategy, x: x + 1, strategy(), tf.constant(1.0)))
    2.0
    """
    # tf.__internal__ is what Keras's own optimizers use (TF 2.18 to 2.21).
    return tf.__internal__.distribute.interim.maybe_merge_call(
        function, strategy, *values
    )


def hand_off_if(
    condition: tf.Tensor,
    function: Callable[..., Any],
    strategy: tf.distribute.Strategy,
    values: tuple[Any, ...],
    *,
    otherwise: Callable[..., Any] | None = None,
    other_values: tuple[Any, ...] = (),
) -> None:
    """Hands off to one of two functions.

    Args:
        condition: scalar bool, the same on every replica.
        function: called as `function(strategy, *values)` if it is true.
        strategy: `tf.distribute.Strategy`.
        values: nested tensors, see `hand_off`.
        otherwise: called as `otherwise(strategy, *other_values)` if it is
            false; None to do nothing.
        other_values: nested tensors.

    Example:

    >>> variable = tf.Variable(1.0)
    >>> add = lambda strategy, x: update(
    ...     strategy, variable, lambda v, x: v.assign_add(x), x)
    >>> hand_off_if(tf.constant(True), add, strategy(), (2.0,))
    >>> hand_off_if(tf.constant(False), add, strategy(), (2.0,))
    >>> float(variable)
    3.0
    """

    def choose(strategy, condition, values, other_values):
        def do():
            function(strategy, *values)
            return True

        def do_otherwise():
            if otherwise is not None:
                otherwise(strategy, *other_values)
            return False

        # TensorFlow refuses a condition around a collective. By now all of them
        # are done.
        tf.cond(local(strategy, condition), do, do_otherwise)

    hand_off(choose, strategy, condition, values, other_values)


def update(
    strategy: tf.distribute.Strategy,
    variable: Any,
    function: Callable[..., Any],
    *values: Any,
) -> None:
    """Calls `function(variable, *values)` on every device's copy of a variable.

    Call it only inside a function passed to `hand_off`.

    Args:
        strategy: `tf.distribute.Strategy`.
        variable: `keras.Variable` or `tf.Variable`.
        function: callable of a device's `tf.Variable` and a device's values.
        *values: nested tensors as `hand_off` passed them, or variables.

    Example:

    >>> variable = tf.Variable(1.0)
    >>> update(strategy(), variable, lambda v, x: v.assign_add(x), 2.0)
    >>> float(variable)
    3.0
    """
    strategy.extended.update(
        native(variable),
        function,
        args=tuple(native(value) for value in values),
        group=False,
    )


def local(strategy: tf.distribute.Strategy, value: Any) -> Any:
    """Returns this process's first replica's part of a value.

    Example:

    >>> float(local(strategy(), tf.constant(2.0)))
    2.0
    """
    return strategy.experimental_local_results(value)[0]


def assign(
    strategy: tf.distribute.Strategy, variables: list[Any], values: list[Any]
) -> None:
    """Assigns values to variables.

    Example:

    >>> weight = keras.Variable(1.0)
    >>> assign(strategy(), [weight], [tf.constant(2.0)])
    >>> float(weight.numpy())
    2.0
    """
    for variable, value in zip(variables, values):
        update(strategy, variable, lambda v, x: v.assign(x), value)


def increment(strategy: tf.distribute.Strategy, variable: Any) -> None:
    """Adds 1 to a variable.

    Example:

    >>> count = tf.Variable(1)
    >>> increment(strategy(), count)
    >>> int(count)
    2
    """
    update(strategy, variable, lambda v: v.assign_add(1))


def native(value: Any) -> Any:
    """Returns the `tf.Variable` of a `keras.Variable`, anything else as it is.

    Example:

    >>> native(3)
    3
    """
    return value.value if isinstance(value, keras.Variable) else value
