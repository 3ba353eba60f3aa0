"""The training loop that all trainers share.

A trainer hands `run` a `Task`: its model, its data and the schedule tuned at
the base batch. `run` trains it by an algorithm, at a scale, on a strategy, and
keeps everything in a model directory:

    run.json        what was asked for: another run is refused here
    log.csv         loss, metrics, learning rate, gain: about 100 rows a run
    tensorboard/    the same for TensorBoard
    checkpoint/     what to go on from, saved with every row: the last two
    result.json     the `Result`, once there is one

Of several workers only the chief writes it, and prints; all of them read it.

A process exits with 0 once there is a result, and with `STOPPED`, 75, if it was
stopped while training: by SIGTERM, after one more checkpoint, or because
another worker was lost. The same command then goes on, and by AdaScale at
another scale too.

"Epoch" in Keras's progress bar and in the log is the stretch between two rows;
column `step` tells the iteration that it ended with, `base_batches` the number
of base batches seen till then.
"""

import functools
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from examples import (
    algorithms,
    elastic,
    model_directory,
    strategies,
    streams,
)
from examples.progress import Forgiving, Progress

STOPPED = Progress.EXIT_CODE
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
        train_dataset: callable, (batch_size, *, seed, start, share) to an
            endless `tf.data.Dataset` of one worker's `streams.Share` of the
            batches that follow the first `start` examples. What they hold may
            depend on these arguments only: that is how a run goes on where it
            was stopped. (Where records are dropped while reading, it may see as
            many again, or miss as many.)
        test_dataset: callable, batch_size to a finite `tf.data.Dataset`.
        loss: callable, () to a Keras loss.
        metrics: callable, () to a list of Keras metrics.
        metric: str, name of the metric that counts.
        evaluate: callable, (model, dataset) to a dict from metric to float, for
            a metric that Keras has not; None is `model.evaluate`.
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
    evaluate: Callable[..., dict] | None = None


