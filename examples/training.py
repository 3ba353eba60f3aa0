"""The training loop that all trainers share.

A trainer hands `run` a `Task`: its model, its data and the schedule tuned at
the base batch. `run` trains it by an algorithm, at a scale, on a strategy, and
keeps everything in a model directory:

    run.json        what was asked for: another run is refused here
    log.csv         loss, metrics, learning rate, gain: about 100 rows a run
    tensorboard/    the same for TensorBoard
    checkpoint/     what to go on from, saved with every row
    result.json     the `Result`, once there is one

"Epoch" in Keras's progress bar and in the log is the stretch between two rows.
"""

import csv
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from examples import algorithms, strategies

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
LOG_ROWS = 100
SMOKE_STEPS = 4
SMOKE_TEST_BATCHES = 2


class Task(NamedTuple):
    """What is trained: everything that does not depend on the scale.

    Attributes:
        name: str, of the benchmark.
        base_batch: int, B, examples per step that the schedule was tuned for.
        total_steps: int, T_1, steps of training at the base batch.
        schedule: callable, total_steps to a `LearningRateSchedule` for the base
            batch that lasts that many steps.
        optimizer: callable, schedule to a new Keras optimizer.
        model: callable, () to a new `tf_adascale.Model`.
        train_dataset: callable, (batch_size, *, seed, start_step) to an
            endless `tf.data.Dataset` of batches that begins with batch number
            start_step. What batch t holds may depend on batch_size, seed and t
            only: that is how a run goes on where it was stopped.
        test_dataset: callable, batch_size to a finite `tf.data.Dataset`.
        loss: callable, () to a Keras loss.
        metrics: callable, () to a list of Keras metrics.
        metric: str, name of the metric that counts.
    """

    name: str
    base_batch: int
    total_steps: int
    schedule: Callable[[int], Any]
    optimizer: Callable[[Any], keras.optimizers.Optimizer]
    model: Callable[[], keras.Model]
    train_dataset: Callable[..., tf.data.Dataset]
    test_dataset: Callable[[int], tf.data.Dataset]
    loss: Callable[[], Any]
    metrics: Callable[[], list]
    metric: str


class Settings(NamedTuple):
    """How it is trained. See `examples/flags.py`, where each is a flag."""

    algorithm: str = "adascale"
    scale: int | None = None
    replicas: int | None = None
    microbatches: int | None = None
    total_steps: int | None = None
    iterations: int | None = None
    strategy: str = "default"
    tpu: str | None = None
    seed: int = 0
    model_dir: str | None = None
    jit_compile: bool = False
    steps_per_execution: int = 1
    mixed_precision: str = "float32"
    smoke: bool = False


class Result(NamedTuple):
    """What came of a run.

    Attributes:
        algorithm: str.
        scale: int, S.
        iterations: int, steps taken.
        examples: int, training examples seen, iterations * S * B.
        metric: str, name of the metric that counts.
        value: float, that metric on the test data.
        mean_gain: float, tau / iterations; None for algorithms without a gain.
    """

    algorithm: str
    scale: int
    iterations: int
    examples: int
    metric: str
    value: float
    mean_gain: float | None


def run(task, settings):
    """Trains a task, or goes on training it, then tests it.

    Args:
        task: `Task`.
        settings: `Settings`.

    Returns:
        `Result`, also written to result.json in the model directory.

    Raises:
        ValueError: if the settings contradict each other or the devices, or the
            model directory holds another run.
    """
    check(settings)
    strategy = strategies.make(
        settings.strategy, replicas=settings.replicas, tpu=settings.tpu
    )
    scale, microbatches = strategies.split_scale(
        replicas=strategy.num_replicas_in_sync,
        scale=settings.scale,
        microbatches=settings.microbatches,
    )
    settings = _completed(settings, task, scale)
    chief = strategies.is_chief(strategy)
    _claim(settings, task, write=chief)
    keras.config.set_dtype_policy(settings.mixed_precision)
    keras.utils.set_random_seed(settings.seed)
    with strategy.scope():
        model, plan = _compiled(task, settings, microbatches)
        progress = Progress(model, plan, settings, save=chief)
    print(
        f"{task.name}: {settings.algorithm} at S = {scale}, batches of "
        f"{scale * task.base_batch}, step {progress.step} of "
        f"{plan.iterations} at most, in {settings.model_dir}",
        flush=True,
    )
    if not progress.finished:
        _fit(model, plan, progress, task, settings, write=chief)
    result = _result(model, progress, task, settings, strategy)
    if chief:
        _write_json(_path(settings, "result.json"), result._asdict())
    print(f"{task.name}: {result}", flush=True)
    return result


