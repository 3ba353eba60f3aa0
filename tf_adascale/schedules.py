"""Learning-rate schedules of the fixed scaling rules, AdaScale's baselines.

A scaling rule adapts a learning-rate schedule lr, tuned at a base batch size,
to a batch S times as large. S is the scale.

Each class wraps lr and is an ordinary, serializable Keras schedule. Its
argument t counts the optimizer's iterations at scale S. Where training at the
base batch takes T_1 steps, every rule trains for T_S = ceil(T_1 / S)
iterations, see `scaled_iterations`. Only LSW+ takes a number of iterations of
its own.

The wrapped schedule is called with S t, a `keras.Variable` like the one that
Keras passes. It is an int64 if S t is whole for every t, else a float64. Both
are exact far beyond 2^24, where a float32 is not.
"""

import fractions
import math
from typing import Any

import keras
import tensorflow as tf

from tf_adascale.ops import _arguments, _keras

__all__ = [
    "LegwScaling",
    "LinearScaling",
    "LinearScalingWithWarmup",
    "SqrtScaling",
    "TimeScaling",
    "scaled_iterations",
]

_FAMILIES = ("step", "exponential")


def scaled_iterations(total_steps: int, *, scale: float) -> int:
    """Returns the number of iterations that training takes at a scale.

        T_S = ceil(T_1 / S)                                                 (1)

    Args:
        total_steps: int >= 1, T_1, steps of training at the base batch size.
        scale: number > 0, S, batch of one step / base batch.

    Returns:
        Int >= 1.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> scaled_iterations(1500, scale=64)  # 23.4 rounded up
    24

    Reference: Johnson et al. 2020, definition 3.
    """
    total_steps = _arguments.integer("total_steps", total_steps)
    return math.ceil(total_steps / _exact(_arguments.scale(scale)))


