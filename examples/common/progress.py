"""The progress of a run: counted, saved and restored."""

import sys

import tensorflow as tf

from tf_adascale import callbacks


class Progress(callbacks.Checkpoint):
    """Counts the steps of a run, ends its phases, and saves checkpoints.

    The constructor restores the last checkpoint. A checkpoint is saved after
    each epoch.

    Args:
        directory: str, of the checkpoints.
        model: built and compiled `tf_adascale.Model`.
        phases: tuple of `elastic.Phase`.
        interval: int, number of steps per epoch, which is a row of the log.

    Attributes:
        interval: int, as given.
    """

    def __init__(self, directory, *, model, phases, interval):
        self.interval = interval
        self._phases = phases
        self._counters = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False)
            for name in ("base_batches", "phase")
        }
        # Numbers separated by spaces: a variable keeps its shape.
        self._scales = tf.Variable("", trainable=False)
        self._scale = phases[0].scale
        super().__init__(
            directory, model=model, scales=self._scales, **self._counters
        )

    @property
    def base_batches(self):
        """Int, number of base batches trained on: S per step."""
        return int(self._counters["base_batches"].numpy())

    @property
    def scales(self):
        """Tuple of int, the sequence of scales that steps were taken at."""
        return tuple(map(int, self._scales.numpy().split()))

    @property
    def finished(self):
        """Bool, whether the last phase has ended."""
        return self._phase == len(self._phases)

    @property
    def phase(self):
        """`elastic.Phase`, the current phase."""
        return self._phases[self._phase]

    @property
    def _phase(self):
        return int(self._counters["phase"].numpy())

    def on_train_batch_end(self, batch, logs=None):
        """Counts the steps of an execution and ends the phase if it is over."""
        steps = self.model.steps_per_execution
        phase = self.phase
        self._scale = phase.scale
        self._counters["base_batches"].assign_add(steps * self._scale)
        if self._scale not in self.scales[-1:]:
            scales = *self.scales, self._scale
            self._scales.assign(" ".join(map(str, scales)))
        # A callback that stops training ends the phase. It is listed before
        # this one.
        phase_ended = (
            self.model.stop_training
            or self.step + steps >= phase.last_iteration
        )
        if phase_ended:
            self._counters["phase"].assign_add(1)
        # On SIGTERM, this saves a checkpoint and stops training.
        super().on_train_batch_end(batch, logs)
        if phase_ended:
            self.model.stop_training = True

    def add(self, epoch, logs):
        """Adds the counts to the logs."""
        logs.update(
            step=self.step,
            base_batches=self.base_batches,
            scale=self._scale,
        )


class Forgiving:
    """Mixin for a callback that writes files: training survives write errors.

    An error is printed. Its data is lost unless the callback still has it in a
    buffer.
    """

    _is_open = False

    def on_train_begin(self, logs=None):
        """Opens the file, or prints why it cannot."""
        self._is_open = self._try("on_train_begin", logs)

    def on_epoch_end(self, epoch, logs=None):
        """Writes, or prints why it cannot."""
        if self._is_open:
            self._try("on_epoch_end", epoch, logs)

    def on_train_end(self, logs=None):
        """Closes the file, or prints why it cannot."""
        if self._is_open:
            self._try("on_train_end", logs)

    def _try(self, method, *arguments):
        """Calls a method of the callback and returns whether it succeeded."""
        try:
            getattr(super(), method)(*arguments)
        except (tf.errors.OpError, OSError) as error:
            name = type(self).__name__
            print(f"{name} could not write: {error}", file=sys.stderr)
            return False
        return True
