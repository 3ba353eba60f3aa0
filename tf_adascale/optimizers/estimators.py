"""Estimators of the gradient's moments: one class per kind.

An estimator says what it needs of a step, what it remembers between steps, and
what it measures. `AdaScale` does the rest: averages, gain, progress.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf

from tf_adascale.ops import gain as gain_ops
from tf_adascale.ops import norms
from tf_adascale.optimizers import loss_scale as loss_scale_lib
from tf_adascale.optimizers import preconditioner


class Observation(NamedTuple):
    """One step's gradients after the all-reduce, the same on every replica.

    Gradients and norms are multiplied by the loss scale.

    Attributes:
        slots: list of int, the places of the variables that have a gradient.
        gradients: list of tensors or `tf.IndexedSlices`, the mean gradients.
        divisors: list of tensors, what the gain's units divide the gradients
            by; None for 1.
        loss_scale: scalar, or None for 1.
        mean_sqnorm: scalar, (1/n) sum |g_i|^2; None if no estimator needs it.
        sqnorm_of_mean: scalar, |g-bar|^2.
        num_samples: int, n.
        scale: number, S.
    """

    slots: list[int]
    gradients: list[Any]
    divisors: list[tf.Tensor] | None
    loss_scale: Any
    mean_sqnorm: tf.Tensor | None
    sqnorm_of_mean: tf.Tensor
    num_samples: int
    scale: float


class Measurement(NamedTuple):
    """What an estimator makes of a step.

    Attributes:
        moments: `gain.Moments`; None if the step measures nothing.
        is_measured: scalar bool, whether `moments` hold a measurement, where
            only the graph can tell; None for yes.
        assignments: list of `(variable, value)`: what to remember if the step
            is taken.
    """

    moments: gain_ops.Moments | None = None
    is_measured: tf.Tensor | None = None
    assignments: Sequence[tuple[Any, tf.Tensor]] = ()


class Estimator(Protocol):
    """What every estimator has.

    Attributes:
        epsilon: float, see `gain.ratio`.
        least_samples: int, the gradient samples per step that it needs to
            measure anything at a scale other than 1.
    """

    epsilon: float
    least_samples: int

    def needs_sample_sqnorms(self, num_samples: int) -> bool:
        """Returns whether it needs the squared norm of every sample."""
        ...

    def build(
        self, optimizer: keras.optimizers.Optimizer, variables: list[Any]
    ) -> None:
        """Creates what it remembers, as variables of the optimizer."""
        ...

    def measure(self, observation: Observation) -> Measurement:
        """Returns what it makes of a step."""
        ...


class _AmongSamples:
    """Compares the gradient samples of one step with their mean."""

    least_samples = 2

    def needs_sample_sqnorms(self, num_samples: int) -> bool:
        return num_samples > 1

    def build(
        self, optimizer: keras.optimizers.Optimizer, variables: list[Any]
    ) -> None:
        del optimizer, variables  # It remembers nothing.

    def _moments(self, observation):
        """Returns the step's moments, or None for a single sample."""
        if observation.mean_sqnorm is None:
            return None
        sqnorms = observation.mean_sqnorm, observation.sqnorm_of_mean
        if observation.loss_scale is not None:
            unit = 1 / observation.loss_scale
            sqnorms = [sqnorm * unit * unit for sqnorm in sqnorms]
        return gain_ops.moments(
            *sqnorms,
            num_samples=observation.num_samples,
            scale=observation.scale,
        )


class Moments(_AmongSamples):
    """The paper's estimator: moments clamped before averaging, appendix B.3.

    Example:

    >>> Moments().needs_sample_sqnorms(2)
    True
    """

    epsilon = 0.0

    def measure(self, observation: Observation) -> Measurement:
        moments = self._moments(observation)
        if moments is None:
            return Measurement()
        return Measurement(gain_ops.clamp_moments(moments))


class Ratio(_AmongSamples):
    """The estimator of section 3.4: moments as they are, and an epsilon.

    Example:

    >>> Ratio().epsilon
    1e-06
    """

    epsilon = gain_ops.RATIO_EPSILON

    def measure(self, observation: Observation) -> Measurement:
        return Measurement(self._moments(observation))


class Differenced:
    """Compares each mean gradient with that of the step before.

    One sample per step is enough. The previous gradient takes the memory of the
    model; the first step measures nothing.

    Example:

    >>> Differenced().needs_sample_sqnorms(8)
    False
    """

    epsilon = 0.0
    least_samples = 1

    def needs_sample_sqnorms(self, num_samples: int) -> bool:
        del num_samples
        return False

    def build(
        self, optimizer: keras.optimizers.Optimizer, variables: list[Any]
    ) -> None:
        self._previous = optimizer.add_optimizer_variables(
            variables, "previous_gradient"
        )
        self._seen_steps = optimizer.add_variable(
            (), "zeros", dtype="int64", name="seen_steps"
        )

    def measure(self, observation: Observation) -> Measurement:
        slots = [self._previous[slot] for slot in observation.slots]
        gradients = [
            tf.cast(
                tf.convert_to_tensor(
                    loss_scale_lib.unscale(gradient, observation.loss_scale)
                ),
                slot.dtype,
            )
            for gradient, slot in zip(observation.gradients, slots)
        ]
        now, before = (
            preconditioner.precondition(values, observation.divisors)
            for values in (gradients, [tf.convert_to_tensor(s) for s in slots])
        )
        moments = gain_ops.differenced_moments(
            tf.cast(
                norms.squared_norm(list(map(tf.subtract, now, before))),
                tf.float32,
            ),
            tf.cast(norms.dot(now, before), tf.float32),
            scale=observation.scale,
        )
        seen_steps = tf.convert_to_tensor(self._seen_steps)
        return Measurement(
            gain_ops.clamp_moments(moments),
            is_measured=seen_steps > 0,
            assignments=[
                *zip(slots, gradients),
                (self._seen_steps, seen_steps + 1),
            ],
        )


KINDS: dict[str, type[Estimator]] = {
    "moments": Moments,
    "ratio": Ratio,
    "differenced": Differenced,
}
