"""An abstract Keras optimizer around another.

The inner optimizer keeps its slots, its settings and its `update_step`; the
wrapper decides which gradients and which learning rate reach it. The contract
is that of Keras's own `LossScaleOptimizer`.

Leans on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _learning_rate                   the rate as given: variable, schedule or
                                     callable
    _variables                       an optimizer's own variables
    _trainable_variables             the variables an optimizer was built on
    _get_variable_index              a variable's place among them
    _check_variables_are_known       raises for any other variable
    _distribution_strategy           the strategy an optimizer was made under
    _clip_gradients                  clipnorm, clipvalue and global_clipnorm
    _model_variables_moving_average  the slots of `use_ema`
"""

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_adascale import loss_scale, replicas, stepping


class Step(NamedTuple):
    """What one step does to the inner optimizer, each replica's copy of it.

    Attributes:
        gradients: list of tensors or `tf.IndexedSlices`, the mean gradients.
        finite: scalar bool, the same on every replica. If false, the step is
            skipped.
        learning_rate: scalar.
        base_steps: scalar, base steps that this step stands for in the average
            of the weights; None for one, as Keras has it.
        assignments: list of `(variable, value)` to assign if the step is taken.
    """

    gradients: list[Any]
    finite: tf.Tensor
    learning_rate: tf.Tensor
    base_steps: tf.Tensor | None
    assignments: list[tuple[Any, tf.Tensor]]


