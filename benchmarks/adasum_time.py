"""Compares the step time of Adasum with plain summation.

Runs SGD with momentum, which sums the gradients of the replicas, and Adasum
around it, on 2, 4 and 8 logical CPU devices. Nearly all of the model is one
variable. Each number of replicas has its own process, in which the variants
take turns like in `benchmarks.step_time`. README.md shows the output of a run.

Each variant's transient memory, the memory that only a step needs, is measured
in a separate process, in copies of the model per replica. These processes
return large tensors to the system at once, so that allocators do not matter.

The bytes that a replica receives are counted while a step is traced. An
all-gather of N replicas receives the N - 1 parts of the others, and a ring
all-reduce receives 2 (N - 1) / N of the values.
"""

import os
from typing import NamedTuple
from unittest import mock

import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from keras import layers

import tf_adascale
from benchmarks import step_time
from examples.common import runs

# These settings return large tensors to the system at once: the allocator of
# oneDNN does not, and glibc does only above this size.
NOTHING_KEPT = {
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
}

BASELINE = step_time.BASELINE
MEBIBYTE = 2**20


class Measured(NamedTuple):
    """Measurements of some variants with one number of replicas.

    Attributes:
        times: dict of `step_time.Times`.
        received: dict of float, bytes that a replica receives per step.
        model: int, bytes of the weights.
    """

    times: dict[str, step_time.Times]
    received: dict[str, float]
    model: int


def wide(x):
    """Connects 3200-3200-10: 10.3 million parameters, 41 MB."""
    x = layers.Dense(3200, activation="relu")(x)
    return layers.Dense(step_time.NUM_CLASSES)(x)


WORKLOAD = step_time.Workload(wide, (3200,), 32)


def updates():
    """Returns Adasum of the updates of SGD with momentum."""
    return tf_adascale.Adasum(step_time.sgd())


def gradients():
    """Returns Adasum of the gradients, for SGD with momentum."""
    return tf_adascale.Adasum(step_time.sgd(), combine="gradients")


VARIANTS = {
    BASELINE: step_time.VARIANTS[BASELINE],
    "sgd_again": step_time.VARIANTS["sgd_again"],
    "updates": step_time.Variant(tf_adascale.Model, updates),
    "gradients": step_time.Variant(tf_adascale.Model, gradients),
}
# Values that replace `collectives.BYTES_PER_GATHER`.
GATHERS = {
    f"updates, {size} MiB": step_time.Variant(
        tf_adascale.Model, updates, {"BYTES_PER_GATHER": size * MEBIBYTE}
    )
    for size in (1, 16)
}


# Measurements.


def transient_memory(workload, variant, num_replicas):
    """Returns the resident bytes at the peak of a step, minus those before it.

    Works on Linux only. Call it in a separate process, see `runs.alone`.
    """
    strategy = step_time.make_strategy(num_replicas)
    batch = step_time.make_batch(workload, strategy)
    trainer = step_time.make_trainer(workload, variant, strategy, batch)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Resets the peak.
    trainer.train(1)
    return _status("VmHWM") - before


def _status(name):
    """Returns a number of bytes from the status of this process, on Linux."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return 1024 * int(fields[name].split()[0])


def measured(workload, variants, num_replicas, *, rounds, steps):
    """Returns `Measured`. Call this before TensorFlow initializes devices."""
    logging.set_verbosity(logging.ERROR)  # TensorFlow logs each all-reduce.
    strategy = step_time.make_strategy(num_replicas)
    times, models = step_time.timed(
        workload, variants, strategy, rounds=rounds, steps=steps
    )
    batch = step_time.make_batch(workload, strategy)
    return Measured(
        times,
        {
            name: received(model, strategy, batch)
            for name, model in models.items()
        },
        4 * models[BASELINE].count_params(),
    )


def received(model, strategy, batch):
    """Returns the bytes that a replica receives in one step of a model."""
    count = strategy.num_replicas_in_sync
    total = 0.0

    def counting(method, parts):
        def call(context, *arguments, **options):
            nonlocal total
            for value in tf.nest.flatten(arguments[-1]):
                size = value.shape.num_elements() * value.dtype.size
                total += parts * size / count  # Each replica calls this.
            return method(context, *arguments, **options)

        return call

    context = tf.distribute.ReplicaContext
    others = count - 1
    with mock.patch.multiple(
        context,
        all_gather=counting(context.all_gather, others),
        all_reduce=counting(context.all_reduce, 2 * others / count),
    ):
        tf.function(
            lambda: strategy.run(model.train_step, (batch,)), autograph=False
        ).get_concrete_function()
    return total


# The report.


def table(found, memory, num_replicas):
    """Returns the lines of a table.

    Args:
        found: `Measured`.
        memory: dict of transient bytes of all replicas, possibly empty.
        num_replicas: int.
    """
    lines = [
        f"{'':18}{'clock ms':>10}{'over sgd':>24}{'CPU ms':>10}"
        f"{'over sgd':>24}{'received':>10}{'transient':>10}"
    ]
    for name, taken in found.times.items():
        cells = [f"{name:18}"]
        for seconds, reference in zip(taken, found.times[BASELINE]):
            cells.append(f"{1000 * np.median(seconds):10.1f}")
            cells.append(f"{step_time.quartiles(seconds / reference):>24}")
        cells.append(f"{found.received[name] / found.model:10.2f}")
        if name in memory:
            copies = memory[name] / num_replicas / found.model
            cells.append(f"{copies:10.2f}")
        else:
            cells.append(f"{'-':>10}")
        lines.append("".join(cells))
    return lines


flags.set_default(step_time.BLOCKS, 10)
flags.set_default(step_time.STEPS, 1)
REPLICAS = flags.DEFINE_multi_integer(
    "num_replicas",
    [2, 4, 8],
    "Number of replicas; repeatable. All variants run with the last one.",
)


def main(arguments):
    """Measures and prints the tables."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unknown arguments: {arguments[1:]}")
    for num_replicas in REPLICAS.value:
        variants = VARIANTS
        if num_replicas == REPLICAS.value[-1]:
            variants = {**VARIANTS, **GATHERS}
        memory = {}
        for name, variant in variants.items():
            if step_time.MEMORY.value and name != "sgd_again":
                with mock.patch.dict(os.environ, NOTHING_KEPT):
                    memory[name] = runs.alone(
                        transient_memory, WORKLOAD, variant, num_replicas
                    )
        found = runs.alone(
            measured,
            WORKLOAD,
            variants,
            num_replicas,
            rounds=step_time.BLOCKS.value,
            steps=step_time.STEPS.value,
        )
        print(
            f"\n{found.model / 1e6:.0f} MB of weights, {num_replicas} replicas "
            f"of {WORKLOAD.batch} examples, {step_time.BLOCKS.value} rounds of "
            f"{step_time.STEPS.value} steps"
        )
        print("\n".join(table(found, memory, num_replicas)), flush=True)


if __name__ == "__main__":
    app.run(main)
