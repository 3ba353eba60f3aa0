"""AdaScale: the learning rate adapted, every step, to the batch size."""

import math
import numbers

import keras
import tensorflow as tf

from tf_adascale import gain as gain_lib
from tf_adascale import loss_scale as loss_scale_lib
from tf_adascale import norms, preconditioner, replicas, wrapper

_ESTIMATORS = ("moments", "ratio", "differenced")


@keras.saving.register_keras_serializable(package="tf_adascale")
class AdaScale(wrapper.Wrapper):
    """Translates an optimizer's learning rates to a larger batch, every step.

    The inner optimizer is written for the batch size that it was tuned at, the
    base batch. At scale S, each step

        eta_t = r_t^power lr(floor(tau_t)),    tau_{t+1} = tau_t + r_t

    where the gain r_t between 1 and S is how many base steps this step is
    worth (equation (3), section 3.2; `tf_adascale.gain` has the arithmetic).
    It follows from the variance of the gradients among the replicas and
    micro-batches, which the step computes anyway: one all-reduce carries the
    gradients and one number more. Train until tau reaches the number of steps
    that the base batch would take: see
    `tf_adascale.callbacks.StopAtScaleInvariantStep`.

    A step with a gradient that is not finite, on any replica, is skipped on all
    of them. Clipping acts on the mean gradient. With one gradient sample at
    scale 1 this is the inner optimizer to the bit.

    Args:
        optimizer: `keras.optimizers.Optimizer`, or a `LossScaleOptimizer`
            around one, with its own rate or schedule, momentum, weight decay,
            clipping, moving average. A schedule counts scale-invariant steps.
        scale: number > 0, S, the batch of one step divided by the base batch.
            By default the number of gradient samples per step, n = replicas x
            micro-batches: every sample is then one base batch.
        estimator: "moments" (appendix B.3); "ratio" (section 3.4); or
            "differenced", for one sample per step at a scale that is not 1: it
            compares each gradient with the step before, and keeps a copy.
        smoothing: number in [0, 1), theta of the moving averages. By default
            max(1 - n / 1000, 0), the paper's.
        power: number >= 0, the power of the gain that multiplies the rate: 1 is
            AdaScale SGD, 0.5 suits adaptive optimizers.
        preconditioned: bool, whether the gain is that of the gradients divided
            by the inner optimizer's sqrt(v-hat) + epsilon, as it is before the
            step: with `power=0.5` this is AdamScale. For Adam, AdamW, Adamax,
            Lamb, Nadam and RMSprop. Until these have taken 5 steps nothing is
            divided; then the averages begin anew, for the units change.
        scale_ema: bool, whether the inner optimizer's `use_ema` advances by
            r_t base steps per step, rho^r_t for rho: see `tf_adascale.ema`.
            `ema_overwrite_frequency` counts iterations all the same.
        name: string.

    Attributes:
        inner_optimizer: `optimizer`.

    Raises:
        ValueError: for arguments out of range, an optimizer that cannot be
            wrapped, or arguments that belong to `optimizer`; and at the first
            step, for one sample per step at a scale that is not 1 with an
            estimator other than "differenced".

    Example:

    >>> optimizer = AdaScale(keras.optimizers.SGD(0.1), scale=2)
    >>> optimizer.microbatches = 2
    >>> weight = keras.Variable([0.0, 0.0])
    >>> # Two orthogonal samples, (1, 0) and (0, 1): all noise, so gain 2.
    >>> optimizer.apply([tf.constant([0.5, 0.5])], [weight], sample_sqnorm=2.0)
    >>> float(optimizer.gain), float(optimizer.scale_invariant_step)
    (2.0, 2.0)
    >>> weight.numpy()
    array([-0.1, -0.1], dtype=float32)

    Reference: Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
    Distributed Training", ICML 2020; for `preconditioned`, Qiao et al.,
    "Pollux: Co-adaptive Cluster Scheduling for Goodput-Optimized Deep
    Learning", OSDI 2021.
    """

    def __init__(
        self,
        optimizer,
        *,
        scale=None,
        estimator="moments",
        smoothing=None,
        power=1.0,
        preconditioned=False,
        scale_ema=True,
        name="adascale",
        **kwargs,
    ):
        _check(scale, estimator, smoothing, power)
        if preconditioned:
            preconditioner.check(loss_scale_lib.stepping(optimizer))
        super().__init__(optimizer, name=name, **kwargs)
        self.preconditioned = preconditioned
        self.estimator = estimator
        self.power = power
        self.scale_ema = scale_ema
        self._scale = None if scale is None else float(scale)
        self._smoothing = smoothing
        # At the base batch size whatever the scale, so a run may continue at
        # another one.
        self._moments = (
            self._add_scalar("gradient_variance", "float32"),
            self._add_scalar("gradient_sqnorm", "float32"),
        )
        self._averaged_steps = self._add_scalar("averaged_steps", "int64")
        self._progress = (
            self._add_scalar("scale_invariant_step", "int64"),
            self._add_scalar("scale_invariant_fraction", "float32"),
        )

    def build(self, variables):
        """Creates the slots of this optimizer and of the inner one."""
        if self.built:
            return
        if self.estimator == "differenced":
            self._previous_gradients = self.add_optimizer_variables(
                variables, "previous_gradient"
            )
            self._seen_steps = self._add_scalar("seen_steps", "int64")
        super().build(variables)

    @property
    def num_samples(self):
        """Int, n: gradient samples per step, replicas x micro-batches."""
        return self.num_replicas * self.microbatches

    @property
    def scale(self):
        """Number, S: the batch of one step / the base batch."""
        return self.num_samples if self._scale is None else self._scale

    @property
    def gain(self):
        """Scalar float32, r: base steps that the last step was worth."""
        return self.gain_at(self.scale)

    def gain_at(self, scale):
        """Returns the gain at another scale, from the same averages.

        Args:
            scale: number > 0.

        Returns:
            Scalar float32; 1 before the first step that measures anything.
        """
        _check_scale(scale)
        return self._gain(self._averages(), scale)

    @property
    def scale_invariant_step(self):
        """Scalar float64, tau: the sum of the gains; exact beyond 2^24."""
        return tf.add_n([tf.cast(_read(v), tf.float64) for v in self._progress])

    @property
    def gradient_variance(self):
        """Scalar float32: averaged sigma^2, at the base batch size."""
        return _read(self._moments[0])

    @property
    def gradient_sqnorm(self):
        """Scalar float32: averaged mu^2."""
        return _read(self._moments[1])

    @property
    def noise_scale(self):
        """Scalar float32: sigma^2 / mu^2, in base batches."""
        return gain_lib.noise_scale(self._averages().moments)

    @property
    def effective_learning_rate(self):
        """Scalar: r^power lr(floor(tau)), with the last step's gain."""
        return self._rate(self.gain, _read(self._progress[0]))

    @property
    def wants_sample_sqnorms(self):
        """Whether `apply` needs `sample_sqnorm` of micro-batches."""
        return self.estimator != "differenced" and self.num_samples > 1

    def sample_sqnorm(self, gradients, variables):
        """Returns the squared norm of one sample, as `apply` wants it.

        Args:
            gradients: list of tensors, `tf.IndexedSlices` or None.
            variables: list of their variables.
        """
        if self.preconditioned and not self.built:
            self.build(variables)
        return _squared_norm(_divided(gradients, self._divisors(variables)))

    def plan(self, variables, gradients, sample_sqnorm, loss_scale):
        """Returns the step: the mean gradients, at the rate of this gain."""
        divisors = self._divisors(variables)
        # Sums over the replicas, each of which divided by their number.
        sqnorms = []
        if self.wants_sample_sqnorms:
            if sample_sqnorm is None:
                sample_sqnorm = _squared_norm(_divided(gradients, divisors))
            sqnorms = [tf.cast(sample_sqnorm, tf.float32)]
        reduced = replicas.total(sqnorms + gradients)
        sqnorms, gradients = reduced[: len(sqnorms)], reduced[len(sqnorms) :]
        if self.num_replicas > 1:
            gradients = [_without_repeats(g) for g in gradients]
        sqnorm_of_mean = _squared_norm(_divided(gradients, divisors))
        averages, memory = self._averages(), []
        if self.estimator == "differenced":
            averages, memory = self._differenced(
                variables,
                [loss_scale_lib.divided(g, loss_scale) for g in gradients],
                divisors,
            )
        elif sqnorms:
            # N^2 / (N k): the norm undivided, and the mean of n = N k of them.
            mean_sqnorm = sqnorms[0] * (self.num_replicas / self.microbatches)
            unit = 1.0 if loss_scale is None else 1 / loss_scale
            averages = self._updated(
                gain_lib.moments(
                    mean_sqnorm * unit * unit,
                    sqnorm_of_mean * unit * unit,
                    num_samples=self.num_samples,
                    scale=self.scale,
                )
            )
        gain = self._gain(averages, self.scale)
        step = gain_lib.ScaleInvariantStep(*map(_read, self._progress))
        after = gain_lib.advanced(step, gain)
        return wrapper.Step(
            gradients=gradients,
            # A norm is finite only if everything that it sums is.
            finite=tf.reduce_all(
                tf.math.is_finite([*sqnorms, sqnorm_of_mean, *averages.moments])
            ),
            learning_rate=self._rate(gain, step.whole),
            base_steps=gain if self.scale_ema and self.scale != 1 else None,
            assignments=[
                *zip(self._moments, averages.moments),
                (self._averaged_steps, averages.count),
                *zip(self._progress, after),
                *memory,
            ],
        )

    def get_config(self):
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

    def _divisors(self, variables):
        """Returns what makes the units that the gain is taken in, or None."""
        if not self.preconditioned:
            return None
        return [
            preconditioner.divisors(self._stepping, place)
            for place in self.places(variables)
        ]

    def _differenced(self, variables, gradients, divisors):
        """Returns the averages, and assignments of what to remember."""
        slots = [self._previous_gradients[i] for i in self.places(variables)]
        previous = [_read(slot) for slot in slots]
        present = [tf.convert_to_tensor(g) for g in gradients]
        now, then = (_divided(gs, divisors) for gs in (present, previous))
        moments = gain_lib.differenced_moments(
            _squared_norm([tf.subtract(g, p) for g, p in zip(now, then)]),
            tf.cast(norms.dot(now, then), tf.float32),
            scale=self.scale,
        )
        seen = _read(self._seen_steps)
        averages = tf.nest.map_structure(
            lambda new, old: tf.where(seen > 0, new, old),
            self._updated(moments),
            self._averages(),
        )
        return averages, [*zip(slots, present), (self._seen_steps, seen + 1)]

    def _averages(self):
        return gain_lib.Averages(
            gain_lib.Moments(*map(_read, self._moments)),
            _read(self._averaged_steps),
        )

    def _comparable_averages(self):
        """Returns the averages, empty where this step's units are new."""
        averages = self._averages()
        if not self.preconditioned:
            return averages
        begins = _read(self.iterations) == preconditioner.WARM_STEPS
        count = tf.where(begins, tf.zeros_like(averages.count), averages.count)
        return averages._replace(count=count)

    def _updated(self, moments):
        """Returns the averages with one step's moments included."""
        if self.estimator != "ratio":
            moments = gain_lib.floored(moments)
        smoothing = self._smoothing
        if smoothing is None:
            smoothing = gain_lib.default_smoothing(self.num_samples)
        return gain_lib.averaged(
            self._comparable_averages(), moments, smoothing=smoothing
        )

    def _gain(self, averages, scale):
        is_ratio = self.estimator == "ratio"
        gain = gain_lib.ratio(
            averages.moments,
            scale=scale,
            epsilon=gain_lib.RATIO_EPSILON if is_ratio else 0.0,
        )
        return tf.where(averages.count > 0, gain, tf.ones_like(gain))

    def _rate(self, gain, whole_step):
        rate = self.base_learning_rate(whole_step)
        power = gain if self.power == 1 else gain**self.power
        return rate * tf.cast(power, rate.dtype)

    def check_samples(self, sample_sqnorm):
        """Refuses a step whose gain cannot be estimated."""
        if (
            self.num_samples == 1
            and self.scale != 1
            and self.estimator != "differenced"
        ):
            raise ValueError(
                "The gradient's variance cannot be estimated from one sample "
                "per step. Expected more replicas, or microbatches >= 2 in "
                "tf_adascale.Model.compile, or AdaScale(estimator="
                f'"differenced"), or scale=1. Received: scale={self.scale}, '
                f"replicas={self.num_replicas}, microbatches="
                f"{self.microbatches}, estimator={self.estimator!r}"
            )
        if (
            self.microbatches > 1
            and self.wants_sample_sqnorms
            and sample_sqnorm is None
        ):
            raise ValueError(
                "The squared norms of the micro-batches' gradients are "
                "missing. Expected `sample_sqnorm` in `apply`, as "
                "tf_adascale.Model passes it. Received: "
                f"microbatches={self.microbatches}, "
                "sample_sqnorm=None"
            )