def check(settings):
    """Raises a ValueError if settings contradict each other."""
    algorithms.check(settings.algorithm, settings.iterations)
    if settings.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"The precision is not known. Expected one of {PRECISIONS}. "
            f"Received: mixed_precision={settings.mixed_precision!r}"
        )
    if settings.tpu is not None and settings.strategy != "tpu":
        raise ValueError(
            'A TPU was named that would not be used. Expected strategy="tpu" '
            f"with it. Received: tpu={settings.tpu!r}, "
            f"strategy={settings.strategy!r}"
        )
    if None not in (settings.replicas, settings.scale, settings.microbatches):
        strategies.split_scale(
            replicas=settings.replicas,
            scale=settings.scale,
            microbatches=settings.microbatches,
        )


def _completed(settings, task, scale):
    """Returns the settings with the task's and the devices' defaults put in."""
    steps = SMOKE_STEPS if settings.smoke else task.total_steps
    name = f"{settings.algorithm}-S{scale}-seed{settings.seed}"
    return settings._replace(
        scale=scale,
        total_steps=settings.total_steps or steps,
        model_dir=settings.model_dir or os.path.join("out", task.name, name),
    )


def _compiled(task, settings, microbatches):
    """Returns the compiled model and the `Plan` it is trained by."""
    model = task.model()
    plan = algorithms.plan(
        settings.algorithm,
        task.schedule(settings.total_steps),
        scale=settings.scale,
        total_steps=settings.total_steps,
        make_optimizer=task.optimizer,
        iterations=settings.iterations,
    )
    model.compile(
        optimizer=plan.optimizer,
        loss=task.loss(),
        metrics=task.metrics(),
        # AdaScale: each micro-batch is one base batch and one sample of the
        # gradient, so that any scale fits any number of devices.
        microbatches=microbatches,
        jit_compile=settings.jit_compile,
        steps_per_execution=settings.steps_per_execution,
    )
    model.optimizer.build(model.trainable_variables)
    return model, plan


def _fit(model, plan, progress, task, settings, *, write):
    """Trains from where `progress` stands to the end."""
    loggers = []
    if write:
        log = _path(settings, "log.csv")
        _drop_rows(log, first_epoch=progress.epoch)
        loggers = [
            keras.callbacks.CSVLogger(log, append=True),
            keras.callbacks.TensorBoard(
                _path(settings, "tensorboard"), write_graph=False
            ),
        ]
    dataset = task.train_dataset(
        settings.scale * task.base_batch,
        seed=settings.seed,
        start_step=progress.step,
    )
    options = tf.data.Options()
    # Workers read the same stream, and each keeps its own part of every batch.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    try:
        model.fit(
            dataset.with_options(options),
            initial_epoch=progress.epoch,
            epochs=progress.epochs,
            steps_per_epoch=progress.interval,
            callbacks=[*plan.callbacks, *loggers, progress],
            shuffle=False,  # The data set is.
            verbose=1 if sys.stdout.isatty() else 2,
        )
    except KeyboardInterrupt:
        for logger in loggers:
            logger.on_train_end()  # Closes its file.
        sys.exit(f"\nStopped. The same command goes on: {settings.model_dir}")


