"""Callbacks that read AdaScale's progress, to stop training and to log it."""

import inspect
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_adascale.ops import _arguments
from tf_adascale.ops import gain as gain_ops
from tf_adascale.optimizers import adascale

# Attributes of the optimizer, and their names in the logs.
_LOGGED = (
    "gain",
    "scale_invariant_step",
    "effective_learning_rate",
    "gradient_variance",
    "gradient_sqnorm",
)


class StopAtScaleInvariantStep(keras.callbacks.Callback):
    """Stops training once the scale-invariant step reaches a total.

        tau_t >= T_SI                                                       (1)

    tau_t is the sum of AdaScale's gains up to step t: the progress of training
    in steps at the base batch size. Training takes at most T_SI steps if each
    batch has at least the base size, so give `fit` enough epochs for that many.

    Keras checks after each execution. With `steps_per_execution=m` training
    ends up to m - 1 steps late. If the total is reached before training begins,
    one execution still runs.

    Args:
        total_steps: number > 0, T_SI, the steps that training takes at the base
            batch size.

    Raises:
        ValueError: if `total_steps` is not > 0; at the start of training, if
            the model's optimizer is not `tf_adascale.AdaScale`.

    Example:

    >>> StopAtScaleInvariantStep(39_100).total_steps
    39100

    Reference: Johnson et al. 2020, algorithm 2.
    """

    def __init__(self, total_steps: float):
        super().__init__()
        _arguments.positive_number(
            "total_steps", total_steps, "the steps at the base batch size"
        )
        self.total_steps = total_steps
        self._steps_until_read = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks the optimizer."""
        self._optimizer = _adascale_of(self)
        self._steps_until_read = 0

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Stops training if the total is reached."""
        # Reading tau makes the host wait for the device. A step advances tau by
        # at most the scale, so wait until the total may be reached.
        self._steps_until_read -= getattr(self.model, "steps_per_execution", 1)
        if self._steps_until_read > 0:
            return
        optimizer = self._optimizer
        left = self.total_steps - float(optimizer.scale_invariant_step)
        if left <= 0:
            self.model.stop_training = True
        self._steps_until_read = math.ceil(left / max(optimizer.scale, 1))


class ScalingLog(keras.callbacks.Callback):
    """Adds AdaScale's values to the logs, after each batch and each epoch.

    The values are `gain`, `scale_invariant_step`, `effective_learning_rate`,
    `gradient_variance`, `gradient_sqnorm` and `noise_scale`. The progress bar,
    History, CSVLogger and TensorBoard then show them.

    `learning_rate` in the logs is written by Keras's callbacks. It is
    `optimizer.learning_rate`, which for a rate given as a number leaves out the
    gain.

    Keras calls callbacks in the order of their list, and those before this one
    would not see its values. In `fit` it therefore moves to the front.

    Raises:
        ValueError: at the start of training, if the model's optimizer is not
            `tf_adascale.AdaScale`.

    Example:

    >>> callbacks = [ScalingLog(), keras.callbacks.CSVLogger("log.csv")]
    """

    def set_model(self, model: keras.Model) -> None:
        """Sets the model, and moves this callback to the front of its list."""
        super().set_model(model)
        # Only the list's method that calls this one knows the list.
        frame = inspect.currentframe()
        while frame is not None:
            caller: Any = frame.f_locals.get("self")
            if isinstance(caller, keras.callbacks.CallbackList):
                others = [each for each in caller.callbacks if each is not self]
                caller.callbacks[:] = [self, *others]
                return
            frame = frame.f_back if caller is self else None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks the optimizer."""
        optimizer = _adascale_of(self)
        # One graph: the sixty operations cost a millisecond one by one.
        self._values = tf.function(
            lambda: [
                tf.cast(getattr(optimizer, attribute), tf.float64)
                for attribute in _LOGGED
            ],
            autograph=False,
        )

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Adds the values of the last step."""
        self._add(logs)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Adds the values of the epoch's last step."""
        self._add(logs)

    def _add(self, logs):
        if logs is None:
            return
        values = dict(zip(_LOGGED, (x.numpy() for x in self._values())))
        moments = gain_ops.Moments(
            np.float32(values["gradient_variance"]),
            np.float32(values["gradient_sqnorm"]),
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            values["noise_scale"] = gain_ops.noise_scale(moments)
        logs.update((name, float(value)) for name, value in values.items())


def _adascale_of(callback):
    """Returns the model's AdaScale, also from inside another optimizer."""
    optimizer = callback.model.optimizer
    while not isinstance(optimizer, adascale.AdaScale):
        if not hasattr(optimizer, "inner_optimizer"):
            raise ValueError(
                "`model.optimizer` must be a tf_adascale.AdaScale: "
                f"{type(callback).__name__} reads its gain. Received: "
                f"model.optimizer={callback.model.optimizer!r}"
            )
        optimizer = optimizer.inner_optimizer
    return optimizer
