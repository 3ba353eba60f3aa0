"""Learning-rate schedules of the fixed scaling rules, AdaScale's baselines.

A scaling rule translates the schedule `lr` and the T_1 steps of training at the
base batch to a batch S times as large. Each class here wraps `lr` and is itself
an ordinary, serializable Keras schedule: its argument t counts the optimizer's
iterations at scale S. Every rule trains for T_S = ceil(T_1 / S) iterations, see
`scaled_iterations`; only LSW+ trains for a number of its own.

The wrapped schedule is called with S t as an int64 where that is whole for
every t, else as a float64. Both are exact far beyond 2^24; a float32 is not.
"""

import fractions
import math
import numbers

import keras
import tensorflow as tf


def scaled_iterations(total_steps, *, scale):
    """Returns the number of iterations that training lasts at a scale.

        T_S = ceil(T_1 / S)

    Args:
        total_steps: int >= 1, T_1, steps of training at the base batch.
        scale: number > 0, S, batch of one step / base batch.

    Returns:
        int >= 1.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> scaled_iterations(1500, scale=64)  # 23.4 rounded up
    24

    Reference: Johnson et al. 2020, definition 3.
    """
    _check_count("total_steps", total_steps)
    return math.ceil(total_steps / _exact(_checked_scale(scale)))


class _ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Holds what all rules share: `lr`, S and the way through `get_config`.

    A rule defines `_rate(step)`.
    """

    def __init__(self, schedule, *, scale):
        super().__init__()
        if _is_finite(schedule):
            schedule = float(schedule)
        elif not isinstance(
            schedule, keras.optimizers.schedules.LearningRateSchedule
        ):
            raise ValueError(
                "The schedule to scale cannot be called at a step. Expected a "
                "keras.optimizers.schedules.LearningRateSchedule, or a finite "
                f"number for a constant rate. Received: schedule={schedule}"
            )
        self.schedule = schedule
        self.scale = _checked_scale(scale)
        self._base_steps_per_iteration = _exact(self.scale)

    def __call__(self, step):
        """Returns the learning rate of an iteration, scalar float32."""
        step = tf.convert_to_tensor(step)
        whole = step.dtype.is_integer
        return self._rate(tf.cast(step, tf.int64 if whole else tf.float64))

    def _rate(self, step):
        """Returns the same; `step` is a scalar int64 or float64."""
        raise NotImplementedError

    def _base_rate(self, step):
        """Returns lr at the base step of an iteration, scalar float32."""
        pace = self._base_steps_per_iteration
        if pace.denominator == 1:
            base_step = step * pace.numerator
        else:
            # One rounding after an exact product: whole steps come out whole.
            base_step = tf.cast(step, tf.float64) * pace.numerator
            base_step = base_step / pace.denominator
        if not callable(self.schedule):
            return tf.constant(self.schedule, tf.float32)
        return tf.cast(self.schedule(base_step), tf.float32)

    def get_config(self):
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "scale": self.scale,
        }

    @classmethod
    def from_config(cls, config):
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(**{**config, "schedule": schedule})


@keras.saving.register_keras_serializable(package="tf_adascale")
class LinearScaling(_ScaledSchedule):
    """The linear scaling rule.

        lr_S(t) = S lr(S t)

    Args:
        schedule: `LearningRateSchedule` of the base batch, or a float for a
            constant rate.
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
    """The rate of the base batch, in as many examples: no scaling but of time.

        lr_S(t) = lr(S t)

    What plain averaging does, and what Adasum starts from.

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

        lr_S(t) = sqrt(S) lr(S t)

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

        lr_S(t) = sqrt(S) lr(S t) min(t / warmup_steps, 1)

    The warm-up covers S times as many epochs as at the base batch, which is as
    many iterations at every scale.

    Args:
        schedule: as in `LinearScaling`; without a warm-up of its own.
        scale: number > 0, S.
        warmup_steps: number >= 0, length of the warm-up in iterations: that
            tuned at the base batch.

    Raises:
        ValueError: if an argument is none of the above.

    Example:

    >>> schedule = LegwScaling(0.5, scale=16, warmup_steps=4)
    >>> [float(schedule(t)) for t in (0, 1, 4, 5)]
    [0.0, 0.5, 2.0, 2.0]

    Reference: You et al., "Large-Batch Training for LSTM and Beyond", 2019.
    """

    def __init__(self, schedule, *, scale, warmup_steps):
        super().__init__(schedule, scale=scale)
        if not (_is_finite(warmup_steps) and warmup_steps >= 0):
            raise ValueError(
                "The length of the warm-up is no number of iterations. "
                "Expected a finite number of at least 0. "
                f"Received: warmup_steps={warmup_steps}"
            )
        self.warmup_steps = float(warmup_steps)

    def _rate(self, step):
        warming = _ramp(step, self.warmup_steps)
        return math.sqrt(self.scale) * self._base_rate(step) * warming

    def get_config(self):
        """Returns the arguments, for `from_config`."""
        return {**super().get_config(), "warmup_steps": self.warmup_steps}


