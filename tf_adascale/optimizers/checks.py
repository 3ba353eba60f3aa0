"""Checks of what a wrapper is made of, and of what its `apply` is given.

Relies on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _learning_rate          the rate as given: variable, schedule or callable
    _distribution_strategy  the strategy an optimizer was made under
"""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from tf_adascale.distribute import updates
from tf_adascale.optimizers import inner_step, loss_scale


def check_inner_optimizer(
    optimizer: Any, kwargs: dict[str, Any], *, wrapper: str
) -> None:
    """Raises a ValueError if a wrapper cannot be made of its arguments.

    Args:
        optimizer: the argument `inner_optimizer`.
        kwargs: arguments that the wrapper does not know.
        wrapper: str, the wrapper's class.

    Example:

    >>> check_inner_optimizer(keras.optimizers.SGD(), {}, wrapper="AdaScale")
    """
    if kwargs:
        name, value = next(iter(kwargs.items()))
        raise ValueError(
            f"`{name}` must be an argument of {wrapper}. Arguments of Keras's "
            f"optimizers belong to the inner optimizer, as in {wrapper}("
            "keras.optimizers.SGD(weight_decay=1e-4)). "
            f"Received: {name}={value!r}"
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "`inner_optimizer` must be a keras.optimizers.Optimizer. "
            f"Received: inner_optimizer={optimizer!r}"
        )
    innermost = loss_scale.unwrap(optimizer)
    is_wrapper = hasattr(innermost, "inner_optimizer")
    if is_wrapper or isinstance(innermost._learning_rate, inner_step.Rate):
        raise ValueError(
            "`inner_optimizer` must neither be a wrapper nor be in one: pass a "
            "new Keras optimizer, or a LossScaleOptimizer around one. "
            f"Received: inner_optimizer={optimizer!r}"
        )
    if innermost.gradient_accumulation_steps:
        raise ValueError(
            "`gradient_accumulation_steps` must not be set on the inner "
            f"optimizer, where {wrapper} cannot see the samples. Use "
            "`microbatches` in tf_adascale.Model.compile. Received: "
            "gradient_accumulation_steps="
            f"{innermost.gradient_accumulation_steps}"
        )
    inner_step.check(innermost, name=wrapper)


def check_context(
    name: str, optimizers: list[keras.optimizers.Optimizer]
) -> None:
    """Raises a ValueError unless a step may be taken here.

    Args:
        name: str, the wrapper's name.
        optimizers: list of the wrapper and the innermost optimizer.

    Example:

    >>> check_context("adascale", [keras.optimizers.SGD()])
    """
    if not updates.in_replica_context():
        raise ValueError(
            f"`{name}.apply` must be called inside strategy.run, once per "
            "replica, not in cross-replica context. "
            f"Received: strategy={updates.strategy()}"
        )
    made_under = {optimizer._distribution_strategy for optimizer in optimizers}
    if made_under != {updates.strategy()}:
        raise ValueError(
            f"`{name}` and its inner optimizer must be made in the scope of "
            "the strategy that uses them. Make them in `with "
            "strategy.scope():`, and call `apply` inside `strategy.run`. "
            f"Received: optimizers made under {made_under}, used under "
            f"{updates.strategy()}"
        )


def matched_variables(
    grads: list[Any], variables: Iterable[Any] | None
) -> list[Any]:
    """Returns the variables as a list, if the gradients match them.

    Args:
        grads: list of tensors, `tf.IndexedSlices` or None.
        variables: variables, or None if none are known.

    Raises:
        ValueError: if they do not match in number or shape.

    Example:

    >>> weight = keras.Variable([0.0])
    >>> matched_variables([None], [weight]) == [weight]
    True
    """
    if variables is None:
        raise ValueError(
            "`trainable_variables` must be passed in the first call of "
            "`apply`, unless `build` was called before. "
            f"Received: trainable_variables=None, {len(grads)} gradients"
        )
    variables = list(variables)
    shapes = [None if g is None else _shape(g) for g in grads]
    expected = [tuple(v.shape) for v in variables]
    if len(grads) != len(variables) or not all(
        tf.TensorShape(g).is_compatible_with(v)
        for g, v in zip(shapes, expected)
    ):
        raise ValueError(
            "`grads` must hold a gradient of its shape, or None, for each of "
            f"the variables {expected}. Received: gradients of shapes {shapes}"
        )
    return variables


def _shape(gradient):
    """Returns a gradient's shape, or None if even its rank is unknown."""
    return None if gradient.shape.rank is None else tuple(gradient.shape)
