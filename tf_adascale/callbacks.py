"""Keras callbacks: when to stop, what to show, how to survive."""

import math
import os
import signal
import sys
import threading
import time

import keras
import tensorflow as tf

from tf_adascale import checkpoints, replicas, wrapper

# What `ScalingLog` shows, and the optimizer's attribute that has it.
_SHOWN = {
    "gain": "gain",
    "scale_invariant_step": "scale_invariant_step",
    "learning_rate": "effective_learning_rate",
    "gradient_variance": "gradient_variance",
    "gradient_sqnorm": "gradient_sqnorm",
    "noise_scale": "noise_scale",
}


# One notice may come twice: to a process, and to the group it belongs to.
SAME_NOTICE_SECONDS = 5.0


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


class Checkpoint(keras.callbacks.Callback):
    """Saves a run after each epoch, and restores it in the next process.

    When it is made it restores the last checkpoint, if there is one: weights,
    all that the optimizer keeps, and how far training came. What is damaged is
    passed over for the checkpoint before it, with a warning; so is a disk that
    is full when saving, and training goes on.

    SIGTERM ends the epoch after a few steps at most, on all workers if one gets
    it: a checkpoint is saved, callbacks see the end of the epoch and of
    training, and the process exits with `EXIT_CODE`. (Another one, more than 5
    seconds later, ends it at once.) What is left of the epoch is not made up
    for: the next process begins a new one. So give `fit` an endless dataset
    that begins at `step`, and `steps_per_epoch`:

        checkpoint = tf_adascale.callbacks.Checkpoint("run", model=model)
        model.fit(
            batches.repeat().skip(checkpoint.step),
            steps_per_epoch=100,
            initial_epoch=checkpoint.epoch,
            epochs=1000,
            callbacks=[tf_adascale.callbacks.ScalingLog(), stop, checkpoint],
        )

    List it last: what other callbacks do at the end of an epoch is done then.
    The next process may have other replicas, workers or micro-batches. What
    other callbacks remember, as `EarlyStopping` does, is not saved.

    Args:
        directory: string, where all workers see it. The chief writes there.
        model: built and compiled Keras model, made in this process' strategy.
            On several workers there may be one `Checkpoint` per process.
        **variables: `tf.Variable`s to save with it, or lists of them.

    Attributes:
        EXIT_CODE: int, 75, the EX_TEMPFAIL of sysexits.h: start again.
        epoch: int, number of epochs that have ended.
        step: int, number of steps taken, skipped ones included. Of several
            steps per execution, the last of a finite dataset counts whole.

    Raises:
        ValueError: if the model or its optimizer is not built; if a variable
            can be read by all workers together only; if the directory holds
            checkpoints of another model, or none that can be read; if the
            workers restored different ones.

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

    def __init__(self, directory, *, model, **variables):
        super().__init__()
        self.directory = os.fspath(directory)
        self._strategy = model.distribute_strategy
        self._counts = {
            name: tf.Variable(0, dtype=tf.int64, trainable=False)
            for name in ("epoch", "step")
        }
        self._checkpoints = checkpoints.Checkpoints(
            self.directory,
            **_saved(model),
            **self._counts,
            **variables,
        )
        self._checkpoints.restore()
        if not replicas.agree(self._strategy, self.step):
            raise ValueError(
                "The workers restored different checkpoints. Expected a "
                "directory that all of them see. Received: "
                f"directory={self.directory!r}, which holds step {self.step} "
                "on this worker"
            )
        self._is_asked = threading.Event()
        self._is_time = replicas.preemption_check(
            self._strategy, self._is_asked.is_set
        )
        self._asked_at = 0.0
        self._stopped = False
        self._previous_handler = None

    @property
    def epoch(self):
        """Int, number of epochs that have ended."""
        return int(self._counts["epoch"].numpy())

    @property
    def step(self):
        """Int, number of steps taken."""
        return int(self._counts["step"].numpy())

    def on_train_begin(self, logs=None):
        """Begins to listen for SIGTERM."""
        self._is_asked.clear()
        self._stopped = False
        is_main = threading.current_thread() is threading.main_thread()
        # It is set already where `fit` failed before.
        if is_main and self._previous_handler is None:
            handler = signal.signal(signal.SIGTERM, self._on_sigterm)
            # It is None where it was not Python that set one.
            self._previous_handler = handler or signal.SIG_DFL

    def on_train_batch_end(self, batch, logs=None):
        """Counts what was executed, and ends training if it is asked to."""
        steps = getattr(self.model, "steps_per_execution", 1)
        self._counts["step"].assign_add(steps)
        if self._is_time():
            self._stopped = self.model.stop_training = True
            # Before validation, which may take longer than there is time.
            self._end_epoch()

    def on_epoch_end(self, epoch, logs=None):
        """Saves a checkpoint."""
        if not self._stopped:
            self._end_epoch()

    def _end_epoch(self):
        self._counts["epoch"].assign_add(1)
        if replicas.is_chief(self._strategy):
            self._checkpoints.save()

    def on_train_end(self, logs=None):
        """Exits if training was asked to end."""
        self._put_handler_back()
        if self._stopped or self._is_asked.is_set():
            sys.exit(self.EXIT_CODE)

    def _on_sigterm(self, number, _):
        if not self._is_asked.is_set():
            self._asked_at = time.monotonic()
            self._is_asked.set()
        elif time.monotonic() > self._asked_at + SAME_NOTICE_SECONDS:
            # As if there had been no handler.
            self._put_handler_back()
            os.kill(os.getpid(), number)

    def _put_handler_back(self):
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None


def _saved(model):
    """Returns what a checkpoint has of a model: arguments of `Checkpoints`."""
    optimizer = getattr(model, "optimizer", None)
    if not model.built or not getattr(optimizer, "built", False):
        raise ValueError(
            "There is nothing to restore yet. Expected a model that is built "
            "and compiled, and `model.optimizer.build("
            "model.trainable_variables)`. Received: "
            f"model.built={model.built}, optimizer={optimizer!r}"
        )
    saved = {
        "model": [v.value for v in model.variables],
        "optimizer": [v.value for v in model.optimizer.variables],
    }
    for variable in saved["model"] + saved["optimizer"]:
        strategy = model.distribute_strategy
        if replicas.only_all_workers_can_read(strategy, variable):
            raise ValueError(
                "The chief cannot save this variable alone. Expected "
                "synchronization other than ON_READ, or the aggregation "
                f"ONLY_FIRST_REPLICA. Received: variable={variable!r}"
            )
    return {"kind": _class_names(optimizer), **saved}


def _class_names(optimizer):
    """Returns the names of an optimizer's class and those of its inner ones."""
    names = []
    while optimizer is not None:
        names.append(type(optimizer).__name__)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return " of ".join(names)


def _check_optimizer(callback):
    optimizer = callback.model.optimizer
    is_wrapper = isinstance(optimizer, wrapper.Wrapper)
    if not is_wrapper or not hasattr(optimizer, "scale_invariant_step"):
        raise ValueError(
            f"{type(callback).__name__} found an optimizer without a gain. "
            "Expected a model compiled with tf_adascale.AdaScale. Received: "
            f"optimizer={optimizer!r}"
        )
