"""The training loop that all trainers share.

A trainer passes `run` a `Task`: its model, its data and the schedule tuned at
the base batch. `run` trains it with an algorithm, at a scale, on a strategy. A
model directory contains the files of the run:

    run.json        the settings, so that another run is refused here
    log.csv         loss, metrics, learning rate, gain: about 100 rows per run
    tensorboard/    the same for TensorBoard
    checkpoint/     the last two checkpoints, one is saved with every row
    result.json     the `Result`, written at the end

Only the chief writes this directory and prints. All workers read it.

A process exits with code 0 when the result is written. It exits with `STOPPED`,
75, if training was stopped: by SIGTERM, after a last checkpoint, or because
another worker was lost. The same command then resumes the run. AdaScale also
resumes at another scale.

An "epoch" in Keras's progress bar and in the log is one row of the log. The
column `step` is the last iteration of the row, and `base_batches` is the number
of base batches seen so far.
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

from examples.common import algorithms, elastic, model_directory, strategies
from examples.common.data import streams
from examples.common.progress import Forgiving, Progress

STOPPED = Progress.EXIT_CODE
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
LOG_ROWS = 100
SMOKE_STEPS = 4
SMOKE_TEST_BATCHES = 2


class Task(NamedTuple):
    """The part of a benchmark that does not depend on the scale.

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
            batches after the first `start` examples. The batches must depend
            only on these arguments, so that a run resumes where it was stopped.
            (A run that drops records while reading may repeat or skip as many
            of them when it resumes.)
        test_dataset: callable, batch_size to a finite `tf.data.Dataset`.
        loss: callable, () to a Keras loss.
        metrics: callable, () to a list of Keras metrics.
        metric: str, name of the metric of the result.
        evaluate: callable, (model, dataset) to a dict from metric to float, for
            a metric that Keras lacks. Default: `model.evaluate`.
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
    """How a task is trained. Each field is a flag, see `flags.py`."""

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
    """The result of a run.

    Attributes:
        algorithm: str.
        scale: int, S. A str if the scale changed: `Settings.elastic`, or the
            scales of successive processes, for example "4-8".
        iterations: int, number of steps.
        examples: int, training examples seen: S * B per step.
        metric: str, name of the metric.
        value: float, the metric on the test data.
        mean_gain: float, tau / iterations. None for algorithms without a gain.
    """

    algorithm: str
    scale: int | str
    iterations: int
    examples: int
    metric: str
    value: float
    mean_gain: float | None


def run(task, settings):
    """Trains a task, or resumes its training, then tests it.

    Args:
        task: `Task`.
        settings: `Settings`.

    Returns:
        `Result`, which is also written to result.json in the model directory.

    Raises:
        ValueError: if the settings contradict each other or the devices, or the
            model directory belongs to another run.
        SystemExit: with code `STOPPED`, if training was stopped.
    """
    check(settings)
    try:
        return _run(task, settings)
    except tf.errors.UnavailableError as error:
        if settings.strategy != "multiworker":
            raise
        print(
            f"{task.name}: stopped because another worker was lost. Run the "
            f"same command on all workers to resume. {error.message}",
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
    settings = _with_defaults(settings, task, scales)
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
    # Missing data fails here, before training.
    test_dataset = _test_dataset(task, settings, strategy)
    say(
        f"{task.name}: {settings.algorithm} at S = {_scale_text(settings)}, "
        f"base batch {task.base_batch}, step {progress.step} of at most "
        f"{plan.iterations}, in {settings.model_dir}"
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
            "`elastic` must not be combined with `scale` or `microbatches`: it "
            f"sets the scale. Received: elastic={settings.elastic!r}, "
            f"scale={settings.scale}, microbatches={settings.microbatches}"
        )
    if settings.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"`mixed_precision` must be one of {PRECISIONS}. "
            f"Received: mixed_precision={settings.mixed_precision!r}"
        )
    if settings.tpu is not None and settings.strategy != "tpu":
        raise ValueError(
            '`tpu` must only be given with strategy="tpu". '
            f"Received: tpu={settings.tpu!r}, strategy={settings.strategy!r}"
        )
    if settings.cluster is not None and settings.strategy != "multiworker":
        raise ValueError(
            '`cluster` must only be given with strategy="multiworker". '
            f"Received: cluster={settings.cluster!r}, "
            f"strategy={settings.strategy!r}"
        )
    if None not in (settings.replicas, settings.scale, settings.microbatches):
        strategies.split_scale(
            replicas=settings.replicas,
            scale=settings.scale,
            microbatches=settings.microbatches,
        )