def _result(model, progress, task, settings, strategy):
    metrics = model.evaluate(
        task.test_dataset(task.base_batch * strategy.num_replicas_in_sync),
        steps=SMOKE_TEST_BATCHES if settings.smoke else None,
        verbose=0,
        return_dict=True,
    )
    mean_gain = None
    if settings.algorithm == "adascale":
        mean_gain = float(model.optimizer.scale_invariant_step) / progress.step
    return Result(
        algorithm=settings.algorithm,
        scale=settings.scale,
        iterations=progress.step,
        examples=progress.step * settings.scale * task.base_batch,
        metric=task.metric,
        value=float(metrics[task.metric]),
        mean_gain=mean_gain,
    )


class Progress(keras.callbacks.Callback):
    """Counts the steps of a run, ends it in time, and survives its process.

    Restores the last checkpoint when it is made, saves one after each epoch.

    Args:
        model: built and compiled `tf_adascale.Model`.
        plan: `Plan`.
        settings: `Settings`, complete.
        save: bool, whether this process is the one that saves.

    Attributes:
        interval: int, steps per epoch: those of a row of the log.
        epochs: int, number of epochs that training lasts at most.
    """

    def __init__(self, model, plan, settings, *, save):
        super().__init__()
        self._iterations = plan.iterations
        self.interval = _steps_per_row(settings)
        self.epochs = math.ceil(plan.iterations / self.interval)
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._finished = tf.Variable(False, trainable=False)
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=model, step=self._step, finished=self._finished
            ),
            _path(settings, "checkpoint"),
            max_to_keep=1,
        )
        self._save = save
        self._manager.restore_or_initialize()

    @property
    def step(self):
        """Int, number of steps taken."""
        return int(self._step.numpy())

    @property
    def epoch(self):
        """Int, number of epochs finished."""
        return math.ceil(self.step / self.interval)

    @property
    def finished(self):
        """Bool, whether training came to its end."""
        return bool(self._finished.numpy())

    def on_train_batch_end(self, batch, logs=None):
        """Counts what was executed, and ends training with the last step."""
        self._step.assign_add(self.model.steps_per_execution)
        if self.step >= self._iterations:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        """Saves a checkpoint."""
        self._finished.assign(self.model.stop_training)
        if self._save:
            self._manager.save()


def _steps_per_row(settings):
    """Returns the number of steps per row of the log."""
    shortest_run = math.ceil(settings.total_steps / settings.scale)
    if settings.algorithm == "identity":
        shortest_run = settings.total_steps
    executions = shortest_run / LOG_ROWS / settings.steps_per_execution
    return settings.steps_per_execution * math.ceil(executions)


def _claim(settings, task, *, write):
    """Makes the model directory a run's own, or finds it to be so."""
    wanted = {
        "task": task.name,
        "algorithm": settings.algorithm,
        "scale": settings.scale,
        "total_steps": settings.total_steps,
        "iterations": settings.iterations,
        "seed": settings.seed,
        "steps_per_row": _steps_per_row(settings),
        "schedule": task.schedule(settings.total_steps).get_config(),
    }
    path = _path(settings, "run.json")
    if os.path.exists(path):
        with open(path) as file:
            found = json.load(file)
        if found != wanted:
            raise ValueError(
                "The model directory holds another run. Expected the flags of "
                f"that run, {found}, to go on with it, or another model_dir. "
                f"Received: {wanted}, model_dir={settings.model_dir!r}"
            )
    elif write:
        os.makedirs(settings.model_dir, exist_ok=True)
        _write_json(path, wanted)


def _drop_rows(log, *, first_epoch):
    """Removes a log's rows from an epoch on: their checkpoint was not saved."""
    if not os.path.exists(log):
        return
    with open(log, newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    with open(log, "w", newline="") as file:
        csv.writer(file).writerows(
            [header] * bool(header)
            + [row for row in rows if int(row[0]) < first_epoch]
        )


def _path(settings, name):
    return os.path.join(settings.model_dir, name)


def _write_json(path, values):
    with open(path, "w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
