"""A callback that saves a run and restores it in the next process."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_adascale.callbacks import checkpoint_files
from tf_adascale.distribute import workers

# One notice may arrive twice: for the process, and for its process group.
SAME_NOTICE_SECONDS = 5.0


class Checkpoint(keras.callbacks.Callback):
    """Saves a run after each epoch and restores it in the next process.

    The constructor restores the last checkpoint, if there is one: weights,
    optimizer state, and the counts of epochs and steps. It skips a damaged
    checkpoint with a warning and restores the one before it. If saving fails,
    for example because the disk is full, a warning is issued and training
    continues.

    SIGTERM ends the epoch within a few steps. One worker that receives it
    suffices: all workers stop after the same step. The chief saves a
    checkpoint, callbacks see the end of the epoch and of training, and the
    process exits with code 75. A supervisor that reruns the command on this
    code resumes the run. A second SIGTERM, more than 5 seconds after the first,
    ends the process at once.

    The next process starts a new epoch and does not repeat the rest of the
    interrupted one. So give `fit` an endless dataset that starts at `step`, and
    `steps_per_epoch`:

        checkpoint = tf_adascale.callbacks.Checkpoint("run", model=model)
        model.fit(
            batches.repeat().skip(checkpoint.step),
            steps_per_epoch=100,
            initial_epoch=checkpoint.epoch,
            epochs=1000,
            callbacks=[tf_adascale.callbacks.ScalingLog(), stop, checkpoint],
        )

    List it last, so that the other callbacks have finished the epoch when it
    saves. The next process may use a different number of replicas, workers or
    micro-batches. The state of other callbacks, such as `EarlyStopping`, is not
    saved.

    Args:
        directory: path of a directory that all workers see. Only the chief
            writes to it.
        model: built and compiled `keras.Model`, created under this process's
            strategy. With several workers use one `Checkpoint` per process.
        **variables: `tf.Variable`s to save as well, or lists of them.

    Attributes:
        EXIT_CODE: int, 75, EX_TEMPFAIL of sysexits.h: run the command again.
        directory: string.
        epoch: int, number of epochs that have ended.
        step: int, number of steps taken, including skipped ones. With
            `steps_per_execution` > 1 a last execution that a finite dataset
            cuts short counts in full.

    Raises:
        ValueError: if the model or its optimizer is not built; if only all
            workers together can read one of its variables; if the directory
            holds checkpoints of another model, or none that can be read; if the
            workers restored different checkpoints.

    Example:

    >>> import tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> checkpoint = Checkpoint(tempfile.mkdtemp(), model=model)
    >>> history = model.fit(
    ...     tf.ones((8, 4)), tf.ones((8, 1)), batch_size=2, epochs=3,
    ...     verbose=0, callbacks=[checkpoint]
    ... )
    >>> Checkpoint(checkpoint.directory, model=model).step
    12
    """

    EXIT_CODE = 75

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: keras.Model,
        **variables: tf.Variable | Sequence[tf.Variable],
    ):
        super().__init__()
        self.directory = os.fspath(directory)
        saved = _saved(model)
        self._strategy = model.distribute_strategy
        self._counts = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False)
            for name in ("epoch", "step")
        }
        self._checkpoints = checkpoint_files.Checkpoints(
            self.directory,
            **saved,
            **self._counts,
            **variables,
        )
        self._checkpoints.restore()
        if not workers.agree(self._strategy, self.step):
            raise ValueError(
                "`directory` must be the same for all workers, which restored "
                "different checkpoints from it. Received: "
                f"directory={self.directory!r}, with step={self.step} on this "
                "worker"
            )
        self._is_asked = threading.Event()
        self._is_time = workers.preemption_check(
            self._strategy, self._is_asked.is_set
        )
        self._asked_at = 0.0
        self._stopped = False
        self._previous_handler = None

    @property
    def epoch(self) -> int:
        """Int, number of epochs that have ended."""
        return int(self._counts["epoch"].numpy())

    @property
    def step(self) -> int:
        """Int, number of steps taken."""
        return int(self._counts["step"].numpy())

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts to listen for SIGTERM."""
        self._is_asked.clear()
        self._stopped = False
        is_main = threading.current_thread() is threading.main_thread()
        # After a `fit` that failed the handler is still set.
        if is_main and self._previous_handler is None:
            handler = signal.signal(signal.SIGTERM, self._on_sigterm)
            # It is None if it was not set from Python.
            self._previous_handler = handler or signal.SIG_DFL

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Counts the steps, and ends training if it is asked to."""
        steps = getattr(self.model, "steps_per_execution", 1)
        self._counts["step"].assign_add(steps)
        if self._is_time():
            self._stopped = self.model.stop_training = True
            # Save now: validation may take longer than the process has left.
            self._end_epoch()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Saves a checkpoint."""
        if not self._stopped:
            self._end_epoch()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Exits if training was asked to end."""
        self._restore_handler()
        if self._stopped or self._is_asked.is_set():
            sys.exit(self.EXIT_CODE)

    def _end_epoch(self):
        self._counts["epoch"].assign_add(1)
        if workers.is_chief(self._strategy):
            self._checkpoints.save()

    def _on_sigterm(self, number, _):
        if not self._is_asked.is_set():
            self._asked_at = time.monotonic()
            self._is_asked.set()
        elif time.monotonic() > self._asked_at + SAME_NOTICE_SECONDS:
            self._restore_handler()
            os.kill(os.getpid(), number)

    def _restore_handler(self):
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None


def _saved(model):
    """Returns a model's part of the arguments of `Checkpoints`."""
    optimizer = getattr(model, "optimizer", None)
    is_built = isinstance(model, keras.Model) and model.built
    if not is_built or not getattr(optimizer, "built", False):
        raise ValueError(
            "`model` must be built and compiled, and its optimizer must be "
            "built. Call `model.optimizer.build(model.trainable_variables)` "
            f"first. Received: model={model!r}, built={is_built}, "
            f"model.optimizer={optimizer!r}"
        )
    saved = {
        "model": [v.value for v in model.variables],
        "optimizer": [v.value for v in model.optimizer.variables],
    }
    strategy = model.distribute_strategy
    for variable in saved["model"] + saved["optimizer"]:
        if workers.only_all_workers_can_read(strategy, variable):
            raise ValueError(
                "`model` must hold only variables that the chief can read "
                "alone. Create this one with another synchronization than "
                "ON_READ, or with the aggregation ONLY_FIRST_REPLICA. "
                f"Received: variable={variable!r}"
            )
    return {"kind": _class_names(optimizer), **saved}


def _class_names(optimizer):
    """Returns the class names of an optimizer and of its inner ones."""
    names = []
    while optimizer is not None:
        names.append(type(optimizer).__name__)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return " of ".join(names)
