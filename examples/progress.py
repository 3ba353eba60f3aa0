"""How far a run came: counted, saved, and restored."""

import os

import keras
import tensorflow as tf


class Progress(keras.callbacks.Callback):
    """Counts the steps of a run, ends it in time, and survives its process.

    Restores the last checkpoint when it is made, saves one after each epoch.

    Args:
        model: built and compiled `tf_adascale.Model`.
        plan: `Plan`.
        settings: `Settings`, complete.
        interval: int, number of steps per epoch: those of a row of the log.
        save: bool, whether this process is the one that saves.

    Attributes:
        interval: int, as given.
    """

    def __init__(self, model, plan, settings, interval, *, save):
        super().__init__()
        self.interval = interval
        self._phases = plan.phases
        self._counts = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False)
            for name in ("step", "base_batches", "epoch", "phase")
        }
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=model,
                # Of a subclassed model, TensorFlow does not see the layers that
                # it holds in lists.
                variables=[variable.value for variable in model.variables],
                **self._counts,
            ),
            os.path.join(settings.model_dir, "checkpoint"),
            max_to_keep=1,
        )
        self._save = save
        self._manager.restore_or_initialize()

    @property
    def step(self):
        """Int, number of steps taken."""
        return self._read("step")

    @property
    def base_batches(self):
        """Int, number of base batches trained on: S per step."""
        return self._read("base_batches")

    @property
    def epoch(self):
        """Int, number of epochs finished."""
        return self._read("epoch")

    @property
    def finished(self):
        """Bool, whether training came to its end."""
        return self._read("phase") == len(self._phases)

    @property
    def phase(self):
        """`elastic.Phase` that training is in."""
        return self._phases[self._read("phase")]

    def on_train_batch_end(self, batch, logs=None):
        """Counts what was executed, and ends the phase with its last step."""
        steps = self.model.steps_per_execution
        self._counts["step"].assign_add(steps)
        self._counts["base_batches"].assign_add(steps * self.phase.scale)
        if self.step >= self.phase.last_iteration:
            self.model.stop_training = True

    def add(self, epoch, logs):
        """Puts the counts into the logs."""
        logs.update(
            step=self.step,
            base_batches=self.base_batches,
            scale=self.phase.scale,
        )

    def on_epoch_end(self, epoch, logs=None):
        """Saves a checkpoint."""
        self._counts["epoch"].assign_add(1)
        if self.model.stop_training:
            self._counts["phase"].assign_add(1)
        if self._save:
            self._manager.save()

    def _read(self, name):
        return int(self._counts[name].numpy())