class Wrapper(keras.optimizers.Optimizer):
    """Abstract: plans a step its own way, then lets another optimizer take it.

    A subclass implements `plan` and `effective_learning_rate`.

    Args:
        optimizer: `keras.optimizers.Optimizer`, possibly a
            `keras.optimizers.LossScaleOptimizer`. From now on it steps only
            through this wrapper, which gives it its learning rate.
        name: string.
        **kwargs: refused; they belong to `optimizer`.

    Attributes:
        inner_optimizer: `optimizer`.
        microbatches: int, gradient samples that each replica takes per step.
            `tf_adascale.Model.compile` sets it.

    Raises:
        ValueError: if `optimizer` cannot be wrapped or `kwargs` are given.
    """

    def __init__(self, optimizer, *, name, **kwargs):
        _check_arguments(type(self).__name__, optimizer, kwargs)
        inner = loss_scale.stepping(optimizer)
        effective_rate = _Rate(lambda: self.effective_learning_rate)
        super().__init__(learning_rate=effective_rate, name=name)
        self.inner_optimizer = optimizer
        self.microbatches = 1
        # The user's rate stays where it is saved, among the inner optimizer's
        # variables: __setattr__ would track it here as well.
        object.__setattr__(self, "_learning_rate", inner._learning_rate)
        inner._learning_rate = effective_rate
        self._skipped_steps = self._add_scalar("skipped_steps", "int64")

    # What a subclass says.

    def plan(self, variables, gradients, sample_sqnorm, loss_scale) -> Step:
        """Returns what to do with one step's gradients, in replica context.

        Args:
            variables: list of the variables that have a gradient.
            gradients: list of tensors or `tf.IndexedSlices`: the mean of this
                replica's samples, divided by the number of replicas and
                multiplied by the loss scale, as Keras's trainers have it.
            sample_sqnorm: scalar or None, the sum of the squared norms of this
                replica's samples, each divided and multiplied likewise.
            loss_scale: scalar, to be divided out, or None for 1.
        """
        raise NotImplementedError

    def check_samples(self, sample_sqnorm):
        """Raises a ValueError if `plan` cannot do with what `apply` was given.

        Args:
            sample_sqnorm: as for `plan`.
        """

    @property
    def effective_learning_rate(self):
        """Scalar: the learning rate at the present progress."""
        raise NotImplementedError

    # How a replica's samples become one: by their mean and the sum of their
    # squared norms, unless a subclass says otherwise.

    @property
    def wants_sample_sqnorms(self):
        """Whether `apply` needs `sample_sqnorm` of micro-batches."""
        return False

    def sample_sqnorm(self, gradients, variables):
        """Returns the squared norm of one sample, as `apply` wants it.

        Args:
            gradients: list of tensors, `tf.IndexedSlices` or None.
            variables: list of their variables.
        """
        raise NotImplementedError

    @property
    def merge_samples(self):
        """What `microbatches.summed` merges samples by; None for their mean."""
        return None

    # What users read.

    @property
    def skipped_steps(self):
        """Scalar int64: steps left out for a gradient that was not finite."""
        return tf.convert_to_tensor(self._skipped_steps)

    @property
    def learning_rate(self):
        """The effective rate where it is a schedule, else the rate to be set.

        A rate that may be set reads as it was set, at the base batch size: for
        `keras.callbacks.ReduceLROnPlateau` and `LearningRateScheduler` set a
        multiple of what they read, and would set the gain along with it.
        """
        if isinstance(self._learning_rate, keras.Variable):
            return tf.convert_to_tensor(self._learning_rate)
        return self.effective_learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        keras.optimizers.Optimizer.learning_rate.fset(self, learning_rate)

    @property
    def iterations(self):
        """The inner optimizer's count of steps taken; skipped ones are not."""
        return self.inner_optimizer.iterations

    @property
    def variables(self):
        """List: this optimizer's own variables, then the inner one's."""
        return self._variables + self.inner_optimizer.variables

    # What a subclass needs of Keras.

    @property
    def num_replicas(self):
        """Int: replicas in sync, N."""
        return self._distribution_strategy.num_replicas_in_sync

    def base_learning_rate(self, step):
        """Returns the user's learning rate at a step of the base batch."""
        rate = self._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            rate = rate(step)
        elif not isinstance(rate, keras.Variable):
            rate = rate()
        return tf.convert_to_tensor(rate)

    def places(self, variables):
        """Returns where in a list of slots those of `variables` are."""
        return [self._get_variable_index(variable) for variable in variables]

    @property
    def _stepping(self):
        return loss_scale.stepping(self.inner_optimizer)

    # The Keras optimizer.

    def build(self, variables):
        """Creates the slots of this optimizer and of the inner one."""
        if self.built:
            return
        self._build_inner(variables)
        super().build(variables)

    def _build_inner(self, variables):
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        if self._stepping.use_ema:
            # keras.callbacks.SwapEMAWeights looks no deeper than this.
            object.__setattr__(
                self.inner_optimizer,
                "_model_variables_moving_average",
                self._stepping._model_variables_moving_average,
            )

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads, trainable_variables=None, *, sample_sqnorm=None):
        """Takes one step, in replica context.

        Args:
            grads: list of tensors, `tf.IndexedSlices` or None: this replica's
                gradients divided by the number of replicas, as they come from a
                loss that Keras reduced. None leaves its variable alone.
            trainable_variables: list of variables; may be left out once the
                optimizer is built.
            sample_sqnorm: scalar; for a replica that took several samples, of
                which `grads` is the mean, the sum of their squared norms.

        Raises:
            ValueError: if the gradients do not match the variables, the
                strategy in effect is not the one this optimizer was made under,
                or the call comes from cross-replica context.
        """
        self._check_context()
        grads = list(grads)
        variables = self._matched_variables(grads, trainable_variables)
        self.check_samples(sample_sqnorm)
        present = [(g, v) for g, v in zip(grads, variables) if g is not None]
        if not present:
            raise ValueError(
                "There is no gradient to apply. Expected a gradient for at "
                "least one variable: does the loss depend on the weights? "
                f"Received: grads={grads}"
            )
        if not self.built:
            self.build(variables)
        self._check_variables_are_known(variables)
        gradients, variables = map(list, zip(*present))
        step = self._finished_plan(variables, gradients, sample_sqnorm)
        self._take(variables, step)

    def _finished_plan(self, variables, gradients, sample_sqnorm):
        """Returns the plan with the inner optimizer's settings applied."""
        scale = loss_scale.factor(self.inner_optimizer)
        step = self.plan(variables, gradients, sample_sqnorm, scale)
        gradients = [loss_scale.divided(g, scale) for g in step.gradients]
        gradients = self._stepping._clip_gradients(gradients)
        return step._replace(gradients=gradients)

    def _take(self, variables, step):
        """Lets the inner optimizer step on every device, or skips on all."""
        inner, stepped = self.inner_optimizer, self._stepping
        taken = step.assignments + loss_scale.assignments(inner, finite=True)
        skipped = loss_scale.assignments(inner, finite=False)
        skipped += [(self._skipped_steps, self._skipped_steps + 1)]
        before = []
        if step.base_steps is not None:
            weights = stepping.averaged_weights(stepped)
            before = [tf.convert_to_tensor(weight) for weight in weights]

        def take(strategy, gradients, rate, values, base_steps, before):
            stepping.assign(strategy, [v for v, _ in taken], values)
            stepping.update(strategy, stepped, variables, gradients, rate)
            stepping.average(
                strategy, stepped, before=before, base_steps=base_steps
            )
            for variable in variables:
                stepping.constrain(strategy, variable)
            stepping.increment(strategy, self._iterations)  # apply_gradients'.
            stepping.increment(strategy, self.iterations)

        def skip(strategy, values):
            stepping.assign(strategy, [v for v, _ in skipped], values)

        values = [value for _, value in taken]
        self._if_finite(
            step.finite,
            take,
            (
                step.gradients,
                step.learning_rate,
                values,
                step.base_steps,
                before,
            ),
            skip,
            ([value for _, value in skipped],),
        )

    def _if_finite(self, finite, take, values, skip=None, other_values=()):
        """Calls `take(strategy, *values)` where variables may be updated."""

        def choose(strategy, finite, values, other_values):
            def taken():
                take(strategy, *values)
                return True

            def skipped():
                if skip is not None:
                    skip(strategy, *other_values)
                return False

            # TensorFlow refuses a condition around a collective; by now there
            # is none left to come.
            tf.cond(replicas.local(strategy, finite), taken, skipped)

        replicas.hand_off(
            choose, self._distribution_strategy, finite, values, other_values
        )

    # Loss scale.

    def scale_loss(self, loss):
        """Returns the loss multiplied by the inner optimizer's loss scale."""
        return self.inner_optimizer.scale_loss(loss)

    def add_loss_scale(self):
        """Puts a `LossScaleOptimizer` around the inner one, if none is."""
        if not loss_scale.is_dynamic(self.inner_optimizer):
            self.inner_optimizer = keras.optimizers.LossScaleOptimizer(
                self.inner_optimizer
            )
            if self.built:
                self._build_inner(self._trainable_variables)

    # Checks.

    def _check_context(self):
        if not replicas.in_replica_context():
            raise ValueError(
                "A step was asked for in cross-replica context. Expected "
                f"{self.name}.apply to be called inside strategy.run, once per "
                f"replica. Received: strategy={replicas.strategy()}"
            )
        made_under = {
            self._distribution_strategy,
            self._stepping._distribution_strategy,
        }
        if made_under != {replicas.strategy()}:
            raise ValueError(
                f"{self.name} or its inner optimizer was made outside the "
                "scope of the strategy that it is used in. Expected both to be "
                "made in `with strategy.scope():`. Received: optimizers made "
                f"under {made_under}, used under {replicas.strategy()}"
            )

    def _matched_variables(self, grads, variables):
        if variables is None and not self.built:
            raise ValueError(
                "Gradients came without variables. Expected "
                "`trainable_variables` in the first call, or a call of `build` "
                f"before it. Received: {len(grads)} gradients"
            )
        variables = list(
            self._trainable_variables if variables is None else variables
        )
        shapes = [None if g is None else _shape(g) for g in grads]
        expected = [tuple(v.shape) for v in variables]
        if len(grads) != len(variables) or not all(
            tf.TensorShape(g).is_compatible_with(v)
            for g, v in zip(shapes, expected)
        ):
            raise ValueError(
                "The gradients do not match the variables. Expected a gradient "
                f"of its shape, or None, for each of the variables {expected}. "
                f"Received: gradients of shapes {shapes}"
            )
        return variables

    # Saving. Keras saves the inner optimizer by itself: it is an attribute.

    def save_own_variables(self, store):
        """Saves this optimizer's own variables, and what belongs to them."""
        for index, variable in enumerate(self._variables):
            store[str(index)] = variable.numpy()
        store["shapes"] = self._shapes()

    def load_own_variables(self, store):
        """Loads what `save_own_variables` saved.

        Where nothing was saved, by a model without an optimizer, Keras warns.

        Raises:
            ValueError: if it is the state of another optimizer or model.
        """
        names = list(store.keys())  # Keras's stores have no iterator.
        if not names:
            super().load_own_variables(store)
            return
        expected = {
            str(index): list(variable.shape)
            for index, variable in enumerate(self._variables)
        }
        received = {name: list(store[name].shape) for name in names}
        # Keras loads the inner optimizer by itself, and another model's too.
        expected["shapes"] = self._shapes().tolist()
        if "shapes" in received:
            received["shapes"] = np.asarray(store["shapes"]).tolist()
        if expected != received:
            raise ValueError(
                f"The state saved for {self.name} is that of another optimizer "
                f"or model. Expected variables of these shapes: {expected}. "
                f"Received: {received}"
            )
        for index, variable in enumerate(self._variables):
            variable.assign(store[str(index)])

    def _shapes(self):
        """Returns rank and sizes of each slot and weight, all in one array."""
        variables = self.inner_optimizer.variables + self._trainable_variables
        shapes = [[len(v.shape), *v.shape] for v in variables]
        return np.array([size for shape in shapes for size in shape], "int64")

    def finalize_variable_values(self, var_list):
        """Ends training as the inner optimizer does."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Excludes variables from the inner optimizer's weight decay."""
        self._stepping.exclude_from_weight_decay(
            var_list=var_list, var_names=var_names
        )

    def get_config(self):
        """Returns the configuration, with the rate that the user gave."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        config = inner["config"]
        if loss_scale.is_dynamic(self.inner_optimizer):
            config = config["inner_optimizer"]["config"]
        config["learning_rate"] = super().get_config()["learning_rate"]
        return {"optimizer": inner, "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates an optimizer from what `get_config` returned."""
        config = dict(config)
        optimizer = keras.saving.deserialize_keras_object(
            config.pop("optimizer"), custom_objects=custom_objects
        )
        return cls(optimizer, **config)

    def _add_scalar(self, name, dtype):
        return self.add_variable((), "zeros", dtype=dtype, name=name)


