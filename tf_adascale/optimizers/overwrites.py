"""Variables that Keras overwrites by their gradients, such as float8's scales.

A layer marks such a variable by `overwrite_with_gradient` and computes its next
value as its gradient. The value is no gradient of the loss: it belongs to no
norm, and neither clipping nor a loss scale applies to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tf_adascale.distribute import collectives


class Pairs(NamedTuple):
    """Gradients and their variables, in two parts.

    Attributes:
        gradients: list of the gradients of the loss.
        variables: list of their variables.
        new_values: list of the gradients that are next values.
        overwritten: list of their variables.
    """

    gradients: list[Any]
    variables: list[Any]
    new_values: list[Any]
    overwritten: list[Any]


def is_overwritten(variable: Any) -> bool:
    """Returns whether Keras overwrites a variable by its gradient.

    Example:

    >>> is_overwritten(tf.Variable(1.0))
    False
    """
    return getattr(variable, "overwrite_with_gradient", False)


def split(gradients: Sequence[Any], variables: Sequence[Any]) -> Pairs:
    """Returns the gradients of the loss apart from the next values.

    Args:
        gradients: list of tensors, `tf.IndexedSlices` or None.
        variables: list of their variables.

    Example:

    >>> split([2.0], [tf.Variable(1.0)]).gradients
    [2.0]
    """
    pairs = Pairs([], [], [], [])
    for gradient, variable in zip(gradients, variables):
        if is_overwritten(variable):
            pairs.new_values.append(gradient)
            pairs.overwritten.append(variable)
        else:
            pairs.gradients.append(gradient)
            pairs.variables.append(variable)
    return pairs


def join(
    gradients: Sequence[Any],
    new_values: Sequence[Any],
    variables: Sequence[Any],
) -> list[Any]:
    """Returns the parts that `split` made, in the order of the variables.

    Args:
        gradients: list, those of the loss.
        new_values: list, the others.
        variables: list of all variables.

    Example:

    >>> join([2.0], [], [tf.Variable(1.0)])
    [2.0]
    """
    of_loss, others = iter(gradients), iter(new_values)
    return [
        next(others if is_overwritten(variable) else of_loss)
        for variable in variables
    ]


def assignments(
    pairs: Pairs,
) -> tuple[list[tuple[Any, tf.Tensor]], tf.Tensor]:
    """Returns the next values, the largest among the replicas.

    This takes a collective of its own. Call it in replica context.

    Args:
        pairs: `Pairs` with one or more next values, floating tensors of known
            shapes; this replica's own.

    Returns:
        List of `(variable, value)`; scalar bool, whether the values of all
        replicas are finite. The same on every replica.

    Example:

    >>> weight = keras.Variable([1.0])
    >>> [(_, value)], finite = assignments(
    ...     Pairs([], [], [tf.constant([7.0])], [weight]))
    >>> value.numpy().tolist(), bool(finite)
    ([7.0], True)
    """
    wide = any(value.dtype == tf.float64 for value in pairs.new_values)
    flat = [
        tf.cast(tf.reshape(value, [-1]), tf.float64 if wide else tf.float32)
        for value in pairs.new_values
    ]
    everyone = collectives.gathered(tf.concat(flat, 0))
    parts = tf.split(
        tf.reduce_max(everyone, 0), [value.shape[0] for value in flat]
    )
    return [
        (variable, tf.cast(tf.reshape(part, variable.shape), variable.dtype))
        for part, variable in zip(parts, pairs.overwritten)
    ], tf.reduce_all(tf.math.is_finite(everyone))
