"""Compares the step time of AdaScale with plain SGD: `make bench`.

Runs on two logical CPU devices, with a wide MLP (many parameters and little
arithmetic, the hardest case for code that reads gradients) and ResNet-18.
README.md shows the output of a run.

All variants of a workload are in one process. They take turns of a few steps in
a rotating order, so that other load on the machine affects all of them. A ratio
is that of two turns in the same round. Medians and quartiles are over the
rounds. The benchmark measures wall time and the CPU time of all threads, which
excludes other processes. The ratio of a second plain SGD, `sgd_again`, is 1
apart from noise.

All steps use the same batch in memory, without an input pipeline. Peak memory
is measured first, in a separate process for each variant.
"""

import functools
import itertools
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from keras import layers

import tf_adascale
from examples.common import runs
from tf_adascale.distribute import collectives

NUM_REPLICAS = 2
NUM_CLASSES = 10
WARMUP_STEPS = 3
MEMORY_STEPS = 5


class Workload(NamedTuple):
    """A model and its batch.

    Attributes:
        connect: function from the input to the logits of `NUM_CLASSES` classes.
        input_shape: tuple of int, of one example.
        batch: int, examples per replica.
    """

    connect: Callable[[Any], Any]
    input_shape: tuple[int, ...]
    batch: int


class Variant(NamedTuple):
    """A way to train a workload.

    Attributes:
        model: the class of the model.
        optimizer: function that returns the optimizer.
        constants: dict, values that replace constants of
            `tf_adascale.distribute.collectives`.
    """

    model: Callable[..., keras.Model]
    optimizer: Callable[[], keras.optimizers.Optimizer]
    constants: Mapping[str, int] = {}


class Times(NamedTuple):
    """Times of the turns of one variant.

    Attributes:
        clock: float64 array (rounds,), wall seconds per step.
        processor: float64 array (rounds,), CPU seconds per step, all threads.
    """

    clock: np.ndarray
    processor: np.ndarray


class Trainer(NamedTuple):
    """A compiled model and a function that trains it for a number of steps."""

    model: keras.Model
    train: Callable[[int], None]


# Workloads.


def mlp(x):
    """Connects 3072-2048-2048-10: 10.5 million parameters."""
    for width in (2048, 2048):
        x = layers.Dense(width, activation="relu")(x)
    return layers.Dense(NUM_CLASSES)(x)


def resnet18(x):
    """Connects ResNet-18 v2 for 32x32 images: 11.2 million parameters.

    Reference: He et al., "Identity Mappings in Deep Residual Networks", 2016.
    """
    x = _convolution(64)(x)
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            strides = 2 if stage > 0 and block == 0 else 1
            activated = _activation(x)
            if strides > 1:
                x = _convolution(width, kernel=1, strides=strides)(activated)
            y = _convolution(width, strides=strides)(activated)
            y = _convolution(width)(_activation(y))
            x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling2D()(_activation(x))
    return layers.Dense(NUM_CLASSES)(x)


def _convolution(width, *, kernel=3, strides=1):
    return layers.Conv2D(
        width, kernel, strides=strides, padding="same", use_bias=False
    )


def _activation(x):
    return layers.ReLU()(layers.BatchNormalization()(x))


def sgd():
    """Returns SGD with momentum."""
    return keras.optimizers.SGD(1e-3, momentum=0.9)


def adascale():
    """Returns AdaScale around SGD with momentum."""
    return tf_adascale.AdaScale(sgd())


WORKLOADS = {
    "mlp": Workload(mlp, (3072,), 32),
    "resnet18": Workload(resnet18, (32, 32, 3), 8),
}

# The reference of the ratios.
BASELINE = "sgd"

VARIANTS = {
    "adascale": Variant(tf_adascale.Model, adascale),
    # TensorFlow's default: all values in one tensor.
    "adascale_one_pack": Variant(
        tf_adascale.Model, adascale, {"BYTES_PER_PACK": 0}
    ),
    "sgd": Variant(tf_adascale.Model, sgd),
    "sgd_again": Variant(tf_adascale.Model, sgd),
    "keras_sgd": Variant(keras.Model, sgd),
}


# Measurements.


def make_strategy(num_replicas=NUM_REPLICAS):
    """Returns a strategy of `num_replicas` logical CPU devices.

    Call this before TensorFlow initializes its devices.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * num_replicas
    )
    return tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(num_replicas)]
    )


def make_batch(workload, strategy):
    """Returns a batch of random examples and labels, one part per replica."""
    rng = np.random.default_rng(0)

    def part(context):
        del context  # Parts differ because they share the generator.
        x = rng.standard_normal((workload.batch, *workload.input_shape))
        y = rng.integers(NUM_CLASSES, size=workload.batch)
        return tf.constant(x, "float32"), tf.constant(y, "int32")

    return strategy.experimental_distribute_values_from_function(part)


def make_trainer(workload, variant, strategy, batch):
    """Returns a `Trainer` that is compiled: it has taken `WARMUP_STEPS`."""
    with strategy.scope():
        inputs = keras.Input(workload.input_shape)
        model = variant.model(inputs, workload.connect(inputs))
        model.compile(
            optimizer=variant.optimizer(),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )
        model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    batches = itertools.repeat(batch)

    def train(steps):
        logs = {}
        for _ in range(steps):
            logs = model.train_function(batches)
        float(logs["loss"])  # Waits for the step.

    with mock.patch.dict(vars(collectives), variant.constants):
        train(WARMUP_STEPS)  # Tracing reads the constants.
    return Trainer(model, train)


def interleaved(trainers, *, rounds, steps, on_round):
    """Returns the `Times` of each trainer.

    Args:
        trainers: dict of functions of a number of steps.
        rounds: int >= 1, turns of each trainer.
        steps: int >= 1, steps per turn.
        on_round: function that is called after each round.
    """
    times = {
        name: Times(np.zeros(rounds), np.zeros(rounds)) for name in trainers
    }
    names = list(trainers)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            clock, processor = time.perf_counter(), time.process_time()
            trainers[name](steps)
            times[name].clock[index] = time.perf_counter() - clock
            times[name].processor[index] = time.process_time() - processor
        on_round()
    return {
        name: Times(*(seconds / steps for seconds in taken))
        for name, taken in times.items()
    }


def state_bytes(optimizer):
    """Returns the bytes of an optimizer's variables, on one device."""
    return sum(
        int(np.prod(variable.shape)) * tf.as_dtype(variable.dtype).size
        for variable in optimizer.variables
    )


