"""AdaScale: the learning rate adapted, every step, to the batch size."""

from typing import Any, Literal

import keras
import tensorflow as tf

from tf_adascale.distribute import collectives
from tf_adascale.ops import _arguments, _keras, norms
from tf_adascale.ops import gain as gain_ops
from tf_adascale.optimizers import (
    advice,
    checks,
    estimators,
    inner_step,
    loss_scale,
    overwrites,
    preconditioner,
    wrapper,
)


@keras.saving.register_keras_serializable(package="tf_adascale")
class AdaScale(wrapper.Wrapper):
    """Translates an optimizer's learning rates to a larger batch, every step.

    The inner optimizer is written for the batch size that it was tuned at, the
    base batch. At scale S, the size of the batch in base batches, each step
    uses

        eta_t = r_t^power lr(floor(tau_t)),    tau_{t+1} = tau_t + r_t

    where the gain r_t, between 1 and S, is the number of base steps that this
    step is worth (equation (3), section 3.2; the arithmetic is in
    `tf_adascale.ops.gain`). The gain follows from the variance of the gradients
    among the replicas and micro-batches, which the step computes anyway. One
    all-reduce carries the gradients and one more number. Training ends when tau
    reaches the number of steps that the base batch takes: see
    `tf_adascale.callbacks.StopAtScaleInvariantStep`.

    A gradient that is not finite, on any replica, skips the step on all of
    them. Clipping acts on the mean gradient. With one gradient sample at scale
    1 this is the inner optimizer to the bit.

    Args:
        inner_optimizer: `keras.optimizers.Optimizer`, or a `LossScaleOptimizer`
            around one, with its own rate or schedule, momentum, weight decay,
            clipping, moving average. A schedule counts scale-invariant steps.
        scale: number > 0, S. By default the number of gradient samples per
            step, n = replicas x micro-batches: each sample is one base batch.
        estimator: "moments" (appendix B.3); "ratio" (section 3.4); or
            "differenced", for one sample per step at a scale other than 1: it
            compares each gradient with that of the step before, and keeps a
            copy.
        smoothing: number in [0, 1), theta of the moving averages. By default
            max(1 - n / 1000, 0), the paper's.
        power: number >= 0, the power of the gain that multiplies the rate: 1
            for SGD. For adaptive optimizers see `AdamScale`.
        preconditioned: bool, whether the gain is that of the gradients divided
            by the inner optimizer's sqrt(v-hat) + epsilon, as it is before the
            step. For Adam, AdamW, Adamax, Lamb, Nadam and RMSprop. Until these
            have taken 5 steps nothing is divided. Then the averages restart,
            because the units change.
        scale_ema: bool, whether the inner optimizer's `use_ema` advances by
            r_t base steps per step, rho^r_t for rho: see `tf_adascale.ops.ema`.
            `ema_overwrite_frequency` counts iterations in any case.
        name: string.

    Attributes:
        inner_optimizer: the argument.
        microbatches: int, gradient samples per replica and step. A custom loop
            sets it before `build`; `tf_adascale.Model.compile` sets it too.

    Raises:
        ValueError: for arguments out of range, an optimizer that cannot be
            wrapped, or arguments that belong to `inner_optimizer`; and at the
            first step, for one sample per step at a scale other than 1 with an
            estimator other than "differenced".

    Example:

    >>> optimizer = AdaScale(keras.optimizers.SGD(0.1), scale=2)
    >>> optimizer.microbatches = 2
    >>> weight = keras.Variable([0.0, 0.0])
    >>> # Two orthogonal samples, (1, 0) and (0, 1): all noise, so gain 2.
    >>> mean = tf.constant([0.5, 0.5])
    >>> optimizer.apply([mean], [weight], sample_sqnorm_sum=2.0)
    >>> float(optimizer.gain), float(optimizer.scale_invariant_step)
    (2.0, 2.0)
    >>> weight.numpy()
    array([-0.1, -0.1], dtype=float32)

    Reference: Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
    Distributed Training", ICML 2020.
    """

    _FIXED = ("estimator", "preconditioned")

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        *,
        scale: float | None = None,
        estimator: Literal["moments", "ratio", "differenced"] = "moments",
        smoothing: float | None = None,
        power: float = 1.0,
        preconditioned: bool = False,
        scale_ema: bool = True,
        name: str = "adascale",
        **kwargs: Any,
    ):
        if scale is not None:
            scale = _arguments.scale(scale)
        _arguments.one_of("estimator", estimator, tuple(estimators.KINDS))
        if smoothing is not None:
            _arguments.number_in("smoothing", smoothing, "[0, 1)")
        _arguments.nonnegative_number("power", power)
        if preconditioned:
            checks.check_inner_optimizer(
                inner_optimizer, kwargs, wrapper=type(self).__name__
            )
            preconditioner.check(loss_scale.unwrap(inner_optimizer))
        super().__init__(inner_optimizer, name=name, **kwargs)
        if power == 1 and scale != 1:
            advice.warn_of_power(loss_scale.unwrap(inner_optimizer))
        self.estimator = estimator
        self.power = power
        self.preconditioned = preconditioned
        self.scale_ema = scale_ema
        self._scale = scale
        self._smoothing = smoothing
        self._estimator = estimators.KINDS[estimator]()
        self._has_warned = False
        # A `gain.State`, flat. It is at the base batch size, whatever the
        # scale, so a run may continue at another one.
        self._state_variables = (
            self._add_scalar("gradient_variance", "float32"),
            self._add_scalar("gradient_sqnorm", "float32"),
            self._add_scalar("averaged_steps", "int64"),
            self._add_scalar("scale_invariant_step", "int64"),
            self._add_scalar("scale_invariant_fraction", "float32"),
        )
        # What `iterations` was after the last step; another value is the
        # user's, who counted these steps at the base batch size.
        self._counted_iterations = self._add_scalar(
            "counted_iterations", "int64"
        )

    def build(self, variables: list[Any]) -> None:
        """Creates the slots of this optimizer and of the inner one."""
        if self.built:
            return
        self._estimator.build(self, variables)
        super().build(variables)

    # One step.

    def plan_step(
        self,
        variables: list[Any],
        gradients: list[Any],
        sample_sqnorm_sum: tf.Tensor | None,
        loss_scale: Any,
    ) -> inner_step.Step:
        """Returns the step by the mean gradient, at the rate of its gain."""
        divisors = self._divisors(variables)
        mean_sqnorm, gradients = self._reduced(
            gradients, sample_sqnorm_sum, divisors
        )
        sqnorm_of_mean = preconditioner.squared_norm(gradients, divisors)
        measurement = self._estimator.measure(
            estimators.Observation(
                slots=self.slot_indices(variables),
                gradients=gradients,
                divisors=divisors,
                loss_scale=loss_scale,
                mean_sqnorm=mean_sqnorm,
                sqnorm_of_mean=sqnorm_of_mean,
                num_samples=self.num_samples,
                scale=self.scale,
            )
        )
        before = self._state()
        gain, after = gain_ops.advance(
            self._with_comparable_averages(before),
            measurement.moments,
            scale=self.scale,
            smoothing=self.smoothing,
            epsilon=self._estimator.epsilon,
            is_measured=measurement.is_measured,
        )
        # A norm is finite only if everything that it sums is.
        norms_and_moments = [sqnorm_of_mean, *after.averages.moments]
        if mean_sqnorm is not None:
            norms_and_moments.append(mean_sqnorm)
        return inner_step.Step(
            gradients=gradients,
            finite=tf.reduce_all(tf.math.is_finite(norms_and_moments)),
            learning_rate=self._rate(gain, before.step),
            base_steps=gain if self.scale_ema and self.scale != 1 else None,
            assignments=[
                *zip(self._state_variables, tf.nest.flatten(after)),
                (self._counted_iterations, self.iterations + 1),
                *measurement.assignments,
            ],
        )

    def empty_step(self) -> inner_step.Step:
        """Returns a step that counts as one base step, as in Keras."""
        *_, whole, fraction = self._state_variables
        step = self._state().step
        return (
            super()
            .empty_step()
            ._replace(
                assignments=[
                    (whole, step.whole + 1),
                    (fraction, step.fraction),
                    (self._counted_iterations, self.iterations + 1),
                ]
            )
        )

    def _reduced(self, gradients, sample_sqnorm_sum, divisors):
        """Returns (1/n) sum |g_i|^2, or None, and g-bar, by one all-reduce."""
        if not self.needs_sample_sqnorms:
            return None, self._deduplicated(collectives.total(gradients))
        if sample_sqnorm_sum is None:
            sample_sqnorm_sum = preconditioner.squared_norm(gradients, divisors)
        sqnorm_sum, *gradients = collectives.total(
            [tf.cast(sample_sqnorm_sum, tf.float32), *gradients]
        )
        # Gradients came divided by N, and their squared norms by N^2:
        # N^2 / (N k) makes the mean of n = N k squared norms.
        mean_sqnorm = sqnorm_sum * (self.num_replicas / self.microbatches)
        return mean_sqnorm, self._deduplicated(gradients)

    def _deduplicated(self, gradients):
        """Adds up the slices that the replicas' sparse gradients share."""
        if self.num_replicas == 1:
            return gradients
        return [
            norms.deduplicated(g) if isinstance(g, tf.IndexedSlices) else g
            for g in gradients
        ]

    def _divisors(self, variables):
        """Returns the divisors that make the gain's units, None for 1."""
        if not self.preconditioned:
            return None
        return [
            preconditioner.divisors(self._innermost, slot)
            for slot in self.slot_indices(variables)
        ]

    def _rate(self, gain, step):
        rate = self.base_learning_rate(_keras.Step(step.whole))
        power = gain if self.power == 1 else gain**self.power
        return rate * tf.cast(power, rate.dtype)

    # State.

    def _state(self):
        variance, sqnorm, count, whole, fraction = map(
            tf.convert_to_tensor, self._state_variables
        )
        iterations = tf.convert_to_tensor(self.iterations)
        is_set = iterations != tf.convert_to_tensor(self._counted_iterations)
        whole = tf.where(is_set, iterations, whole)
        fraction = tf.where(is_set, tf.zeros_like(fraction), fraction)
        return gain_ops.State(
            gain_ops.Averages(gain_ops.Moments(variance, sqnorm), count),
            gain_ops.ScaleInvariantStep(whole, fraction),
        )

    def _with_comparable_averages(self, state):
        """Returns the state, its averages empty where the units are new."""
        if not self.preconditioned:
            return state
        averages = state.averages
        is_new = (
            tf.convert_to_tensor(self.iterations) == preconditioner.WARM_STEPS
        )
        count = tf.where(is_new, tf.zeros_like(averages.count), averages.count)
        return state._replace(averages=averages._replace(count=count))

    # The interface of a training step.

    @property
    def needs_sample_sqnorms(self) -> bool:
        """Whether `apply` needs `sample_sqnorm_sum` of micro-batches."""
        return self._estimator.needs_sample_sqnorms(self.num_samples)

    def sample_sqnorm(
        self, gradients: list[Any], variables: list[Any]
    ) -> tf.Tensor:
        """Returns the squared norm of one sample, for `sample_sqnorm_sum`.

        Args:
            gradients: list of tensors, `tf.IndexedSlices` or None: those of one
                micro-batch, divided by the replicas and multiplied by the loss
                scale like the ones that `apply` takes.
            variables: list of their variables.
        """
        if self.preconditioned and not self.built:
            self.build(variables)
        pairs = overwrites.split(gradients, variables)
        return preconditioner.squared_norm(
            pairs.gradients, self._divisors(pairs.variables)
        )

    def check_step(self, sample_sqnorm_sum: tf.Tensor | None) -> None:
        """Refuses a step whose gain cannot be estimated.

        Warns once of a gain that stays 1.
        """
        if (
            self._scale is None
            and self.num_samples == 1
            and not self._has_warned
        ):
            self._has_warned = True
            advice.warn_of_one_sample(self.name)
        if self.scale != 1 and self.num_samples < self._estimator.least_samples:
            raise ValueError(
                "`microbatches` must be >= 2 on one replica at a scale other "
                "than 1: one gradient sample per step has no variance. Pass "
                "`microbatches` to tf_adascale.Model.compile, or use "
                'AdaScale(estimator="differenced"), or scale=1. Received: '
                f"scale={self.scale}, replicas={self.num_replicas}, "
                f"microbatches={self.microbatches}, "
                f"estimator={self.estimator!r}"
            )
        if (
            self.microbatches > 1
            and self.needs_sample_sqnorms
            and sample_sqnorm_sum is None
        ):
            raise ValueError(
                "`sample_sqnorm_sum` must be passed to `apply` with several "
                "micro-batches per step: the sum of `sample_sqnorm` over them, "
                "as tf_adascale.Model passes it. Received: "
                f"microbatches={self.microbatches}, sample_sqnorm_sum=None"
            )

    # For users to read.

    @property
    def num_samples(self) -> int:
        """Int, n: gradient samples per step, replicas x micro-batches."""
        return self.num_replicas * self.microbatches

    @property
    def scale(self) -> float:
        """Number, S: the batch of one step / the base batch."""
        return self.num_samples if self._scale is None else self._scale

    @property
    def smoothing(self) -> float:
        """Number in [0, 1), theta: the parameter of the moving averages."""
        if self._smoothing is None:
            return gain_ops.default_smoothing(self.num_samples)
        return self._smoothing

    @property
    def gain(self) -> tf.Tensor:
        """Scalar float32, r: base steps that the last step was worth."""
        return self.gain_at(self.scale)

    def gain_at(self, scale: float) -> tf.Tensor:
        """Returns the gain at another scale, from the same averages.

        Args:
            scale: number > 0.

        Returns:
            Scalar float32; 1 before the first step that measures anything.
        """
        _arguments.scale(scale)
        return gain_ops.current(
            self._state().averages,
            scale=scale,
            epsilon=self._estimator.epsilon,
        )

    @property
    def scale_invariant_step(self) -> tf.Tensor:
        """Scalar float64, tau: the sum of the gains; exact beyond 2^24."""
        step = self._state().step
        return tf.cast(step.whole, tf.float64) + tf.cast(
            step.fraction, tf.float64
        )

    @property
    def gradient_variance(self) -> tf.Tensor:
        """Scalar float32: averaged sigma^2, at the base batch size."""
        return self._state().averages.moments.gradient_variance

    @property
    def gradient_sqnorm(self) -> tf.Tensor:
        """Scalar float32: averaged mu^2."""
        return self._state().averages.moments.gradient_sqnorm

    @property
    def noise_scale(self) -> tf.Tensor:
        """Scalar float32: sigma^2 / mu^2, in base batches."""
        return gain_ops.noise_scale(self._state().averages.moments)

    @property
    def effective_learning_rate(self) -> tf.Tensor:
        """Scalar: r^power lr(floor(tau)), with the last step's gain."""
        return self._rate(self.gain, self._state().step)

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration, with the rate that the user gave."""
        return {
            **super().get_config(),
            "scale": self._scale,
            "estimator": self.estimator,
            "smoothing": self._smoothing,
            "power": self.power,
            "preconditioned": self.preconditioned,
            "scale_ema": self.scale_ema,
        }
