"""A Keras optimizer that stands for another one.

It shows the inner optimizer's variables and learning rate as its own, and is
saved with it. Other settings, such as `clipnorm`, are read and made on the
inner optimizer. The step is that of `wrapper.Wrapper`.

Relies on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _learning_rate                   the rate as given: variable, schedule or
                                     callable
    _variables                       an optimizer's own variables
    _trainable_variables             the variables an optimizer was built on
    _distribution_strategy           the strategy an optimizer was made under
    _model_variables_moving_average  the slots of `use_ema`
    _untrack_variable                ends that a variable is saved
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_adascale.distribute import updates
from tf_adascale.ops import _keras
from tf_adascale.optimizers import (
    checks,
    effective_rate,
    inner_step,
    loss_scale,
    overwrites,
    saved_state,
)

# What Keras's constructor sets on every optimizer.
_SETTINGS = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "gradient_accumulation_steps",
)


class Delegate(keras.optimizers.Optimizer):
    """Abstract optimizer that has its variables and rate from an inner one.

    A subclass implements `effective_learning_rate`. A keyword argument of its
    constructor is an attribute of the same name.

    Args:
        inner_optimizer: `keras.optimizers.Optimizer`, possibly a
            `keras.optimizers.LossScaleOptimizer`. From now on its learning rate
            is the effective one.
        name: string.
        **kwargs: refused; they belong to `inner_optimizer`.

    Attributes:
        inner_optimizer: the argument.

    Raises:
        ValueError: if `inner_optimizer` cannot be wrapped or `kwargs` are
            given.
    """

    inner_optimizer: keras.optimizers.Optimizer
    _FIXED: tuple[str, ...] = ()  # Attributes that nobody sets later.

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
        rate = effective_rate.Rate(
            lambda: self.effective_learning_rate,
            lambda rate: setattr(self, "learning_rate", rate),
        )
        super().__init__(learning_rate=rate, name=name)
        self._effective_rate = rate
        # __getattr__ reads and __setattr__ makes them on the inner optimizer.
        for setting in _SETTINGS:
            delattr(self, setting)
        self.inner_optimizer = inner_optimizer
        # Whether an optimizer around this one scales the loss.
        self._is_scaled_outside = False
        self._take_rate_over()

    # The learning rate.

    @property
    def effective_learning_rate(self) -> tf.Tensor:
        """Scalar: the learning rate at the present progress."""
        raise NotImplementedError

    def base_learning_rate(self, step: keras.Variable) -> tf.Tensor:
        """Returns the user's learning rate, a float, at a base step.

        Args:
            step: variable, because Keras passes one to a schedule, and its
                arithmetic differs from that of a tensor.
        """
        rate = self._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            rate = rate(step)
        elif not isinstance(rate, keras.Variable):
            rate = rate()
        rate = tf.convert_to_tensor(rate)
        return rate if rate.dtype.is_floating else tf.cast(rate, tf.float32)

    # Where Keras keeps the rate as given.

    @property
    def _learning_rate(self):
        self._take_rate_over()
        return self._given_rate

    @_learning_rate.setter
    def _learning_rate(self, rate):
        self._given_rate = rate

    def _take_rate_over(self):
        """Makes a rate set on the inner optimizer this one's."""
        if "inner_optimizer" not in vars(self):
            return
        innermost, before = self._innermost, self._given_rate
        rate = innermost._learning_rate
        if rate is not self._effective_rate:
            if isinstance(before, keras.Variable) and rate is not before:
                innermost._untrack_variable(before)
            # The inner one saves a variable. __setattr__ would track it too.
            object.__setattr__(self, "_given_rate", rate)
            innermost._learning_rate = self._effective_rate

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
        innermost = self._innermost
        innermost._learning_rate = self._learning_rate
        innermost.learning_rate = learning_rate
        self._take_rate_over()

    # Variables.

    def build(self, variables: list[Any]) -> None:
        """Creates the slots of this optimizer and of the inner one."""
        if self.built:
            return
        self._check_is_outermost()
        variables = list(variables)  # Keras's LossScaleOptimizer has a tuple.
        self._build_inner(variables)
        object.__setattr__(self, "use_ema", False)  # Else averages are built.
        try:
            super().build(variables)
        finally:
            object.__delattr__(self, "use_ema")

    def _build_inner(self, variables):
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        if self._innermost.use_ema:
            # keras.callbacks.SwapEMAWeights looks no deeper than these.
            for optimizer in (self, self.inner_optimizer):
                object.__setattr__(
                    optimizer,
                    "_model_variables_moving_average",
                    self._innermost._model_variables_moving_average,
                )

    @property
    def _innermost(self):
        return loss_scale.unwrap(self.inner_optimizer)

    @property
    def num_replicas(self) -> int:
        """Int: replicas in sync, N."""
        return self._distribution_strategy.num_replicas_in_sync

    @property
    def iterations(self) -> keras.Variable:
        """The inner optimizer's count of steps taken, without skipped ones."""
        return self.inner_optimizer.iterations

    @property
    def variables(self) -> list[Any]:
        """List: this optimizer's own variables, then the inner one's."""
        self._take_rate_over()  # A schedule may have replaced a variable.
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
        received = [np.shape(weight) for weight in weights]
        if expected != received:
            raise ValueError(
                "`weights` must hold an array of its shape for each of "
                f"`variables`, which have the shapes {expected}. Received: "
                f"arrays of the shapes {received}"
            )
        for variable, weight in zip(self.variables, weights):
            variable.assign(weight)

    def _add_scalar(self, name, dtype):
        return self.add_variable((), "zeros", dtype=dtype, name=name)

    # The loss scale.

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
            is_dynamic = loss_scale.is_dynamic(self.inner_optimizer)
            self._is_scaled_outside = value is None or is_dynamic
            self._innermost.loss_scale_factor = value
        if name in self._FIXED and vars(self).get(name, value) != value:
            raise ValueError(
                f"`{name}` must be passed to the constructor of "
                f"{type(self).__name__}, which checks it and makes what it "
                f"needs. Received: {name}={value!r}"
            )
        if self._is_of_inner(name):
            setattr(self._innermost, name, value)
        else:
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
        if loss_scale.is_dynamic(self.inner_optimizer):
            return
        new: Any = scaler or keras.optimizers.LossScaleOptimizer(
            self._innermost
        )
        new.inner_optimizer = self._innermost
        self.inner_optimizer = new
        if self.built:
            self._build_inner(self._trainable_variables)

    def _check_is_outermost(self):
        if self._is_scaled_outside:
            checks.check_is_outermost(self.name, self.num_replicas)

    # The end of training, and settings of the inner optimizer.

    def __getattr__(self, name):
        if not name.startswith("_") and "inner_optimizer" in vars(self):
            return getattr(self._innermost, name)
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}"
        )

    def _is_of_inner(self, name):
        """Returns whether to set an attribute is to set the inner one's."""
        if name.startswith("_") or "inner_optimizer" not in vars(self):
            return False
        is_own = (
            name in vars(self)
            or hasattr(type(self), name)
            or name in inspect.signature(type(self)).parameters
        )
        return not is_own and hasattr(self._innermost, name)

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
        self._innermost.exclude_from_weight_decay(var_list, var_names)

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

    # Saving. Keras saves the inner optimizer by itself: it is an attribute.

    def save_own_variables(self, store: Any) -> None:
        """Saves this optimizer's own variables, and all other shapes.

        One that is not built saves nothing, which is loaded with a warning.
        """
        if self.built:
            saved_state.save(store, self._variables, self._other_variables)

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` saved.

        Warns and loads nothing, as Keras does, if this optimizer is not built
        or the file has none, or one without a wrapper.

        Raises:
            ValueError: if it is the state of another wrapper or model.
        """
        keys = list(store.keys())  # Keras's stores have no iterator.
        if not keys:
            super().load_own_variables(store)
        elif not self.built:
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', "
                "because it is not built.",
                stacklevel=2,
            )
        elif not saved_state.is_of_wrapper(keys):
            warnings.warn(
                f"The state of `{self.name}` is not loaded: the file has that "
                "of an optimizer of another kind.",
                stacklevel=2,
            )
        else:
            saved_state.load(
                store, self._variables, self._other_variables, name=self.name
            )

    @property
    def _other_variables(self):
        # Those of float8 come at other places in a model that was loaded.
        return self.variables[len(self._variables) :] + [
            variable
            for variable in self._trainable_variables
            if not overwrites.is_overwritten(variable)
        ]

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration, with the rate that the user gave."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        config = inner["config"]
        if loss_scale.is_dynamic(self.inner_optimizer):
            config = config["inner_optimizer"]["config"]
        if "learning_rate" in config:
            config["learning_rate"] = super().get_config()["learning_rate"]
        return {"inner_optimizer": inner, "name": self.name}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> "Delegate":
        """Creates an optimizer from what `get_config` returned."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)
