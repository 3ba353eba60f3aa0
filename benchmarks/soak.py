"""Trains for many steps and checks that no cost grows: `make soak`.

Workers of a `MultiWorkerMirroredStrategy` train a small model with `fit`, with
micro-batches, XLA and one step per execution. README.md shows the output of a
run. Three findings must hold for each worker:

Step time   The median of the last thousand steps is at most 5 % above that of
            the first thousand, plus twice the standard error of such a ratio.
            The standard error is estimated from differences of successive
            thousands. A mean would depend on the few steps in which the machine
            was busy. The first hundred steps trace and compile graphs, so they
            do not count.
Memory      Resident memory grows by less than 100 bytes per step over the
            second half, plus the bytes that TensorFlow's collectives keep of
            each execution. Bare all-reduces after training measure these. They
            differ by a tenth between workers, and are zero for one worker,
            which is the sharper test. Both growths are slopes of least squares,
            and may differ by twice their standard errors.
tau         The scale-invariant step is exactly the sum of the gains in the
            logs. A gain in [1, 2^24) is a multiple of 2^-23, and so is tau. A
            float64 represents such numbers exactly up to 2^30.

    python -m benchmarks.soak --steps=20000 --workers=2 --out=out/soak

The command writes a file steps-0.csv with a row per step of worker 0, one such
file for each worker, and soak.png. It exits with code 1 if a finding fails.
"""

import argparse
import csv
import math
import os
import pathlib
import resource
import sys
import time
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib import ticker

import tf_adascale
from examples import launch
from examples.common import figures
from tf_adascale.distribute import collectives

MICROBATCHES = 2
BASE_BATCH = 8
FEATURES = 32
EXAMPLES = 4096

WARMUP_STEPS = 100
WINDOW = 1000
MEMORY_INTERVAL = 100
# A training step has two: the gradients, and the mean of the loss.
ALL_REDUCES = 2
MAX_DRIFT = 0.05
MAX_BYTES_PER_STEP = 100
# Seconds that a worker waits for the others at its end.
MAX_WAIT = 60
# Relative difference between workers of the bytes that bare all-reduces keep.
SPREAD = 0.1

COLUMNS = ("step", "clock", "processor", "gain", "tau", "resident")


class Finding(NamedTuple):
    """A finding in words, and whether it holds."""

    text: str
    holds: bool


# A worker.


class Recorder(keras.callbacks.Callback):
    """Writes a CSV row per step: seconds, gain, tau, resident bytes.

    List it after `tf_adascale.callbacks.ScalingLog`.

    Args:
        path: str.
    """

    def __init__(self, path):
        super().__init__()
        self._path = path

    def on_train_begin(self, logs=None):
        """Opens the file. Rows kept in memory would make the process grow."""
        self._file = open(self._path, "w", newline="")  # noqa: SIM115
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)
        self._step = 0
        self._last = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, batch, logs):
        """Writes the row of a step."""
        now = time.perf_counter(), time.process_time()
        self._step += 1
        read = self._step % MEMORY_INTERVAL == 0
        self._writer.writerow(
            (
                self._step,
                *(new - old for new, old in zip(now, self._last)),
                logs["gain"],
                logs["scale_invariant_step"],
                resident_bytes() if read else math.nan,
            )
        )
        self._last = now

    def on_train_end(self, logs=None):
        """Closes the file."""
        self._file.close()


def resident_bytes():
    """Returns the resident memory of this process, on Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def make_model(num_steps):
    """Returns a model that is compiled for a number of steps."""
    inputs = keras.Input((FEATURES,))
    hidden = layers.Dense(64, activation="relu")(inputs)
    model = tf_adascale.Model(inputs, layers.Dense(1)(hidden))
    schedule = keras.optimizers.schedules.ExponentialDecay(
        0.01, decay_steps=num_steps, decay_rate=0.1
    )
    model.compile(
        tf_adascale.AdaScale(keras.optimizers.SGD(schedule, momentum=0.9)),
        loss="mse",
        jit_compile=True,
        microbatches=MICROBATCHES,
    )
    return model


def make_dataset(num_replicas):
    """Returns endless batches of a linear function plus as much noise."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EXAMPLES, FEATURES)).astype("float32")
    noise = rng.standard_normal(EXAMPLES)
    y = (x.mean(axis=1) * FEATURES**0.5 + noise).astype("float32")
    batch = BASE_BATCH * MICROBATCHES * num_replicas
    return tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(batch)


