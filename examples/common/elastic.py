"""A scale that changes during training, because devices join and leave.

The text "0:4,0.25:8,0.5:16" means scale 4 at first, 8 after a quarter of the
training and 16 after half of it, counted in steps at the base batch.
"""

import itertools
import math
from typing import NamedTuple

import keras
import tensorflow as tf

# Fraction of the iterations, as in `schedules.LinearScalingWithWarmup`.
WARMUP = 0.055


class Phase(NamedTuple):
    """A part of the training at one scale.

    Attributes:
        scale: int, S.
        end: int, steps at the base batch after which the next phase begins.
        last_iteration: int, the latest iteration at which the phase ends,
            counted from the beginning of training.
    """

    scale: int
    end: int
    last_iteration: int


def parse(text):
    """Parses a text into `((fraction, scale), ...)`.

    Raises:
        ValueError: unless the text consists of pairs "fraction:scale" that are
            separated by commas, the fractions start at 0, increase and stay
            below 1, and the scales are integers >= 1.

    Example:

    >>> parse("0:4,0.25:8")
    ((0.0, 4), (0.25, 8))
    """
    try:
        pairs = tuple(
            (float(fraction), int(scale))
            for fraction, scale in (pair.split(":") for pair in text.split(","))
        )
    except ValueError:
        pairs = ()
    fractions = [fraction for fraction, _ in pairs]
    increasing = all(a < b for a, b in itertools.pairwise([*fractions, 1]))
    if (
        not pairs
        or fractions[0] != 0
        or not increasing
        or any(scale < 1 for _, scale in pairs)
    ):
        raise ValueError(
            "`elastic` must be pairs fraction:scale, separated by commas, "
            "whose fractions start at 0, increase and stay below 1, for "
            f'example "0:4,0.25:8,0.5:16". Received: elastic={text!r}'
        )
    return pairs


def ends(pairs, total_steps):
    """Returns the steps at the base batch after which each phase ends.

    Example:

    >>> ends(((0.0, 4), (0.25, 8)), 100)
    (25, 100)
    """
    fractions = [fraction for fraction, _ in pairs][1:]
    return (
        *(round(fraction * total_steps) for fraction in fractions),
        total_steps,
    )


def fixed_phases(pairs, total_steps):
    """Returns the phases of a rule that counts each step as S base steps.

    A phase from base step a to b takes ceil((b - a) / S) iterations.

    Example:

    >>> fixed_phases(((0.0, 4), (0.25, 8)), 100)  # ceil(25/4), ceil(75/8)
    (Phase(scale=4, end=25, last_iteration=7), \
Phase(scale=8, end=100, last_iteration=17))
    """
    phases = []
    begin = iterations = 0
    for (_, scale), end in zip(pairs, ends(pairs, total_steps)):
        iterations += math.ceil((end - begin) / scale)
        phases.append(Phase(scale, end, iterations))
        begin = end
    return tuple(phases)


class LinearScalingWithWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """Linear scaling with warm-up for a scale that changes.

    The rate in iteration t of W', where the scale is S(t) and
    W = round(0.055 W') iterations are the warm-up:

        lr(0) (1 + (S(t) - 1) t / W)    t < W
        S(t) lr(tau(t))                 t >= W,  tau(t) = S(0) + ... + S(t - 1)

    With a single scale, this equals
    `tf_adascale.schedules.LinearScalingWithWarmup` of family "step".

    Args:
        schedule: `LearningRateSchedule` of the base batch.
        pairs: sequence of (fraction, scale), see `parse`.
        total_steps: int, steps of training at the base batch.

    Reference: Johnson et al. 2020, section 4, Figure 4 and appendix B.2.
    """

    def __init__(self, schedule, pairs, *, total_steps):
        self.schedule = schedule
        self.pairs = tuple((float(begin), int(scale)) for begin, scale in pairs)
        self.total_steps = total_steps
        self.phases = fixed_phases(self.pairs, total_steps)

    def __call__(self, step):
        """Returns the learning rate of an iteration."""
        step = tf.cast(step, tf.float32)
        scale, done = tf.constant(0.0), tf.constant(0.0)
        first_iteration = first_step = 0
        for phase in self.phases:
            begun = step >= first_iteration
            since = step - first_iteration
            scale = tf.where(begun, float(phase.scale), scale)
            done = tf.where(begun, first_step + since * phase.scale, done)
            first_iteration, first_step = phase.last_iteration, phase.end
        warmup = round(WARMUP * self.phases[-1].last_iteration)
        warming = 1 + (scale - 1) * step / max(warmup, 1)
        return tf.where(
            step < warmup,
            self.schedule(tf.zeros_like(step)) * warming,
            self.schedule(done) * scale,
        )

    def get_config(self):
        """Returns the arguments, for `from_config`."""
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "pairs": self.pairs,
            "total_steps": self.total_steps,
        }

    @classmethod
    def from_config(cls, config):
        """Returns the schedule that a config describes."""
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(**{**config, "schedule": schedule})