class _ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Base class of all rules: holds lr and S. A rule defines `_rate(step)`."""

    def __init__(
        self,
        schedule: keras.optimizers.schedules.LearningRateSchedule | float,
        *,
        scale: float,
    ):
        super().__init__()
        _keras.check_backend()
        self.schedule = _checked_schedule(schedule)
        self.scale = _arguments.scale(scale)
        self._base_steps_per_iteration = _exact(self.scale)

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the learning rate of an iteration.

        Args:
            step: scalar, t, the iteration from 0 on.

        Returns:
            Scalar float32.
        """
        step = tf.convert_to_tensor(step)
        is_whole = step.dtype.is_integer
        return self._rate(tf.cast(step, tf.int64 if is_whole else tf.float64))

    def _rate(self, step):
        """Returns lr_S(t), scalar float32; `step` is an int64 or float64."""
        raise NotImplementedError

    def _base_rate(self, step):
        """Returns lr at the base step of an iteration, scalar float32."""
        pace = self._base_steps_per_iteration
        if pace.denominator == 1:
            base_step = step * pace.numerator
        else:
            # An exact product and one rounding keep whole steps whole.
            base_step = tf.cast(step, tf.float64) * pace.numerator
            base_step = base_step / pace.denominator
        if not callable(self.schedule):
            return tf.constant(self.schedule, tf.float32)
        return tf.cast(self.schedule(_keras.Step(base_step)), tf.float32)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, for `from_config`."""
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "scale": self.scale,
        }

    @classmethod
    def from_config(cls, config):
        """Creates a schedule from what `get_config` returned."""
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(**{**config, "schedule": schedule})


@keras.saving.register_keras_serializable(package="tf_adascale")
class LinearScaling(_ScaledSchedule):
    """The linear scaling rule.

        lr_S(t) = S lr(S t)                                                 (2)

    Args:
        schedule: `LearningRateSchedule` of the base batch, lr, or a number for
            a constant rate.
        scale: number > 0, S, batch of one step / base batch.

    Raises:
        ValueError: if an argument is none of the above.

    Example:

    >>> decay = keras.optimizers.schedules.PiecewiseConstantDecay(
    ...     [8], [0.5, 0.25])
    >>> schedule = LinearScaling(decay, scale=4)
    >>> [float(schedule(t)) for t in range(4)]
    [2.0, 2.0, 2.0, 1.0]
    >>> optimizer = keras.optimizers.SGD(schedule, momentum=0.9)

    Reference: Johnson et al. 2020, definition 3.
    """

    def _rate(self, step):
        return self.scale * self._base_rate(step)


@keras.saving.register_keras_serializable(package="tf_adascale")
class TimeScaling(_ScaledSchedule):
    """The base batch's rates, reached after the same number of examples.

        lr_S(t) = lr(S t)                                                   (3)

    This is plain gradient averaging, and the starting point for Adasum.

    Args:
        schedule: as in `LinearScaling`.
        scale: number > 0, S.

    Raises:
        ValueError: if an argument is none of the above.

    Example:

    >>> decay = keras.optimizers.schedules.PiecewiseConstantDecay(
    ...     [8], [0.5, 0.25])
    >>> schedule = TimeScaling(decay, scale=4)
    >>> [float(schedule(t)) for t in range(4)]
    [0.5, 0.5, 0.5, 0.25]
    """

    def _rate(self, step):
        return self._base_rate(step)


@keras.saving.register_keras_serializable(package="tf_adascale")
class SqrtScaling(_ScaledSchedule):
    """The square-root scaling rule.

        lr_S(t) = sqrt(S) lr(S t)                                           (4)

    Args:
        schedule: as in `LinearScaling`.
        scale: number > 0, S.

    Raises:
        ValueError: if an argument is none of the above.

    Example:

    >>> float(SqrtScaling(0.5, scale=16)(0))
    2.0

    Reference: Krizhevsky, "One weird trick for parallelizing convolutional
    neural networks", 2014.
    """

    def _rate(self, step):
        return math.sqrt(self.scale) * self._base_rate(step)


@keras.saving.register_keras_serializable(package="tf_adascale")
class LegwScaling(_ScaledSchedule):
    """Square-root scaling with linear-epoch gradual warm-up (LEGW).

        lr_S(t) = sqrt(S) lr(S t) min(t / warmup_steps, 1)                  (5)

    The warm-up covers S times as many epochs as at the base batch size, which
    is the same number of iterations at every scale.

    Args:
        schedule: as in `LinearScaling`, without a warm-up of its own.
        scale: number > 0, S.
        warmup_steps: number >= 0, length of the warm-up in iterations, as tuned
            at the base batch size.

    Raises:
        ValueError: if an argument is none of the above.

    Example:

    >>> schedule = LegwScaling(0.5, scale=16, warmup_steps=4)
    >>> [float(schedule(t)) for t in (0, 1, 4, 5)]
    [0.0, 0.5, 2.0, 2.0]

    Reference: You et al., "Large-Batch Training for LSTM and Beyond", 2019.
    """

    def __init__(
        self,
        schedule: keras.optimizers.schedules.LearningRateSchedule | float,
        *,
        scale: float,
        warmup_steps: float,
    ):
        super().__init__(schedule, scale=scale)
        self.warmup_steps = _arguments.nonnegative_number(
            "warmup_steps", warmup_steps, "the warm-up's length in iterations"
        )

    def _rate(self, step):
        warming = _ramp(step, self.warmup_steps)
        return math.sqrt(self.scale) * self._base_rate(step) * warming

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, for `from_config`."""
        return {**super().get_config(), "warmup_steps": self.warmup_steps}


