"""The part of a compiled loss that is a sum over the examples.

Micro-batches average their losses, which suits a mean over the examples. Keras
sums a loss with `reduction="sum"`: of k parts it is k times the average.

Relies on `CompileLoss`, which Keras does not document. Checked on Keras 3.10 to
3.15.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileLoss

_NO_REDUCTION = (None, "none")


def summed(
    loss: Any, loss_weights: Any, output_names: list[str] | None
) -> Callable[..., tf.Tensor] | None:
    """Returns the function of the losses with `reduction="sum"`, or None.

    Args:
        loss: as for `keras.Model.compile`.
        loss_weights: likewise.
        output_names: list of str, of a functional model.

    Returns:
        Callable of targets, predictions and sample weights that returns the
        weighted sum of these losses, scalar; None if no loss is of this kind.

    Raises:
        ValueError: if a loss has no reduction.

    Example:

    >>> loss = keras.losses.MeanAbsoluteError(reduction="sum")
    >>> function = summed(loss, None, None)
    >>> float(function(tf.constant([[1.0], [2.0]]), tf.zeros((2, 1)), None))
    3.0
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
    # CompileLoss ignores an output whose loss is None.
    kept = keras.tree.map_structure(
        lambda x: x if getattr(x, "reduction", None) == "sum" else None, loss
    )
    if not any(keras.tree.flatten(kept)):
        return None
    compiled = CompileLoss(kept, loss_weights, output_names=output_names)
    return lambda y, y_pred, sample_weight: compiled(y, y_pred, sample_weight)
