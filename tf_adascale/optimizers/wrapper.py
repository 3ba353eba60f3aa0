"""An abstract Keras optimizer around another.

The inner optimizer keeps its slots, its settings and its `update_step`. The
wrapper decides which gradients and which learning rate reach it. The contract
is that of Keras's own `LossScaleOptimizer`.

Relies on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _iterations                 the variable behind `iterations`
    _trainable_variables        the variables an optimizer was built on
    _get_variable_index         a variable's place among them
    _check_variables_are_known  raises for any other variable
    _distribution_strategy      the strategy an optimizer was made under
    _filter_empty_gradients     warns of variables without a gradient
    _clip_gradients             clipnorm, clipvalue and global_clipnorm
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from tf_adascale.distribute import updates
from tf_adascale.optimizers import (
    checks,
    delegate,
    inner_step,
    loss_scale,
    overwrites,
)


class Wrapper(delegate.Delegate):
    """Abstract optimizer: plans a step that an inner optimizer then takes.

    A subclass implements

        plan_step(...)            the step, from one replica's gradients
        effective_learning_rate   the learning rate at the present progress

    and may override

        empty_step()              the step without gradients of weights
        check_step(...)           refuses a step that cannot be planned
        needs_sample_sqnorms      whether `apply` needs `sample_sqnorm_sum`
        sample_sqnorm(...)        the squared norm of one gradient sample
        merge_samples             how two micro-batches' gradients become one
        build, get_config         as for any Keras optimizer

    and nothing else. A keyword argument of its constructor is an attribute of
    the same name. The methods may read `num_replicas`, `microbatches`,
    `inner_optimizer`, `base_learning_rate(step)` and `slot_indices(variables)`.
    A training step that takes micro-batches reads the properties above, as
    `tf_adascale.Model` does.

    Args:
        inner_optimizer: `keras.optimizers.Optimizer`, possibly a
            `keras.optimizers.LossScaleOptimizer`. From now on it steps only
            through this wrapper, which sets its learning rate.
        name: string.
        **kwargs: refused; they belong to `inner_optimizer`.

    Attributes:
        inner_optimizer: the argument.
        microbatches: int, gradient samples that each replica takes per step.
            `tf_adascale.Model.compile` sets it.

    Raises:
        ValueError: if `inner_optimizer` cannot be wrapped or `kwargs` are
            given.
    """

    microbatches: int = 1  # Of the class, so as not to be the inner one's.

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        *,
        name: str,
        **kwargs: Any,
    ):
        super().__init__(inner_optimizer, name=name, **kwargs)
        self._skipped_steps = self._add_scalar("skipped_steps", "int64")

    # The interface of a subclass.

    def plan_step(
        self,
        variables: list[Any],
        gradients: list[Any],
        sample_sqnorm_sum: tf.Tensor | None,
        loss_scale: Any,
    ) -> inner_step.Step:
        """Returns the step to take, in replica context.

        Args:
            variables: list of the variables that have a gradient.
            gradients: list of tensors or `tf.IndexedSlices`: the mean of this
                replica's samples, divided by the number of replicas and
                multiplied by the loss scale, as Keras's trainers pass it.
            sample_sqnorm_sum: scalar or None, the sum of the squared norms of
                this replica's samples, each divided and multiplied likewise.
            loss_scale: scalar, to be divided out, or None for 1.
        """
        raise NotImplementedError

    def empty_step(self) -> inner_step.Step:
        """Returns the step to take where only overwritten variables change."""
        return inner_step.Step([], tf.constant(True), learning_rate=0.0)

    def check_step(self, sample_sqnorm_sum: tf.Tensor | None) -> None:
        """Raises a ValueError if `plan_step` cannot plan from the arguments.

        Args:
            sample_sqnorm_sum: as for `plan_step`.
        """

    @property
    def needs_sample_sqnorms(self) -> bool:
        """Whether `apply` needs `sample_sqnorm_sum` of micro-batches."""
        return False

    def sample_sqnorm(
        self, gradients: list[Any], variables: list[Any]
    ) -> tf.Tensor:
        """Returns the squared norm of one sample, for `sample_sqnorm_sum`.

        Args:
            gradients: list of tensors, `tf.IndexedSlices` or None.
            variables: list of their variables.
        """
        raise NotImplementedError

    @property
    def merge_samples(
        self,
    ) -> Callable[[list[Any], list[Any]], list[Any]] | None:
        """Function that merges two samples' gradients, or None for the mean."""
        return None

    # For a subclass to read.

    def slot_indices(self, variables: list[Any]) -> list[int]:
        """Returns the place of each variable in a list of slots."""
        return [self._get_variable_index(variable) for variable in variables]

    # For users to read.

    @property
    def skipped_steps(self) -> tf.Tensor:
        """Scalar int64: steps skipped because a gradient was not finite.

        A `LossScaleOptimizer` around this optimizer skips steps without a call
        of it; these are not counted.
        """
        return tf.convert_to_tensor(self._skipped_steps)

    # The step.

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        *,
        sample_sqnorm_sum: tf.Tensor | None = None,
    ) -> keras.Variable:
        """Takes one step by pairs of a gradient and a variable; see `apply`.

        Returns:
            `iterations`.
        """
        pairs = list(grads_and_vars)
        self.apply(
            [gradient for gradient, _ in pairs],
            [variable for _, variable in pairs],
            sample_sqnorm_sum=sample_sqnorm_sum,
        )
        return self.iterations

    @tf.autograph.experimental.do_not_convert
    def apply(
        self,
        grads: Iterable[Any],
        trainable_variables: Iterable[Any] | None = None,
        *,
        sample_sqnorm_sum: tf.Tensor | None = None,
    ) -> None:
        """Takes one step, in replica context.

        A variable marked by `overwrite_with_gradient`, as float8's scales are,
        is overwritten by the largest of the replicas' gradients. It has no part
        in the gain, in clipping or in averages.

        Args:
            grads: list of tensors, arrays, `tf.IndexedSlices` or None: this
                replica's gradients divided by the number of replicas, as a loss
                that Keras reduced gives them. None leaves its variable alone,
                with a warning. An empty list does nothing.
            trainable_variables: list of variables; optional once the optimizer
                is built.
            sample_sqnorm_sum: scalar; for a replica that took several samples,
                of which `grads` is the mean, the sum of their squared norms,
                see `sample_sqnorm`.

        Raises:
            ValueError: if the gradients do not match the variables, the
                strategy in effect is not the one this optimizer was made under,
                the call comes from cross-replica context, or from an optimizer
                around this one on several replicas.
        """
        checks.check_context(self.name, [self, self._innermost])
        checks.check_does_not_accumulate(self._innermost, name=self.name)
        self._check_is_outermost()
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None and self.built:
            trainable_variables = self._trainable_variables
        grads, variables = checks.matched(grads, trainable_variables)
        self.check_step(sample_sqnorm_sum)
        if all(gradient is None for gradient in grads):
            raise ValueError(
                "`grads` must hold a gradient of at least one variable. Does "
                f"the loss depend on the weights? Received: grads={grads}"
            )
        if not self.built:
            self.build(variables)
        self._check_variables_are_known(variables)
        pairs = overwrites.split(
            *self._filter_empty_gradients(grads, variables)
        )
        step = self._planned(pairs, sample_sqnorm_sum)
        step = inner_step.combined(
            self._distribution_strategy, self._innermost, pairs.variables, step
        )
        self._take(pairs.variables, step)

    def _planned(self, pairs, sample_sqnorm_sum):
        """Returns the step to take, its gradients unscaled and clipped."""
        if pairs.gradients:
            scale = loss_scale.factor(self._loss_scaler())
            step = self.plan_step(
                pairs.variables, pairs.gradients, sample_sqnorm_sum, scale
            )
            gradients = [loss_scale.unscale(g, scale) for g in step.gradients]
            step = step._replace(
                gradients=self._innermost._clip_gradients(gradients)
            )
        else:
            step = self.empty_step()
        if not pairs.overwritten:
            return step
        assignments, finite = overwrites.assignments(pairs)
        return step._replace(
            finite=step.finite & finite,
            assignments=[*step.assignments, *assignments],
        )

    def _take(self, variables, step):
        """Lets the inner optimizer step on every device, or skips on all."""
        scaler, innermost = self._loss_scaler(), self._innermost
        taken = [
            *step.assignments,
            *loss_scale.assignments(scaler, finite=True),
        ]
        skipped = loss_scale.assignments(scaler, finite=False)
        skipped += [(self._skipped_steps, self._skipped_steps + 1)]
        before = []
        if step.base_steps is not None:
            weights = inner_step.averaged_weights(innermost)
            before = [tf.convert_to_tensor(weight) for weight, _ in weights]

        def take(strategy, gradients, rate, values, base_steps, before):
            updates.assign(strategy, [v for v, _ in taken], values)
            inner_step.update(strategy, innermost, variables, gradients, rate)
            inner_step.average(
                strategy, innermost, before=before, base_steps=base_steps
            )
            for variable in variables:
                inner_step.constrain(strategy, variable)
            updates.increment(strategy, self._iterations)  # apply_gradients'.
            updates.increment(strategy, self.iterations)

        def skip(strategy, values):
            updates.assign(strategy, [v for v, _ in skipped], values)

        updates.hand_off_if(
            step.finite,
            take,
            self._distribution_strategy,
            (
                step.gradients,
                step.learning_rate,
                [value for _, value in taken],
                step.base_steps,
                before,
            ),
            otherwise=skip,
            other_values=([value for _, value in skipped],),
        )


def with_scale_inside(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer whose loss scale, if any, is inside the wrapper.

    Args:
        optimizer: Keras optimizer, possibly a `LossScaleOptimizer` around a
            `Wrapper`, which then changes places with it.

    Example:

    >>> sgd = keras.optimizers.SGD()
    >>> with_scale_inside(sgd) is sgd
    True
    """
    inner = loss_scale.unwrap(optimizer)
    if not isinstance(inner, Wrapper):
        return optimizer
    if inner is not optimizer:
        inner.scale_inside(optimizer)
    inner._is_scaled_outside = False
    return inner