def _read(variable):
    return tf.convert_to_tensor(variable)


def _squared_norm(gradients):
    return tf.cast(norms.squared_norm(gradients), tf.float32)


def _divided(gradients, divisors):
    """Returns the gradients, of which some may be None, in other units."""
    if divisors is None:
        return gradients
    return [
        None if gradient is None else preconditioner.divided(gradient, divisor)
        for gradient, divisor in zip(gradients, divisors)
    ]


def _without_repeats(gradient):
    """Makes a sum over replicas, which only joins slices, one gradient."""
    if isinstance(gradient, tf.IndexedSlices):
        return norms.deduplicated(gradient)
    return gradient


def _check_scale(scale):
    is_number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    if not is_number or not 0 < float(scale) < math.inf:
        raise ValueError(
            "The scale is not a size of a batch. Expected a finite number > 0, "
            "the batch of one step divided by the base batch. Received: "
            f"scale={scale!r}"
        )


def _check(scale, estimator, smoothing, power):
    if scale is not None:
        _check_scale(scale)
    if estimator not in _ESTIMATORS:
        raise ValueError(
            f"The estimator is unknown. Expected one of {_ESTIMATORS}. "
            f"Received: estimator={estimator!r}"
        )
    if smoothing is not None and not 0 <= smoothing < 1:
        raise ValueError(
            "The smoothing is out of range. Expected a number in [0, 1), 0 for "
            f"no averaging. Received: smoothing={smoothing!r}"
        )
    if not 0 <= power < math.inf:
        raise ValueError(
            "The power of the gain is out of range. Expected a finite number "
            f">= 0. Received: power={power!r}"
        )