def train(out, num_steps):
    """Trains as a worker of TF_CONFIG, then runs bare all-reduces."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = make_model(num_steps)
    index = strategy.cluster_resolver.task_id
    done = [
        pathlib.Path(out, f"done-{worker}")
        for worker in range(strategy.num_replicas_in_sync)
    ]
    done[index].unlink(missing_ok=True)
    model.fit(
        make_dataset(strategy.num_replicas_in_sync),
        epochs=num_steps // WINDOW,
        steps_per_epoch=WINDOW,
        callbacks=[
            tf_adascale.callbacks.ScalingLog(),
            Recorder(_steps_path(out, index)),
        ],
        shuffle=False,
        verbose=2 if index == 0 else 0,
    )
    all_reduce(strategy, num_steps // 2, _bare_path(out, index))
    # A worker that exits fails those that still receive from it.
    done[index].touch()
    deadline = time.monotonic() + MAX_WAIT
    while time.monotonic() < deadline and not all(
        path.exists() for path in done
    ):
        time.sleep(0.05)


def all_reduce(strategy, num_steps, path):
    """Executes only all-reduces and writes the resident bytes to a CSV."""

    @tf.function(autograph=False)
    def execute():
        def of_replica():
            value = tf.zeros(())
            for _ in range(ALL_REDUCES):
                (value,) = collectives.total([value])
            return value

        return strategy.run(of_replica)

    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "resident"))
        for step in range(1, num_steps + 1):
            # Waits for the step, like a callback that reads the logs.
            float(strategy.experimental_local_results(execute())[0])
            if step % MEMORY_INTERVAL == 0:
                writer.writerow((step, resident_bytes()))


def _steps_path(out, index):
    return os.path.join(out, f"steps-{index}.csv")


def _bare_path(out, index):
    return os.path.join(out, f"all-reduces-{index}.csv")


# The report.


def slope(x, y):
    """Returns the slope of least squares and its standard error.

    Args:
        x: float array (n,), n > 2.
        y: float array (n,).
    """
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    return float(coefficients[0]), float(covariance[0, 0] ** 0.5)


def windows(rows):
    """Returns the rows of the first and of the last steps that count."""
    counted = rows[WARMUP_STEPS:]
    size = min(WINDOW, len(counted) // 2)
    return counted[:size], counted[-size:]


def step_time(rows):
    """Returns the `Finding` about the step time in rows of `Recorder`."""
    first, last = windows(rows)
    ratios = [
        float(statistic(last[column]) / statistic(first[column]))
        for column, statistic in (
            ("clock", np.median),
            ("clock", np.mean),
            ("processor", np.mean),
        )
    ]
    noise = ratio_error(rows)
    return Finding(
        "step time: last {} steps / first {}: median {:.3f} (standard error "
        "{:.3f}); mean {:.3f}, the processor's {:.3f}".format(
            len(last), len(first), ratios[0], noise, *ratios[1:]
        ),
        ratios[0] - 1 <= MAX_DRIFT + 2 * noise,
    )


def ratio_error(rows):
    """Returns the standard error of the ratio of two thousands' median times.

    If the medians of thousands scatter by s about a slow drift, the difference
    of successive ones has the deviation 1.4142 s. So does a ratio of two near
    1. Half of these differences are below 0.6745 deviations.
    """
    parts = [rows[i : i + WINDOW] for i in range(0, len(rows), WINDOW)]
    medians = np.array([np.median(part["clock"]) for part in parts])
    if len(medians) < 3:
        return 0.0
    differences = np.abs(np.diff(medians)) / np.mean(medians)
    return float(np.median(differences)) / 0.6745


def growth(rows):
    """Returns the `slope` of resident bytes over steps in the second half.

    Args:
        rows: structured array with columns `step` and `resident`, which is nan
            in steps that did not read it.
    """
    half = rows[len(rows) // 2 :]
    read = half[np.isfinite(half["resident"])]
    return slope(read["step"], read["resident"])


def memory(rows, bare):
    """Returns the `Finding` about the resident memory.

    Args:
        rows: the rows of `Recorder`.
        bare: the rows of `all_reduce`.
    """
    (found, error), (expected, its_error) = growth(rows), growth(bare)
    noise = 2 * math.hypot(error, its_error) + SPREAD * abs(expected)
    return Finding(
        f"memory: {found:+.1f} bytes a step (standard error {error:.1f}), "
        f"bare all-reduces {expected:+.1f} ({its_error:.1f})",
        found - expected < MAX_BYTES_PER_STEP + noise,
    )


def tau(rows):
    """Returns the `Finding` about the scale-invariant step."""
    found, total = float(rows["tau"][-1]), math.fsum(rows["gain"])
    return Finding(
        f"tau: {found!r}, minus the sum of {len(rows)} gains: "
        f"{found - total!r}",
        found == total,
    )


def table(rows):
    """Returns the lines of a table with a line per thousand steps."""
    lines = ["    steps   median ms   mean ms   CPU ms    mean gain       MiB"]
    for begin in range(0, len(rows), WINDOW):
        part = rows[begin : begin + WINDOW]
        clock, processor = 1000 * part["clock"], 1000 * part["processor"]
        lines.append(
            f"{int(part['step'][-1]):9}{np.median(clock):12.2f}"
            f"{np.mean(clock):10.2f}{np.mean(processor):9.2f}"
            f"{np.mean(part['gain']):13.3f}"
            f"{np.nanmean(part['resident']) / 2**20:10.1f}"
        )
    return lines


def picture(workers, path):
    """Draws each worker's step time and memory over the steps, and saves it."""
    page, ((times, memories),) = figures.page(1, 2, size=(9, 3.4))
    for index, rows in enumerate(workers):
        step = rows["step"]
        begins = range(WARMUP_STEPS, len(rows), WARMUP_STEPS)
        parts = [rows["clock"][i : i + WARMUP_STEPS] for i in begins]
        times.plot(
            [step[i] for i in begins],
            [1000 * np.median(part) for part in parts],
            label=f"worker {index}",
        )
        read = np.isfinite(rows["resident"])
        memories.plot(step[read], rows["resident"][read] / 2**20)
    times.set(
        xlabel="steps", ylabel="ms per step, median of 100", ylim=(0, None)
    )
    memories.set(xlabel="steps", ylabel="resident MiB", ylim=(0, None))
    times.legend(frameon=False)
    for panel in (times, memories):
        panel.xaxis.set_major_locator(ticker.MaxNLocator(5))
        panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    page.savefig(path, dpi=110)