def peak_memory(workload, variant, *, num_replicas=NUM_REPLICAS):
    """Returns the peak resident bytes of a process that trains one variant.

    Args:
        workload: `Workload`.
        variant: `Variant`.
        num_replicas: int.
    """
    # On Linux, children inherit the peak of their parent. Call this before this
    # process trains.
    return runs.alone(_trained_peak, workload, variant, num_replicas)


def _trained_peak(workload, variant, num_replicas):
    strategy = make_strategy(num_replicas)
    batch = make_batch(workload, strategy)
    make_trainer(workload, variant, strategy, batch).train(MEMORY_STEPS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# The report.


def table(times, models, memory):
    """Returns the lines of a workload's table.

    Args:
        times: dict of `Times`, see `interleaved`.
        models: dict of models with the same keys.
        memory: dict of peak resident bytes, possibly empty.
    """
    lines = [
        f"{'':18}{'clock ms':>10}{'over sgd':>24}{'CPU ms':>10}"
        f"{'over sgd':>24}{'peak MiB':>10}{'state bytes':>13}"
    ]
    for name, taken in times.items():
        cells = [f"{name:18}"]
        for seconds, reference in zip(taken, times[BASELINE]):
            cells.append(f"{1000 * np.median(seconds):10.1f}")
            cells.append(f"{quartiles(seconds / reference):>24}")
        peak = f"{memory[name] / 2**20:.0f}" if name in memory else "-"
        cells.append(f"{peak:>10}{state_bytes(models[name].optimizer):13,}")
        lines.append("".join(cells))
    return lines


def quartiles(ratios):
    """Returns a str of the median and, in parentheses, the quartiles."""
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return f"{median:.3f} ({low:.3f}-{high:.3f})"


def timed(workload, variants, strategy, *, rounds, steps):
    """Returns the `Times` and the models of a dict of variants.

    Args:
        workload: `Workload`.
        variants: dict of `Variant`.
        strategy: see `make_strategy`.
        rounds: see `interleaved`.
        steps: see `interleaved`.
    """
    # Only once: a new seed clears TensorFlow's cache of kernels.
    keras.utils.set_random_seed(0)
    batch = make_batch(workload, strategy)
    trainers = {
        name: make_trainer(workload, variant, strategy, batch)
        for name, variant in variants.items()
    }
    progress = keras.utils.Progbar(rounds, unit_name="round")
    times = interleaved(
        {name: trainer.train for name, trainer in trainers.items()},
        rounds=rounds,
        steps=steps,
        on_round=functools.partial(progress.add, 1),
    )
    return times, {name: trainer.model for name, trainer in trainers.items()}


def measure(name, strategy, *, memory, rounds, steps):
    """Measures all variants of a workload and prints the table."""
    workload = WORKLOADS[name]
    times, models = timed(
        workload, VARIANTS, strategy, rounds=rounds, steps=steps
    )
    count = models[BASELINE].count_params() / 1e6
    print(
        f"\n{name}: {count:.1f}M parameters, {NUM_REPLICAS} replicas of "
        f"{workload.batch} examples, {rounds} rounds of {steps} steps"
    )
    print("\n".join(table(times, models, memory)), flush=True)


BLOCKS = flags.DEFINE_integer(
    "blocks", 30, "Rounds. In each round, every variant has a turn.", 1
)
STEPS = flags.DEFINE_integer("steps", 3, "Steps per turn.", 1)
MODELS = flags.DEFINE_multi_enum(
    "models", list(WORKLOADS), list(WORKLOADS), "Workloads; repeatable."
)
MEMORY = flags.DEFINE_bool("memory", True, "Whether to measure memory.")


def main(arguments):
    """Measures and prints the tables."""
    if len(arguments) > 1:
        raise app.UsageError(f"Unknown arguments: {arguments[1:]}")
    # TensorFlow logs each all-reduce and warns about many models.
    logging.set_verbosity(logging.ERROR)
    memory = {name: {} for name in MODELS.value}
    if MEMORY.value:
        for name, variant in itertools.product(MODELS.value, VARIANTS):
            print(f"memory of {name}, {variant}", flush=True)
            memory[name][variant] = peak_memory(
                WORKLOADS[name], VARIANTS[variant]
            )
    strategy = make_strategy()
    for name in MODELS.value:
        measure(
            name,
            strategy,
            memory=memory[name],
            rounds=BLOCKS.value,
            steps=STEPS.value,
        )


if __name__ == "__main__":
    app.run(main)