class Settings(NamedTuple):
    """How it is trained. See `examples/flags.py`, where each is a flag."""

    algorithm: str = "adascale"
    scale: int | None = None
    elastic: str | None = None
    replicas: int | None = None
    microbatches: int | None = None
    total_steps: int | None = None
    iterations: int | None = None
    smoothing: float | None = None
    strategy: str = "default"
    cluster: str | None = None
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
        scale: int, S; or the str that says how it changed: as given by
            `Settings.elastic`, or by processes one after another, as in "4-8".
        iterations: int, steps taken.
        examples: int, training examples seen: S * B per step.
        metric: str, name of the metric that counts.
        value: float, that metric on the test data.
        mean_gain: float, tau / iterations; None for algorithms without a gain.
    """

    algorithm: str
    scale: int | str
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
        SystemExit: with the code `STOPPED`, if it was stopped before its end.
    """
    check(settings)
    try:
        return _run(task, settings)
    except tf.errors.UnavailableError as error:
        if settings.strategy != "multiworker":
            raise
        print(
            f"{task.name}: stopped, for another worker was lost. The same "
            f"command, given to all workers, goes on. {error.message}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(STOPPED)


def _run(task, settings):
    strategy = strategies.make(
        settings.strategy,
        replicas=settings.replicas,
        tpu=settings.tpu,
        cluster=settings.cluster or strategies.CLUSTERS[0],
    )
    scales = _scales(settings, strategy.num_replicas_in_sync)
    settings = _completed(settings, task, scales)
    chief = strategies.is_chief(strategy)
    with strategy.scope():
        plan = algorithms.plan(
            settings.algorithm,
            task.schedule(settings.total_steps),
            scales=scales,
            total_steps=settings.total_steps,
            make_optimizer=task.optimizer,
            iterations=settings.iterations,
            smoothing=settings.smoothing,
        )
    interval = _steps_per_row(plan, settings)
    say = functools.partial(print, flush=True) if chief else lambda _: None
    _claim(settings, task, interval, write=chief)
    keras.config.set_dtype_policy(settings.mixed_precision)
    keras.utils.set_random_seed(settings.seed)
    with strategy.scope():
        model = task.model()
        _compile(model, plan, plan.phases[0], task, settings)
        model.optimizer.build(model.trainable_variables)
    progress = Progress(
        _path(settings, "checkpoint"),
        model=model,
        phases=plan.phases,
        interval=interval,
    )
    # Made before training: data that are not there are told of now.
    test_dataset = _test_dataset(task, settings, strategy)
    say(
        f"{task.name}: {settings.algorithm} at S = {_scale_text(settings)}, "
        f"base batch {task.base_batch}, step {progress.step} of "
        f"{plan.iterations} at most, in {settings.model_dir}"
    )
    if chief:
        model_directory.drop_rows(
            _path(settings, "log.csv"), first_epoch=progress.epoch
        )
    compiled_for = None
    while not progress.finished:
        if progress.phase != compiled_for:
            compiled_for = progress.phase
            with strategy.scope():
                _compile(model, plan, compiled_for, task, settings)
        _fit(model, plan, progress, task, settings, write=chief)
    result = _result(model, test_dataset, progress, task, settings)
    say(f"{task.name}: {result}")
    if chief:
        model_directory.write_json(
            _path(settings, "result.json"), result._asdict()
        )
    return result


def check(settings):
    """Raises a ValueError if settings contradict each other."""
    scales = elastic.parse(settings.elastic or "0:1")
    algorithms.check(settings.algorithm, settings.iterations, scales)
    if settings.elastic and (settings.scale or settings.microbatches):
        raise ValueError(
            "The scale is given twice. Expected elastic, or scale and "
            f"microbatches. Received: elastic={settings.elastic!r}, "
            f"scale={settings.scale}, microbatches={settings.microbatches}"
        )
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
    if settings.cluster is not None and settings.strategy != "multiworker":
        raise ValueError(
            "A cluster was named that would not be used. Expected "
            'strategy="multiworker" with it. Received: '
            f"cluster={settings.cluster!r}, strategy={settings.strategy!r}"
        )
    if None not in (settings.replicas, settings.scale, settings.microbatches):
        strategies.split_scale(
            replicas=settings.replicas,
            scale=settings.scale,
            microbatches=settings.microbatches,
        )


def _scales(settings, replicas):
    """Returns ((fraction, scale), ...), each of which the replicas can make."""
    if settings.elastic is None:
        scale, _ = strategies.split_scale(
            replicas=replicas,
            scale=settings.scale,
            microbatches=settings.microbatches,
        )
        return ((0.0, scale),)
    scales = elastic.parse(settings.elastic)
    for _, scale in scales:
        strategies.split_scale(replicas=replicas, scale=scale)
    return scales


def _completed(settings, task, scales):
    """Returns the settings with the task's and the devices' defaults put in."""
    steps = SMOKE_STEPS if settings.smoke else task.total_steps
    settings = settings._replace(
        scale=None if settings.elastic else scales[0][1],
        total_steps=settings.total_steps or steps,
    )
    scale = _scale_text(settings).replace(":", "-").replace(",", "_")
    name = f"{settings.algorithm}-S{scale}-seed{settings.seed}"
    return settings._replace(
        model_dir=settings.model_dir or os.path.join("out", task.name, name)
    )


def _scale_text(settings):
    return settings.elastic or str(settings.scale)


def _compile(model, plan, phase, task, settings):
    """Compiles the model for a phase, with the optimizer as it stands."""
    replicas = model.distribute_strategy.num_replicas_in_sync
    model.compile(
        optimizer=plan.optimizer,
        loss=task.loss(),
        metrics=task.metrics(),
        # AdaScale: each micro-batch is one base batch and one sample of the
        # gradient, so that any scale fits any number of devices.
        microbatches=phase.scale // replicas,
        jit_compile=settings.jit_compile,
        steps_per_execution=settings.steps_per_execution,
    )


def _fit(model, plan, progress, task, settings, *, write):
    """Trains from where `progress` stands to the end of its phase.

    Or of its row of the log, where training was stopped amid one.
    """
    loggers = []
    if write:
        loggers = [
            _CSVLogger(_path(settings, "log.csv"), append=True),
            _TensorBoard(_path(settings, "tensorboard"), write_graph=False),
        ]
    phase = progress.phase
    steps, rows = _rows_left(progress, settings)
    try:
        model.fit(
            _distributed(task, progress, settings, model),
            initial_epoch=progress.epoch,
            epochs=progress.epoch + rows,
            steps_per_epoch=steps,
            callbacks=[
                *plan.callbacks(phase),
                keras.callbacks.LambdaCallback(on_epoch_end=progress.add),
                *loggers,
                progress,
            ],
            shuffle=False,  # The data set is.
            verbose=_verbosity(write),
        )
    except KeyboardInterrupt:
        for logger in loggers:
            logger.on_train_end()  # Closes its file.
        sys.exit(f"\nStopped. The same command goes on: {settings.model_dir}")


def _rows_left(progress, settings):
    """Returns the steps of a row of the log, and the number of such rows."""
    since_row = progress.step % progress.interval
    if not since_row:
        steps_left = progress.phase.last_iteration - progress.step
        return progress.interval, math.ceil(steps_left / progress.interval)
    executions = (progress.interval - since_row) / settings.steps_per_execution
    return math.ceil(executions) * settings.steps_per_execution, 1


def _verbosity(chief):
    """Returns what Keras calls `verbose`: a bar, a line per row, or nothing."""
    if not chief:
        return 0
    return 1 if sys.stdout.isatty() else 2


class _CSVLogger(Forgiving, keras.callbacks.CSVLogger):
    pass


class _TensorBoard(Forgiving, keras.callbacks.TensorBoard):
    pass


def _distributed(task, progress, settings, model):
    """Returns the training data from where `progress` stands.

    Each worker reads its own share of a batch and splits it among its replicas.
    """
    batch_size = progress.phase.scale * task.base_batch

    def replicas_batches(context):
        workers = context.num_input_pipelines
        share = streams.Share(
            context.input_pipeline_id, workers, rows=batch_size // workers
        )
        dataset = task.train_dataset(
            batch_size,
            seed=settings.seed,
            start=progress.base_batches * task.base_batch,
            share=share,
        )
        replicas = context.num_replicas_in_sync // workers
        return dataset if replicas == 1 else streams.split(dataset, replicas)

    return model.distribute_strategy.distribute_datasets_from_function(
        replicas_batches
    )


def _test_dataset(task, settings, strategy):
    replicas = strategy.num_replicas_in_sync
    dataset = task.test_dataset(task.base_batch * replicas)
    return dataset.take(SMOKE_TEST_BATCHES) if settings.smoke else dataset


def _result(model, dataset, progress, task, settings):
    evaluate = task.evaluate or _evaluate
    metrics = evaluate(model, dataset)
    mean_gain = None
    if settings.algorithm in algorithms.ADAPTIVE_ALGORITHMS:
        mean_gain = float(model.optimizer.scale_invariant_step) / progress.step
    scales = progress.scales
    return Result(
        algorithm=settings.algorithm,
        scale=settings.elastic
        or (scales[0] if len(scales) == 1 else "-".join(map(str, scales))),
        iterations=progress.step,
        examples=progress.base_batches * task.base_batch,
        metric=task.metric,
        value=float(metrics[task.metric]),
        mean_gain=mean_gain,
    )


def _evaluate(model, dataset):
    with warnings.catch_warnings():
        # Keras warns of the end of a dataset whose length it does not know: of
        # every one from which records may be dropped.
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        return model.evaluate(dataset, verbose=0, return_dict=True)


def predictions(model, dataset):
    """Yields each batch of a dataset with the model's outputs for it.

    Unlike `predict` it runs on one device, and every worker sees all batches:
    for metrics that are not computed in parts.

    Args:
        model: Keras model.
        dataset: finite `tf.data.Dataset` of tuples whose first entry is the
            model's input.
    """
    call = tf.function(
        lambda x: model(x, training=False),
        autograph=False,
        reduce_retracing=True,
    )
    for batch in dataset:
        yield batch, call(batch[0])


def _steps_per_row(plan, settings):
    """Returns the number of steps per row of the log."""
    shortest_run = plan.iterations
    if settings.algorithm in algorithms.ADAPTIVE_ALGORITHMS:
        begin = shortest_run = 0
        for phase in plan.phases:
            shortest_run += (phase.end - begin) / phase.scale
            begin = phase.end
    executions = shortest_run / LOG_ROWS / settings.steps_per_execution
    return settings.steps_per_execution * math.ceil(executions)


def _claim(settings, task, interval, *, write):
    """Makes the model directory a run's own, or finds it to be so."""
    wanted = {
        "task": task.name,
        "algorithm": settings.algorithm,
        "scale": settings.scale,
        "elastic": settings.elastic,
        "total_steps": settings.total_steps,
        "iterations": settings.iterations,
        "seed": settings.seed,
        "steps_per_row": interval,
        "schedule": task.schedule(settings.total_steps).get_config(),
    }
    # AdaScale: averages and progress are in base batches, at any scale.
    adaptive = settings.algorithm in algorithms.ADAPTIVE_ALGORITHMS
    may_change = set()
    if adaptive and not settings.elastic:
        may_change = {"scale", "steps_per_row"}
    model_directory.claim(
        settings.model_dir, wanted, may_change=may_change, write=write
    )


def _path(settings, name):
    return os.path.join(settings.model_dir, name)
