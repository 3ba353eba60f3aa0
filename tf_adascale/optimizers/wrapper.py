"""An abstract Keras optimizer around another.

The inner optimizer keeps its slots, its settings and its `update_step`. The
wrapper decides which gradients and which learning rate reach it. The contract
is that of Keras's own `LossScaleOptimizer`.

Relies on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _learning_rate                   the rate as given: variable, schedule or
                                     callable
    _iterations                      the variable behind `iterations`
    _variables                       an optimizer's own variables
    _trainable_variables             the variables an optimizer was built on
    _get_variable_index              a variable's place among them
    _check_variables_are_known       raises for any other variable
    _distribution_strategy           the strategy an optimizer was made under
    _filter_empty_gradients          warns of variables without a gradient
    _clip_gradients                  clipnorm, clipvalue and global_clipnorm
    _model_variables_moving_average  the slots of `use_ema`
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_adascale.distribute import updates
from tf_adascale.ops import _keras
from tf_adascale.optimizers import (
    checks,
    inner_step,
    loss_scale,
    overwrites,
    saved_state,
)


def with_scale_inside(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer whose loss scale, if any, is inside the wrapper.

    Args:
        optimizer: Keras optimizer, possibly a `LossScaleOptimizer` around a
            wrapper, which then changes places with it.

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


class Wrapper(keras.optimizers.Optimizer):
    """Abstract optimizer: plans a step that an inner optimizer then takes.

    A subclass implements

        plan_step(...)            the step, from one replica's gradients
        effective_learning_rate   the learning rate at the present progress

    and may override

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

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        *,
        name: str,
        **kwargs: Any,
    ):
        checks.check_inner_optimizer(
            inner_optimizer, kwargs, wrapper=type(self).__name__
        )
        innermost = loss_scale.unwrap(inner_optimizer)
        effective_rate = inner_step.Rate(lambda: self.effective_learning_rate)
        super().__init__(learning_rate=effective_rate, name=name)
        self.inner_optimizer = inner_optimizer
        self.microbatches = 1
        # Whether an optimizer around this one scales the loss.
        self._is_scaled_outside = False
        # The user's rate stays where it is saved, among the inner optimizer's
        # variables. __setattr__ would track it here as well.
        object.__setattr__(self, "_learning_rate", innermost._learning_rate)
        innermost._learning_rate = effective_rate
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

    @property
    def effective_learning_rate(self) -> tf.Tensor:
        """Scalar: the learning rate at the present progress."""
        raise NotImplementedError

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

    @property
    def num_replicas(self) -> int:
        """Int: replicas in sync, N."""
        return self._distribution_strategy.num_replicas_in_sync

    def base_learning_rate(self, step: keras.Variable) -> tf.Tensor:
        """Returns the user's learning rate at a step of the base batch.

        Args:
            step: variable, because Keras passes one to a schedule, and its
                arithmetic differs from that of a tensor.
        """
        rate = self._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            rate = rate(step)
        elif not isinstance(rate, keras.Variable):
            rate = rate()
        return tf.convert_to_tensor(rate)

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

    @property
    def learning_rate(self) -> keras.Variable | tf.Tensor:
        """The effective rate of a schedule, or the variable of the base rate.

        A rate given as a number is a variable, as in Keras, and reads as it was
        set, at the base batch size. `keras.callbacks.ReduceLROnPlateau` and
        `LearningRateScheduler` set a multiple of what they read, and would
        otherwise include the gain.
        """
        if isinstance(self._learning_rate, keras.Variable):
            return self._learning_rate
        return self.effective_learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        keras.optimizers.Optimizer.learning_rate.fset(self, learning_rate)

    @property
    def iterations(self) -> keras.Variable:
        """The inner optimizer's count of steps taken, without skipped ones."""
        return self.inner_optimizer.iterations

    @property
    def variables(self) -> list[Any]:
        """List: this optimizer's own variables, then the inner one's."""
        return self._variables + self.inner_optimizer.variables

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets all variables, those of the inner optimizer too.

        Args:
            weights: list of arrays, the values of `variables`.

        Raises:
            ValueError: if the optimizer is not built, or the arrays do not
                match `variables`.
        """
        if not self.built:
            super().set_weights(weights)  # Raises.
        expected = [tuple(variable.shape) for variable in self.variables]
        received = [tuple(weight.shape) for weight in weights]
        if expected != received:
            raise ValueError(
                "`weights` must hold an array of its shape for each of "
                f"`variables`, which have the shapes {expected}. Received: "
                f"arrays of the shapes {received}"
            )
        for variable, weight in zip(self.variables, weights):
            variable.assign(weight)

    def __repr__(self):
        parameters = inspect.signature(type(self)).parameters.values()
        settings = [
            f"{parameter.name}={getattr(self, parameter.name)!r}"
            for parameter in parameters
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        inner = type(self._innermost).__name__
        if loss_scale.is_dynamic(self.inner_optimizer):
            inner = f"{type(self.inner_optimizer).__name__}({inner})"
        return f"{type(self).__name__}({', '.join([inner, *settings])})"

    def __str__(self):
        # Keras 2 refuses it with an error that ends in this.
        return repr(self) + _keras.note_for_version_2()

    # The Keras optimizer.

    def build(self, variables: list[Any]) -> None:
        """Creates the slots of this optimizer and of the inner one."""
        if self.built:
            return
        self._check_is_outermost()
        self._build_inner(variables)
        super().build(variables)

    def _build_inner(self, variables):
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        if self._innermost.use_ema:
            # keras.callbacks.SwapEMAWeights looks no deeper than this.
            object.__setattr__(
                self.inner_optimizer,
                "_model_variables_moving_average",
                self._innermost._model_variables_moving_average,
            )

    @property
    def _innermost(self):
        return loss_scale.unwrap(self.inner_optimizer)

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
        is overwritten by its gradient, on several replicas by the largest. It
        has no part in the gain, in clipping or in averages.

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

    def _check_is_outermost(self):
        if self._is_scaled_outside:
            checks.check_is_outermost(self.name, self.num_replicas)

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
            step = inner_step.Step([], tf.constant(True), learning_rate=0.0)
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

    # Loss scale.

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss multiplied by the inner optimizer's loss scale.

        Unchanged if an optimizer around this one scales the loss.
        """
        return self._loss_scaler().scale_loss(loss)

    def __setattr__(self, name, value):
        # An optimizer that scales the loss, such as `LossScaleOptimizer`, sets
        # `loss_scale_factor` on the one that it gets inside. Keras would not
        # call the setter of a property that already has the value.
        if name == "loss_scale_factor" and "inner_optimizer" in vars(self):
            self._innermost.loss_scale_factor = value
            self._is_scaled_outside = True
        super().__setattr__(name, value)

    def _loss_scaler(self):
        """Returns the optimizer whose loss scale is in effect."""
        # Not a property: Keras saves what an attribute holds.
        if self._is_scaled_outside:
            return self._innermost
        return self.inner_optimizer

    def scale_inside(
        self, scaler: keras.optimizers.LossScaleOptimizer | None = None
    ) -> None:
        """Puts a `LossScaleOptimizer` around the inner one if it is none.

        Args:
            scaler: `LossScaleOptimizer` around this optimizer, which moves
                inside; None for a new one.
        """
        if not loss_scale.is_dynamic(self.inner_optimizer):
            if scaler is None:
                scaler = keras.optimizers.LossScaleOptimizer(self._innermost)
            scaler.inner_optimizer = self._innermost
            self.inner_optimizer = scaler
            if self.built:
                self._build_inner(self._trainable_variables)

    # Saving. Keras saves the inner optimizer by itself: it is an attribute.

    def save_own_variables(self, store: Any) -> None:
        """Saves this optimizer's own variables, and all other shapes."""
        saved_state.save(store, self._variables, self._other_variables)

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` saved.

        If the saved model had no optimizer, Keras warns.

        Raises:
            ValueError: if it is the state of another optimizer or model.
        """
        if not list(store.keys()):  # Keras's stores have no iterator.
            super().load_own_variables(store)
            return
        saved_state.load(
            store, self._variables, self._other_variables, name=self.name
        )

    @property
    def _other_variables(self):
        return self.inner_optimizer.variables + self._trainable_variables

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Ends training as the inner optimizer does."""
        innermost = self._innermost
        if innermost.use_ema and any(map(overwrites.is_overwritten, var_list)):
            # Keras would look for averages of overwritten variables too.
            weights, averages = zip(*inner_step.averaged_weights(innermost))
            updates.assign(self._distribution_strategy, weights, averages)
        else:
            self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(
        self,
        var_list: list[Any] | None = None,
        var_names: list[str] | None = None,
    ) -> None:
        """Excludes variables from the inner optimizer's weight decay."""
        self._innermost.exclude_from_weight_decay(
            var_list=var_list, var_names=var_names
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration, with the rate that the user gave."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        config = inner["config"]
        if loss_scale.is_dynamic(self.inner_optimizer):
            config = config["inner_optimizer"]["config"]
        config["learning_rate"] = super().get_config()["learning_rate"]
        return {"inner_optimizer": inner, "name": self.name}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> "Wrapper":
        """Creates an optimizer from what `get_config` returned."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)

    def _add_scalar(self, name, dtype):
        return self.add_variable((), "zeros", dtype=dtype, name=name)