class _Rate(keras.optimizers.schedules.LearningRateSchedule):
    """The inner optimizer's learning rate: what the wrapper says it is."""

    def __init__(self, rate):
        self._rate = rate

    def __call__(self, step):
        del step  # Iterations; the wrapper counts progress.
        return self._rate()

    def get_config(self):
        return {}  # Wrapper.get_config puts the user's rate in its place.


def _shape(gradient):
    """Returns a gradient's shape, or None if even its rank is unknown."""
    return None if gradient.shape.rank is None else tuple(gradient.shape)


def _check_arguments(name, optimizer, kwargs):
    if kwargs:
        raise ValueError(
            f"{name} does not take the arguments {sorted(kwargs)}. Expected "
            f"settings of the optimizer on the inner one, as in {name}("
            f"keras.optimizers.SGD(weight_decay=1e-4)). Received: {kwargs}"
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"{name} cannot wrap this object. Expected an instance of "
            f"keras.optimizers.Optimizer. Received: optimizer={optimizer!r}"
        )
    inner = loss_scale.stepping(optimizer)
    if isinstance(optimizer, Wrapper) or isinstance(inner, Wrapper):
        raise ValueError(
            f"{name} cannot wrap an optimizer that is a wrapper already. "
            "Expected a plain Keras optimizer, or a LossScaleOptimizer around "
            f"one. Received: optimizer={optimizer!r}"
        )
    if inner.gradient_accumulation_steps:
        raise ValueError(
            "The inner optimizer accumulates gradients itself, out of "
            f"{name}'s sight. Expected `microbatches` in "
            "tf_adascale.Model.compile instead. Received: "
            "gradient_accumulation_steps="
            f"{inner.gradient_accumulation_steps}"
        )
    if isinstance(inner._learning_rate, _Rate):
        raise ValueError(
            f"{name} cannot wrap an optimizer that is in a wrapper already. "
            "Expected a new optimizer. Received: "
            f"optimizer={optimizer!r}"
        )
    stepping.check(inner, name=name)
