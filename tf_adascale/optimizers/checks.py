"""Checks of what a wrapper is made of, and of what its `apply` is given.

Relies on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _learning_rate          the rate as given: variable, schedule or callable
    _distribution_strategy  the strategy an optimizer was made under
"""

import itertools
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from tf_adascale.distribute import updates, workers
from tf_adascale.ops import _keras
from tf_adascale.optimizers import effective_rate, inner_step, loss_scale


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
    _keras.check_backend()
    _keras.check_version("inner_optimizer", [optimizer])
    check_strategy(updates.strategy())
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "`inner_optimizer` must be a keras.optimizers.Optimizer. "
            f"Received: inner_optimizer={optimizer!r}"
        )
    innermost = loss_scale.unwrap(optimizer)
    if loss_scale.is_dynamic(optimizer):
        inner_step.check_overrides(
            optimizer,
            keras.optimizers.LossScaleOptimizer,
            loss_scale.REPLACED,
            name=wrapper,
        )
    is_wrapper = hasattr(innermost, "inner_optimizer")
    if is_wrapper or isinstance(innermost._learning_rate, effective_rate.Rate):
        raise ValueError(
            "`inner_optimizer` must neither be a wrapper nor be in one: pass a "
            "new Keras optimizer, or a LossScaleOptimizer around one. "
            f"Received: inner_optimizer={optimizer!r}"
        )
    check_does_not_accumulate(innermost, name=wrapper)
    inner_step.check(innermost, name=wrapper)


def check_does_not_accumulate(
    optimizer: keras.optimizers.Optimizer, *, name: str
) -> None:
    """Raises a ValueError if an inner optimizer accumulates gradients.

    Args:
        optimizer: Keras optimizer, not a wrapper.
        name: str, the wrapper that asks.

    Example:

    >>> check_does_not_accumulate(keras.optimizers.SGD(), name="AdaScale")
    """
    steps = optimizer.gradient_accumulation_steps
    if steps:
        raise ValueError(
            "`gradient_accumulation_steps` must not be set on the inner "
            f"optimizer, where {name} cannot see the samples. Use "
            "`microbatches` in tf_adascale.Model.compile. "
            f"Received: gradient_accumulation_steps={steps}"
        )


def check_strategy(strategy: tf.distribute.Strategy) -> None:
    """Raises a ValueError for a strategy whose replicas do not step together.

    Args:
        strategy: `tf.distribute.Strategy`.

    Example:

    >>> check_strategy(tf.distribute.get_strategy())
    """
    if not workers.is_synchronous(strategy):
        raise ValueError(
            "`strategy` must be synchronous: under ParameterServerStrategy "
            "every worker steps by its own gradient, and there is none of the "
            "whole batch. Use MultiWorkerMirroredStrategy. Received: "
            f"strategy={strategy}"
        )


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


def check_has_no_wrapper(optimizer: Any, wrapper: type) -> None:
    """Raises a ValueError if an optimizer has one of a class inside.

    Args:
        optimizer: Keras optimizer.
        wrapper: the class.

    Example:

    >>> check_has_no_wrapper(keras.optimizers.SGD(), keras.Model)
    """
    inside = [
        getattr(optimizer, "inner_optimizer", None),
        *getattr(optimizer, "optimizers", ()),
    ]
    if any(isinstance(inner, wrapper) for inner in inside):
        raise ValueError(
            "`optimizer` must not have a tf_adascale optimizer inside another "
            "one with several micro-batches, which only the outermost one is "
            f"told of. Received: optimizer={optimizer!r}"
        )


def check_is_outermost(name: str, num_replicas: int) -> None:
    """Raises a ValueError if an optimizer in another one cannot step.

    Keras's `LossScaleOptimizer` steps inside a condition that one replica's
    gradients decide. The others' overflows would leave its scale as it is, and
    several workers could wait for one another.

    Args:
        name: str, the wrapper's name.
        num_replicas: int, replicas in sync.

    Example:

    >>> check_is_outermost("adascale", 1)
    """
    if num_replicas > 1:
        raise ValueError(
            f"`{name}` must not be inside another optimizer on several "
            "replicas. Put the loss scale inside, as in AdaScale("
            "keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())), and "
            "compile a keras.Model with auto_scale_loss=False, or use "
            f"tf_adascale.Model. Received: replicas={num_replicas}"
        )


def matched(
    grads: list[Any], variables: Iterable[Any] | None
) -> tuple[list[Any], list[Any]]:
    """Returns the gradients as tensors and the variables, if they match.

    Args:
        grads: list of tensors, arrays, `tf.IndexedSlices` or None.
        variables: variables, or None if none are known.

    Returns:
        List of tensors, `tf.IndexedSlices` of tensors, or None; list of the
        variables.

    Raises:
        ValueError: if they do not match in number or shape.

    Example:

    >>> weight = keras.Variable([0.0])
    >>> [gradient], [variable] = matched([np.array([0.5])], [weight])
    >>> gradient.dtype.name, variable is weight
    ('float32', True)
    """
    if variables is None:
        raise ValueError(
            "`trainable_variables` must be passed in the first call of "
            "`apply`, unless `build` was called before. "
            f"Received: trainable_variables=None, {len(grads)} gradients"
        )
    variables = list(variables)
    grads = [
        _as_tensor(gradient, variable)
        for gradient, variable in itertools.zip_longest(grads, variables)
    ][: len(grads)]
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
    return grads, variables


def _as_tensor(gradient, variable):
    """Returns a gradient of arrays as one of tensors."""
    if isinstance(gradient, tf.IndexedSlices):
        shape = gradient.dense_shape
        return tf.IndexedSlices(
            tf.convert_to_tensor(gradient.values),
            tf.convert_to_tensor(gradient.indices),
            None if shape is None else tf.convert_to_tensor(shape),
        )
    if gradient is None or tf.is_tensor(gradient):
        return gradient
    tensor = tf.convert_to_tensor(gradient)
    return tensor if variable is None else tf.cast(tensor, variable.dtype)


def _shape(gradient):
    """Returns a gradient's shape, or None if even its rank is unknown."""
    return None if gradient.shape.rank is None else tuple(gradient.shape)
