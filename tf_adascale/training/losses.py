"""Losses of micro-batches, which are averaged.

That suits a mean over the examples. Keras sums a loss with `reduction="sum"`:
over the whole batch it is k times the average of k micro-batches.

Relies on `CompileLoss` and its `_flat_losses`, which `build` makes and Keras
does not document. Checked on Keras 3.10 to 3.15.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileLoss

_NO_REDUCTION = (None, "none")


def check(loss: Any) -> None:
    """Raises a ValueError if a loss has no reduction.

    Args:
        loss: as for `keras.Model.compile`.

    Example:

    >>> check({"a": "mse", "b": keras.losses.MeanSquaredError()})
    """
    for one in keras.tree.flatten(loss):
        if (
            isinstance(one, keras.losses.Loss)
            and one.reduction in _NO_REDUCTION
        ):
            raise ValueError(
                "`loss` must have a reduction with several micro-batches; "
                'Keras sums the gradients of one without, as reduction="sum" '
                f"does. Received: loss={loss!r}, whose reduction is "
                f"{one.reduction!r}"
            )


def check_is_scalar(loss: Any) -> None:
    """Raises a ValueError if the loss of a micro-batch is no scalar.

    Args:
        loss: tensor or number, what `compute_loss` returned.

    Example:

    >>> check_is_scalar(tf.constant(1.0))
    """
    shape = tf.convert_to_tensor(loss).shape
    if shape.num_elements() != 1:
        raise ValueError(
            "`compute_loss` must return a scalar with several micro-batches; "
            "Keras sums the gradients of a loss per example. Return their "
            f"mean. Received: a loss of shape {shape}"
        )


def multiply_sums(compiled: CompileLoss, factor: Callable[[], int]) -> None:
    """Multiplies the losses with `reduction="sum"`, wherever they are called.

    Args:
        compiled: `CompileLoss` that is not built.
        factor: function that returns by what, at each call.

    Example:

    >>> loss = keras.losses.MeanAbsoluteError(reduction="sum")
    >>> compiled = CompileLoss(loss)
    >>> multiply_sums(compiled, lambda: 2)
    >>> float(compiled(tf.constant([[1.0], [2.0]]), tf.zeros((2, 1))))
    6.0
    """
    build = compiled.build

    def multiplied(loss):
        def call(*args):
            times, value = factor(), loss(*args)
            return value if times == 1 else times * value

        return call

    def build_and_multiply(y_true, y_pred):
        build(y_true, y_pred)
        # Keras has made losses of names, classes and functions.
        compiled._flat_losses = [
            one._replace(loss=multiplied(one.loss))
            if one.loss.reduction == "sum"
            else one
            for one in compiled._flat_losses
        ]

    compiled.build = build_and_multiply
