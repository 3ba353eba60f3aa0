"""Losses of micro-batches, which are averaged.

That suits a mean over the examples. Keras sums a loss with `reduction="sum"`:
over the whole batch it is k times the average of k micro-batches.

Relies on `CompileLoss` and its `_user_loss`, the losses that it was made of,
which Keras does not document. Checked on Keras 3.10 to 3.15.
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
    if shape.rank != 0:
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
    compiled._user_loss = keras.tree.map_structure(
        lambda loss: (
            _Multiplied(loss, factor)
            if getattr(loss, "reduction", None) == "sum"
            else loss
        ),
        compiled._user_loss,
    )


class _Multiplied(keras.losses.Loss):
    """A loss times a factor, under the name of the loss."""

    def __init__(self, loss, factor):
        super().__init__(name=loss.name, reduction="sum")
        self._loss = loss
        self._factor = factor

    def __call__(self, y_true, y_pred, sample_weight=None):
        loss = self._loss(y_true, y_pred, sample_weight)
        factor = self._factor()
        return loss if factor == 1 else factor * loss
