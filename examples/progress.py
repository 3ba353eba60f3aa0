"""How far a run came: counted, saved, and restored."""

import sys

import tensorflow as tf

from tf_adascale import callbacks


class Progress(callbacks.Checkpoint):
    """Counts the steps of a run, ends it in time, and survives its process.

    Restores the last checkpoint when it is made, saves one after each epoch.

    Args:
        directory: str, of the checkpoints.
        model: built and compiled `tf_adascale.Model`.
        phases: tuple of `elastic.Phase`.
        interval: int, number of steps per epoch: those of a row of the log.

    Attributes:
        interval: int, as given.
    """

    def __init__(self, directory, *, model, phases, interval):
        self.interval = interval
        self._phases = phases
        self._places = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False)
            for name in ("base_batches", "phase")
        }
        self._scales = tf.Variable("", trainable=False)
        self._scale = phases[0].scale
        self._phase_ended = False
        super().__init__(
            directory, model=model, scales=self._scales, **self._places
        )

    @property
    def base_batches(self):
        """Int, number of base batches trained on: S per step."""
        return int(self._places["base_batches"].numpy())

    @property
    def scales(self):
        """Tuple of int, the scales trained at, one after another."""
        return tuple(map(int, self._scales.numpy().split()))

    @property
    def finished(self):
        """Bool, whether training came to its end."""
        return self._phase == len(self._phases)

    @property
    def phase(self):
        """`elastic.Phase` that training is in."""
        return self._phases[self._phase]

    @property
    def _phase(self):
        return int(self._places["phase"].numpy())

    def on_train_batch_end(self, batch, logs=None):
        """Counts what was executed, and ends the phase with its last step."""
        steps = self.model.steps_per_execution
        self._scale = self.phase.scale
        self._places["base_batches"].assign_add(steps * self._scale)
        # What ends the phase before its last iteration is listed before this.
        self._phase_ended = (
            self.model.stop_training
            or self.step + steps >= self.phase.last_iteration
        )
        super().on_train_batch_end(batch, logs)
        if self._phase_ended:
            self.model.stop_training = True

    def add(self, epoch, logs):
        """Puts the counts into the logs."""
        logs.update(
            step=self.step,
            base_batches=self.base_batches,
            scale=self._scale,
        )

    def _end_epoch(self):
        if self._scale not in self.scales[-1:]:
            scales = *self.scales, self._scale
            self._scales.assign(" ".join(map(str, scales)))
        if self._phase_ended:
            self._places["phase"].assign_add(1)
        super()._end_epoch()


class Forgiving:
    """Mixed into a callback that writes: where it cannot, training goes on.

    What it would have written is lost unless it is still in its buffer.
    """

    _is_open = False

    def on_train_begin(self, logs=None):
        """Opens its file, or reports that it cannot."""
        self._is_open = self._try("on_train_begin", logs)

    def on_epoch_end(self, epoch, logs=None):
        """Writes, or reports that it cannot."""
        if self._is_open:
            self._try("on_epoch_end", epoch, logs)

    def on_train_end(self, logs=None):
        """Closes its file, or reports that it cannot."""
        if self._is_open:
            self._try("on_train_end", logs)

    def _try(self, method, *arguments):
        """Returns whether the callback could do what it does there."""
        try:
            getattr(super(), method)(*arguments)
        except (tf.errors.OpError, OSError) as error:
            name = type(self).__name__
            print(f"{name} could not write: {error}", file=sys.stderr)
            return False
        return True
