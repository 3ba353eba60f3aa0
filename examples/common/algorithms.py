"""AdaScale and the algorithms it is compared with: how each trains at S."""

from collections.abc import Callable
from typing import NamedTuple

import keras

import tf_adascale
from examples.common import elastic
from tf_adascale import schedules

# AdaScale: wrappers that measure how many base steps each step is worth.
ADAPTIVE_ALGORITHMS = {
    "adascale": tf_adascale.AdaScale,  # For SGD.
    "adamscale": tf_adascale.AdamScale,  # For Adam and similar optimizers.
}
ALGORITHMS = (
    "identity",
    "average",
    "linear",
    "sqrt",
    "lsw",
    "lsw_plus",
    *ADAPTIVE_ALGORITHMS,
    "adasum",
)
# The algorithms that are defined for a scale that changes during training.
ELASTIC_ALGORITHMS = ("lsw", *ADAPTIVE_ALGORITHMS)


class Plan(NamedTuple):
    """An algorithm at one scale, or at a sequence of scales.

    Attributes:
        optimizer: Keras optimizer.
        phases: tuple of `elastic.Phase`.
        callbacks: callable, phase to a list of Keras callbacks. They write to
            the logs and may end the phase before its last iteration.
    """

    optimizer: keras.optimizers.Optimizer
    phases: tuple
    callbacks: Callable[[elastic.Phase], list]

    @property
    def iterations(self):
        """Int, the largest number of steps that training can take."""
        return self.phases[-1].last_iteration


def plan(
    algorithm,
    schedule,
    *,
    scales,
    total_steps,
    make_optimizer,
    iterations=None,
    smoothing=None,
):
    """Returns how an algorithm trains at a scale.

    Args:
        algorithm: str, one of `ALGORITHMS`. "identity" keeps the schedule and
            the number of steps of the base batch. "average" compresses them
            to 1/S. "linear" and "sqrt" also multiply the rate by S or its
            root. "lsw" is linear scaling with warm-up, and "lsw_plus" is LSW
            stretched to `iterations`. "adascale" is the subject of this
            library, and "adamscale" is its form for Adam. "adasum" is
            "average", but Adasum combines the gradients of micro-batches and
            the updates of replicas.
        schedule: `LearningRateSchedule` of the base batch.
        scales: sequence of (fraction, scale), see `elastic.parse`. Only
            `ELASTIC_ALGORITHMS` accept more than one pair.
        total_steps: int >= 1, T_1, steps of training at the base batch.
        make_optimizer: callable, schedule to a new Keras optimizer.
        iterations: int, for "lsw_plus" only: the iterations AdaScale took.
        smoothing: float, for `ADAPTIVE_ALGORITHMS` only.

    Returns:
        `Plan`.

    Raises:
        ValueError: if the algorithm is unknown, `iterations` is missing for
            "lsw_plus" or given for another algorithm, or the scale changes and
            the algorithm does not support that.

    Example:

    >>> decay = keras.optimizers.schedules.ExponentialDecay(0.08, 1500, 0.01)
    >>> linear = plan("linear", decay, scales=[(0, 64)], total_steps=1500,
    ...               make_optimizer=keras.optimizers.SGD)
    >>> linear.iterations
    24

    Reference: Johnson et al. 2020, section 4; for "adasum", Maleki et al. 2020.
    """
    check(algorithm, iterations, scales)
    if algorithm in ADAPTIVE_ALGORITHMS:
        phases = tuple(
            # A gain is at least 1, so a phase takes at most its base steps.
            elastic.Phase(scale, end, end)
            for (_, scale), end in zip(
                scales, elastic.ends(scales, total_steps)
            )
        )
        return Plan(
            # AdaScale: wraps the optimizer and schedule of the base batch.
            ADAPTIVE_ALGORITHMS[algorithm](
                make_optimizer(schedule), smoothing=smoothing
            ),
            phases,
            lambda phase: [
                # AdaScale: writes the gain and tau to the logs.
                tf_adascale.callbacks.ScalingLog(),
                # AdaScale: ends training when the gains add up to the number
                # of steps at the base batch.
                tf_adascale.callbacks.StopAtScaleInvariantStep(phase.end),
            ],
        )

    phases = elastic.fixed_phases(scales, total_steps)
    scale = scales[0][1]
    if algorithm == "identity":
        phases = (elastic.Phase(scale, total_steps, total_steps),)
    elif algorithm in ("average", "adasum"):
        schedule = schedules.TimeScaling(schedule, scale=scale)
    elif algorithm == "linear":
        schedule = schedules.LinearScaling(schedule, scale=scale)
    elif algorithm == "sqrt":
        schedule = schedules.SqrtScaling(schedule, scale=scale)
    elif len(scales) > 1:
        schedule = elastic.LinearScalingWithWarmup(
            schedule, scales, total_steps=total_steps
        )
    else:
        schedule = schedules.LinearScalingWithWarmup(
            schedule,
            scale=scale,
            total_steps=total_steps,
            iterations=iterations,
        )
        phases = (elastic.Phase(scale, total_steps, schedule.iterations),)
    optimizer = make_optimizer(schedule)
    if algorithm == "adasum":
        optimizer = tf_adascale.Adasum(optimizer)
    return Plan(optimizer, phases, lambda phase: [LearningRateLog()])


def check(algorithm, iterations, scales=((0, 1),)):
    """Raises a ValueError unless `plan` accepts these arguments."""
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"`algorithm` must be one of {ALGORITHMS}. "
            f"Received: algorithm={algorithm!r}"
        )
    if (iterations is not None) != (algorithm == "lsw_plus"):
        raise ValueError(
            "`iterations` must be given for lsw_plus, and for no other "
            "algorithm. Use the iterations in the result.json of an AdaScale "
            f"run. Received: algorithm={algorithm!r}, iterations={iterations}"
        )
    if len(scales) > 1 and algorithm not in ELASTIC_ALGORITHMS:
        raise ValueError(
            f"`algorithm` must be one of {ELASTIC_ALGORITHMS} if the scale "
            f"changes during training. Received: algorithm={algorithm!r}, "
            f"scales={scales}"
        )


class LearningRateLog(keras.callbacks.Callback):
    """Writes the learning rate of a plain optimizer to the logs."""

    def on_train_batch_end(self, batch, logs=None):
        self._add(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._add(logs)

    def _add(self, logs):
        if logs is not None:
            logs["effective_learning_rate"] = float(
                keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
            )