def _scales(settings, replicas):
    """Returns ((fraction, scale), ...), all multiples of the replicas."""
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


def _with_defaults(settings, task, scales):
    """Returns the settings with the defaults of the task and the devices."""
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
    """Compiles the model for a phase and keeps the state of the optimizer."""
    replicas = model.distribute_strategy.num_replicas_in_sync
    model.compile(
        optimizer=plan.optimizer,
        loss=task.loss(),
        metrics=task.metrics(),
        # AdaScale: each micro-batch is one base batch and one gradient sample.
        # Micro-batches make any scale fit any number of devices.
        microbatches=phase.scale // replicas,
        jit_compile=settings.jit_compile,
        steps_per_execution=settings.steps_per_execution,
    )


def _fit(model, plan, progress, task, settings, *, write):
    """Trains from the state of `progress` to the end of its phase.

    If a row of the log is incomplete, trains to the end of that row only.
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
            shuffle=False,  # The dataset is shuffled already.
            verbose=_verbosity(write),
        )
    except KeyboardInterrupt:
        for logger in loggers:
            logger.on_train_end()  # Closes its file.
        sys.exit(
            f"\nStopped. The same command resumes the run in "
            f"{settings.model_dir}"
        )


def _rows_left(progress, settings):
    """Returns the steps per row of the log, and the number of rows to train."""
    since_row = progress.step % progress.interval
    if not since_row:
        steps_left = progress.phase.last_iteration - progress.step
        return progress.interval, math.ceil(steps_left / progress.interval)
    executions = (progress.interval - since_row) / settings.steps_per_execution
    return math.ceil(executions) * settings.steps_per_execution, 1


def _verbosity(chief):
    """Returns Keras's `verbose`: a bar, a line per row, or nothing."""
    if not chief:
        return 0
    return 1 if sys.stdout.isatty() else 2


class _CSVLogger(Forgiving, keras.callbacks.CSVLogger):
    pass


class _TensorBoard(Forgiving, keras.callbacks.TensorBoard):
    pass


def _distributed(task, progress, settings, model):
    """Returns the training data from the position of `progress` on.

    Each worker reads its share of a batch and splits it among its replicas.
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
        # Keras warns at the end of a dataset of unknown length. The length is
        # unknown if records may be dropped.
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        return model.evaluate(dataset, verbose=0, return_dict=True)


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
    """Claims the model directory, or checks that the run owns it already."""
    wanted = {
        "task": task.name,
        "algorithm": settings.algorithm,
        "scale": settings.scale,
        "elastic": settings.elastic,
        "total_steps": settings.total_steps,
        "iterations": settings.iterations,
        "smoothing": settings.smoothing,
        "seed": settings.seed,
        "steps_per_row": interval,
        "schedule": task.schedule(settings.total_steps).get_config(),
    }
    # AdaScale: its averages and tau are in base batches at any scale, so the
    # scale may change when a run resumes.
    adaptive = settings.algorithm in algorithms.ADAPTIVE_ALGORITHMS
    may_change = set()
    if adaptive and not settings.elastic:
        may_change = {"scale", "steps_per_row"}
    # What a finished run was made with does not change any more.
    finished = os.path.exists(_path(settings, "result.json"))
    model_directory.claim(
        settings.model_dir,
        wanted,
        may_change=may_change,
        write=write and not finished,
    )


def _path(settings, name):
    return os.path.join(settings.model_dir, name)
