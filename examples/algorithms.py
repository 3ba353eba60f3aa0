"""AdaScale and what it is compared with: how each trains at a scale."""

from collections.abc import Callable
from typing import NamedTuple

import keras

import tf_adascale
from examples import elastic
from tf_adascale import schedules

# Those that measure how many base steps a step is worth: what they are in terms
# of `tf_adascale.AdaScale`.
ADAPTIVE_ALGORITHMS = {
    "adascale": {},
    # For Adam and its like.
    "adamscale": {"power": 0.5, "preconditioned": True},
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
# Those that are defined for a scale that changes while training.
ELASTIC_ALGORITHMS = ("lsw", *ADAPTIVE_ALGORITHMS)


class Plan(NamedTuple):
    """An algorithm at one scale, or at one after another.

    Attributes:
        optimizer: Keras optimizer.
        phases: tuple of `elastic.Phase`.
        callbacks: callable, phase to a list of Keras callbacks: what adds to
            the logs, what ends the phase before its last iteration.
    """

    optimizer: keras.optimizers.Optimizer
    phases: tuple
    callbacks: Callable[[elastic.Phase], list]

    @property
    def iterations(self):
        """Int, number of steps that training lasts, or lasts at most."""
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
        algorithm: str, one of `ALGORITHMS`: "identity" takes the base batch's
            schedule and steps unchanged; "linear" and "sqrt" are scaling rules;
            "lsw" is linear scaling with warm-up, "lsw_plus" the same stretched
            to `iterations`; "adascale" is the library's subject, "adamscale"
            its form for Adam and the like; "adasum" combines the updates of the
            micro-batches and replicas, at the rates of "average", which are the
            base batch's, S times as fast.
        schedule: `LearningRateSchedule` of the base batch.
        scales: sequence of (fraction, scale), see `elastic.parse`: one pair
            (0, S), or several for `ELASTIC_ALGORITHMS`.
        total_steps: int >= 1, T_1, steps of training at the base batch.
        make_optimizer: callable, schedule to a new Keras optimizer.
        iterations: int, for "lsw_plus" only: those that AdaScale took.
        smoothing: float, AdaScale's; other algorithms have none.

    Returns:
        `Plan`.

    Raises:
        ValueError: if the algorithm is unknown, or "lsw_plus" lacks
            `iterations` or another algorithm has them, or the algorithm has no
            form for a scale that changes.

    Example:

    >>> decay = keras.optimizers.schedules.ExponentialDecay(0.08, 1500, 0.01)
    >>> linear = plan("linear", decay, scales=[(0, 64)], total_steps=1500,
    ...               make_optimizer=keras.optimizers.SGD)
    >>> linear.iterations
    24

    Reference: Johnson et al. 2020, section 4; of "adasum", Maleki et al. 2020.
    """
    check(algorithm, iterations, scales)
    if algorithm in ADAPTIVE_ALGORITHMS:
        phases = tuple(
            # At most: a gain is at least 1.
            elastic.Phase(scale, end, end)
            for (_, scale), end in zip(
                scales, elastic.ends(scales, total_steps)
            )
        )
        return Plan(
            # AdaScale: around the optimizer and the schedule of the base batch,
            # both as they are.
            tf_adascale.AdaScale(
                make_optimizer(schedule),
                smoothing=smoothing,
                **ADAPTIVE_ALGORITHMS[algorithm],
            ),
            phases,
            lambda phase: [
                # AdaScale: puts the gain and tau into the logs.
                tf_adascale.callbacks.ScalingLog(),
                # AdaScale: training is over when the gains add up to the number
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
    """Raises a ValueError unless `plan` takes these arguments."""
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"The algorithm is not known. Expected one of {ALGORITHMS}. "
            f"Received: algorithm={algorithm!r}"
        )
    if (iterations is not None) != (algorithm == "lsw_plus"):
        raise ValueError(
            "Only lsw_plus is stretched to a number of iterations, and it "
            "needs one. Expected iterations with lsw_plus (those that "
            "adascale took, in its result.json) and with no other algorithm. "
            "Received: "
            f"algorithm={algorithm!r}, iterations={iterations}"
        )
    if len(scales) > 1 and algorithm not in ELASTIC_ALGORITHMS:
        raise ValueError(
            "The algorithm has no form for a scale that changes. Expected one "
            f"of {ELASTIC_ALGORITHMS}. Received: algorithm={algorithm!r}, "
            f"scales={scales}"
        )


class LearningRateLog(keras.callbacks.Callback):
    """Puts the learning rate of a plain optimizer into the logs."""

    def on_train_batch_end(self, batch, logs=None):
        self._add(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._add(logs)

    def _add(self, logs):
        if logs is not None:
            logs["learning_rate"] = float(
                keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
            )