@keras.saving.register_keras_serializable(package="tf_adascale")
class LinearScalingWithWarmup(_ScaledSchedule):
    """Linear scaling with warm-up: LSW, and LSW+ where `iterations` is given.

    With W = round(warmup T_S):

        lr_S(t) = lr(0) (1 + (S - 1) t / W)           t < W, the warm-up
                  S lr(S t)                           t >= W, family "step"
                  S lr(T_1 (t - W) / (T_S - W))       t >= W, "exponential"

    So the first W iterations of a scaled step decay are left out, while an
    exponential decay is compressed; both end with iteration T_S. At S = 1 there
    is a warm-up too, at the constant rate lr(0).

    LSW+ is LSW stretched along the iterations axis: lr_S(t T_S / iterations).

    Args:
        schedule: as in `LinearScaling`.
        scale: number > 0, S.
        total_steps: int >= 1, T_1, steps of training at the base batch.
        iterations: int >= 1, iterations that training lasts; None is T_S.
        family: "step", "exponential", or None to tell by the schedule: "step"
            for a float, a `PiecewiseConstantDecay` and a staircase, and
            "exponential" for any other `ExponentialDecay`.
        warmup: float in [0, 1), the warm-up's part of the iterations.

    Attributes:
        iterations: int, iterations that training lasts.

    Raises:
        ValueError: if an argument is none of the above, or `family` is None and
            the schedule does not tell.

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
        schedule,
        *,
        scale,
        total_steps,
        iterations=None,
        family=None,
        warmup=0.055,
    ):
        super().__init__(schedule, scale=scale)
        unstretched = scaled_iterations(total_steps, scale=self.scale)
        if iterations is None:
            iterations = unstretched
        _check_count("iterations", iterations)
        if not (_is_finite(warmup) and 0 <= warmup < 1):
            raise ValueError(
                "The warm-up is no part of the iterations. Expected a number "
                f"of at least 0 and below 1. Received: warmup={warmup}"
            )
        self.total_steps = int(total_steps)
        self.iterations = int(iterations)
        self.family = _family(self.schedule) if family is None else family
        if self.family not in ("step", "exponential"):
            raise ValueError(
                "The schedule's family decides what follows the warm-up and is "
                'not known. Expected family="step" or family="exponential" to '
                f"be passed. Received: family={family}, schedule={schedule}"
            )
        self.warmup = float(warmup)
        # Iterations of LSW+ per iteration of LSW.
        stretch = fractions.Fraction(self.iterations, unstretched)
        warming = round(self.warmup * unstretched)  # W
        self._warmup_iterations = float(warming * stretch)
        if self.family == "step":
            self._base_steps_per_iteration /= stretch
        else:
            # W = T_S leaves nothing to compress into: any finite pace will do.
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

    def get_config(self):
        """Returns the arguments, for `from_config`."""
        return {
            **super().get_config(),
            "total_steps": self.total_steps,
            "iterations": self.iterations,
            "family": self.family,
            "warmup": self.warmup,
        }


def _family(schedule):
    """Returns the family that a schedule's type tells, or None."""
    if isinstance(schedule, keras.optimizers.schedules.ExponentialDecay):
        return "step" if schedule.staircase else "exponential"
    steps = (float, keras.optimizers.schedules.PiecewiseConstantDecay)
    return "step" if isinstance(schedule, steps) else None


def _ramp(step, length):
    """Returns min(step / length, 1) as a float32; 1 where the length is 0."""
    if length == 0:
        return tf.ones(())
    return tf.cast(
        tf.minimum(tf.cast(step, tf.float64) / length, 1.0), tf.float32
    )


def _exact(number):
    """Returns the fraction that a number is written as: 0.1 is 1/10."""
    return fractions.Fraction(str(number))


def _is_finite(number):
    return isinstance(number, numbers.Real) and math.isfinite(number)


def _checked_scale(scale):
    if not (_is_finite(scale) and scale > 0):
        raise ValueError(
            "The scale is no ratio of two batches. Expected a finite number "
            f"above 0. Received: scale={scale}"
        )
    return float(scale)


def _check_count(name, count):
    if not (isinstance(count, numbers.Integral) and int(count) >= 1):
        raise ValueError(
            f"There is no training to schedule in {name}. Expected a whole "
            f"number of at least 1. Received: {name}={count}"
        )