@keras.saving.register_keras_serializable(package="tf_adascale")
class LinearScalingWithWarmup(_ScaledSchedule):
    """Linear scaling with warm-up: LSW, or LSW+ if `iterations` is given.

    The warm-up lasts W = round(warmup T_S) iterations:

        lr_S(t) = lr(0) (1 + (S - 1) t / W)           t < W                 (6)
                  S lr(S t)                           t >= W, family "step"
                  S lr(T_1 (t - W) / (T_S - W))       t >= W, "exponential"

    A scaled step decay loses its first W iterations; an exponential decay is
    compressed. Both end at iteration T_S. At S = 1 the rate is lr(0) during the
    warm-up.

    LSW+ is LSW stretched along the iterations axis: lr_S(t T_S / iterations).

    Args:
        schedule: as in `LinearScaling`.
        scale: number > 0, S.
        total_steps: int >= 1, T_1, steps of training at the base batch size.
        iterations: int >= 1, iterations of training. None is T_S.
        family: "step" or "exponential". None selects by the schedule: "step"
            for a number, a `PiecewiseConstantDecay` and a staircase, and
            "exponential" for any other `ExponentialDecay`.
        warmup: number in [0, 1), the warm-up's share of the iterations.

    Attributes:
        iterations: int, iterations of training.

    Raises:
        ValueError: if an argument is none of the above, or if `family` is None
            and `schedule` is of another class.

    Example:

    >>> # T_S = 8 and W = 2: from lr(0) = 0.5 to S lr(0) = 2 in two iterations.
    >>> decay = keras.optimizers.schedules.PiecewiseConstantDecay(
    ...     [20], [0.5, 0.25])
    >>> lsw = LinearScalingWithWarmup(
    ...     decay, scale=4, total_steps=32, warmup=0.25)
    >>> [float(lsw(t)) for t in range(lsw.iterations)]
    [0.5, 1.25, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]

    Reference: Johnson et al. 2020, section 4 and appendix B.2; Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017.
    """

    def __init__(
        self,
        schedule: keras.optimizers.schedules.LearningRateSchedule | float,
        *,
        scale: float,
        total_steps: int,
        iterations: int | None = None,
        family: str | None = None,
        warmup: float = 0.055,
    ):
        super().__init__(schedule, scale=scale)
        self.total_steps = _arguments.integer("total_steps", total_steps)
        unstretched = scaled_iterations(self.total_steps, scale=self.scale)
        if iterations is None:
            iterations = unstretched
        self.iterations = _arguments.integer("iterations", iterations)
        self.family = _checked_family(family, self.schedule)
        self.warmup = _arguments.number_in(
            "warmup", warmup, "[0, 1)", "the warm-up's share of the iterations"
        )
        # Iterations of LSW+ per iteration of LSW.
        stretch = fractions.Fraction(self.iterations, unstretched)
        warming = round(self.warmup * unstretched)  # W
        self._warmup_iterations = float(warming * stretch)
        if self.family == "step":
            self._base_steps_per_iteration /= stretch
        else:
            # If W = T_S there is nothing to compress: any finite pace will do.
            rest = max(unstretched - warming, 1)
            self._base_steps_per_iteration = self.total_steps / (rest * stretch)

    def _rate(self, step):
        start = self._warmup_iterations
        since_start = tf.cast(step, tf.float64) - start
        if self.family == "exponential":
            scaled = self._base_rate(tf.maximum(since_start, 0.0))
        else:
            scaled = self._base_rate(step)
        initial = self._base_rate(tf.zeros_like(step))
        warming = initial * (1 + (self.scale - 1) * _ramp(step, start))
        return tf.where(since_start < 0, warming, self.scale * scaled)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor, for `from_config`."""
        return {
            **super().get_config(),
            "total_steps": self.total_steps,
            "iterations": self.iterations,
            "family": self.family,
            "warmup": self.warmup,
        }


def _ramp(step, length):
    """Returns min(step / length, 1) as a float32, and 1 if the length is 0."""
    if length == 0:
        return tf.ones(())
    return tf.cast(
        tf.minimum(tf.cast(step, tf.float64) / length, 1.0), tf.float32
    )


def _exact(number):
    """Returns a number's decimal notation as a fraction: 0.1 is 1/10."""
    return fractions.Fraction(str(number))


def _checked_schedule(schedule):
    """Returns a schedule as it is, and a constant rate as a float."""
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        return schedule
    rate = _arguments.finite(schedule)
    if rate is None:
        raise ValueError(
            "`schedule` must be a keras.optimizers.schedules."
            "LearningRateSchedule, or a finite number for a constant rate. "
            f"Received: schedule={schedule!r}"
        )
    return rate


def _checked_family(family, schedule):
    """Returns the family, by default that of the schedule's class."""
    if family in _FAMILIES:
        return family
    if family is None:
        decays = keras.optimizers.schedules
        if isinstance(schedule, decays.ExponentialDecay):
            return "step" if schedule.staircase else "exponential"
        if isinstance(schedule, (float, decays.PiecewiseConstantDecay)):
            return "step"
    raise ValueError(
        f"`family` must be one of {_FAMILIES}: it selects what follows the "
        "warm-up. Only step and exponential decays have a default. Received: "
        f"family={family!r}, schedule={schedule!r}"
    )
