"""Keras callbacks: when to stop, and what to show."""

import math

import keras
import tensorflow as tf

from tf_adascale import wrapper

# What `ScalingLog` shows, and the optimizer's attribute that has it.
_SHOWN = {
    "gain": "gain",
    "scale_invariant_step": "scale_invariant_step",
    "learning_rate": "effective_learning_rate",
    "gradient_variance": "gradient_variance",
    "gradient_sqnorm": "gradient_sqnorm",
    "noise_scale": "noise_scale",
}


class StopAtScaleInvariantStep(keras.callbacks.Callback):
    """Ends training once the scale-invariant step has reached a total.

        tau_t >= T_SI

    `fit` must be given epochs enough: training takes at most T_SI steps. With
    `steps_per_execution=m` it ends up to m - 1 steps late, and where the total
    is reached before it begins, one step late: Keras asks after a step.

    Args:
        total_steps: number > 0, T_SI: the steps that training takes at the base
            batch size.

    Raises:
        ValueError: if `total_steps` is not > 0, and at the start of training if
            the model's optimizer does not count scale-invariant steps.

    Example:

    >>> StopAtScaleInvariantStep(39_100).total_steps
    39100

    Reference: Johnson et al. 2020, algorithm 2.
    """

    def __init__(self, total_steps):
        super().__init__()
        if not 0 < total_steps < math.inf:
            raise ValueError(
                "The total of scale-invariant steps is out of range. Expected "
                f"a finite number > 0. Received: total_steps={total_steps!r}"
            )
        self.total_steps = total_steps
        self._next_look = 0

    def on_train_begin(self, logs=None):
        """Checks the optimizer."""
        _check_optimizer(self)
        self._next_look = 0

    def on_train_batch_end(self, batch, logs=None):
        """Ends training if it is time."""
        # Reading the device makes the host wait for it, so it is put off until
        # the end is possible: a step advances tau by at most the scale.
        self._next_look -= getattr(self.model, "steps_per_execution", 1)
        if self._next_look > 0:
            return
        optimizer = self.model.optimizer
        left = self.total_steps - float(optimizer.scale_invariant_step)
        if left <= 0:
            self.model.stop_training = True
        self._next_look = math.ceil(left / max(optimizer.scale, 1))


class ScalingLog(keras.callbacks.Callback):
    """Puts what AdaScale does into the logs, after each batch and each epoch.

    These are `gain`, `scale_invariant_step`, `learning_rate` (the effective
    one), `gradient_variance`, `gradient_sqnorm` and `noise_scale`. The progress
    bar, History, CSVLogger and TensorBoard then show them. Callbacks see the
    logs in the order they are listed in: list this one first. (TensorBoard of
    Keras 3.10 puts `optimizer.learning_rate` in place of an epoch's rate.)

    Raises:
        ValueError: at the start of training, if the model's optimizer has no
            gain.

    Example:

    >>> callbacks = [ScalingLog(), keras.callbacks.CSVLogger("log.csv")]
    """

    def on_train_begin(self, logs=None):
        """Checks the optimizer."""
        _check_optimizer(self)
        optimizer = self.model.optimizer
        # In one graph: some sixty operations by themselves cost a millisecond.
        self._values = tf.function(
            lambda: [
                tf.cast(getattr(optimizer, attribute), tf.float64)
                for attribute in _SHOWN.values()
            ],
            autograph=False,
        )

    def on_train_batch_end(self, batch, logs=None):
        """Adds the values of the last step."""
        self._add(logs)

    def on_epoch_end(self, epoch, logs=None):
        """Adds the values of the epoch's last step."""
        self._add(logs)

    def _add(self, logs):
        if logs is not None:
            logs.update(zip(_SHOWN, map(float, self._values())))


def _check_optimizer(callback):
    optimizer = callback.model.optimizer
    is_wrapper = isinstance(optimizer, wrapper.Wrapper)
    if not is_wrapper or not hasattr(optimizer, "scale_invariant_step"):
        raise ValueError(
            f"{type(callback).__name__} found an optimizer without a gain. "
            "Expected a model compiled with tf_adascale.AdaScale. Received: "
            f"optimizer={optimizer!r}"
        )
