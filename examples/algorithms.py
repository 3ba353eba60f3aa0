"""AdaScale and the rules it is compared with: how each trains at a scale."""

from typing import NamedTuple

import keras

import tf_adascale
from tf_adascale import schedules

ALGORITHMS = ("identity", "linear", "sqrt", "lsw", "lsw_plus", "adascale")


class Plan(NamedTuple):
    """An algorithm at one scale.

    Attributes:
        optimizer: Keras optimizer.
        iterations: int, number of steps that training lasts, or lasts at most
            where a callback ends it.
        callbacks: list of Keras callbacks: what adds to the logs, what stops.
    """

    optimizer: keras.optimizers.Optimizer
    iterations: int
    callbacks: list


def plan(
    algorithm, schedule, *, scale, total_steps, make_optimizer, iterations=None
):
    """Returns how an algorithm trains at a scale.

    Args:
        algorithm: str, one of `ALGORITHMS`: "identity" takes the base batch's
            schedule and steps unchanged; "linear" and "sqrt" are scaling rules;
            "lsw" is linear scaling with warm-up, "lsw_plus" the same stretched
            to `iterations`; "adascale" is the library's subject.
        schedule: `LearningRateSchedule` of the base batch.
        scale: int >= 1, S.
        total_steps: int >= 1, T_1, steps of training at the base batch.
        make_optimizer: callable, schedule to a new Keras optimizer.
        iterations: int, for "lsw_plus" only: those that AdaScale took.

    Returns:
        `Plan`.

    Raises:
        ValueError: if the algorithm is unknown, or "lsw_plus" lacks
            `iterations` or another algorithm has them.

    Example:

    >>> decay = keras.optimizers.schedules.ExponentialDecay(0.08, 1500, 0.01)
    >>> linear = plan("linear", decay, scale=64, total_steps=1500,
    ...               make_optimizer=keras.optimizers.SGD)
    >>> linear.iterations
    24

    Reference: Johnson et al. 2020, section 4.
    """
    check(algorithm, iterations)
    if algorithm == "adascale":
        return Plan(
            # AdaScale: around the optimizer and the schedule of the base batch,
            # both as they are.
            tf_adascale.AdaScale(make_optimizer(schedule)),
            total_steps,
            [
                # AdaScale: puts the gain and tau into the logs.
                tf_adascale.callbacks.ScalingLog(),
                # AdaScale: training is over when the gains add up to the number
                # of steps at the base batch.
                tf_adascale.callbacks.StopAtScaleInvariantStep(total_steps),
            ],
        )
    if algorithm == "identity":
        iterations = total_steps
    elif algorithm == "linear":
        schedule = schedules.LinearScaling(schedule, scale=scale)
    elif algorithm == "sqrt":
        schedule = schedules.SqrtScaling(schedule, scale=scale)
    else:
        schedule = schedules.LinearScalingWithWarmup(
            schedule,
            scale=scale,
            total_steps=total_steps,
            iterations=iterations,
        )
    if iterations is None:
        iterations = schedules.scaled_iterations(total_steps, scale=scale)
    return Plan(make_optimizer(schedule), iterations, [LearningRateLog()])


def check(algorithm, iterations):
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