def report(out, num_workers):
    """Prints tables and findings, and draws the figure.

    Args:
        out: str, the directory that the workers wrote to.
        num_workers: int.

    Returns:
        Bool, whether all findings hold.
    """
    workers, findings = [], []
    for index in range(num_workers):
        rows, bare = (
            np.genfromtxt(path(out, index), delimiter=",", names=True)
            for path in (_steps_path, _bare_path)
        )
        print(f"\nworker {index}")
        print("\n".join(table(rows)))
        for finding in (step_time(rows), memory(rows, bare), tau(rows)):
            print(f"{'holds' if finding.holds else 'FAILS'}  {finding.text}")
            findings.append(finding)
        workers.append(rows)
    path = os.path.join(out, "soak.png")
    picture(workers, path)
    print(f"\n{path}", flush=True)
    return all(finding.holds for finding in findings)


def main(arguments=None):
    """Starts the workers, reports, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="out/soak", help="directory")
    parser.add_argument(
        "--is_worker", action="store_true", help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    if options.steps < WINDOW or options.steps % WINDOW:
        parser.error(f"--steps must be a multiple of {WINDOW}")
    if options.workers < 1:
        parser.error("--workers must be 1 or more")
    os.makedirs(options.out, exist_ok=True)
    if options.is_worker:
        train(options.out, options.steps)
        return 0
    flags = [f"--steps={options.steps}", f"--out={options.out}", "--is_worker"]
    code = launch.launch(["benchmarks.soak", *flags], workers=options.workers)
    if code:
        return code
    return 0 if report(options.out, options.workers) else 1


if __name__ == "__main__":
    sys.exit(main())
