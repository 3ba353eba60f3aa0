"""The step of a Keras optimizer, taken on every device's copy of its variables.

Call these functions only inside a function passed to `updates.hand_off`. There
Keras's own `apply` does not work: it would reduce the gradients and leave the
context. Values are each device's own.

Relies on what Keras optimizers do not document. Checked on Keras 3.10 to 3.15,
these are

    _value                           the variable behind a `keras.Variable`
    _use_weight_decay                whether a variable decays
    _trainable_variables             the variables an optimizer was built on
    _model_variables_moving_average  the slots of `use_ema`
    _u_product                       Nadam's, which belongs to no variable
    _should_use_adamw                whether Muon steps a variable as AdamW

and the methods that `REPLACED` lists.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_adascale.distribute import updates
from tf_adascale.ops import ema as ema_ops
from tf_adascale.optimizers import effective_rate

# Methods and properties of Keras's optimizers that a wrapper does without. An
# optimizer that overrides one of them would be followed in part only.
REPLACED = (
    "apply",
    "apply_gradients",
    "stateless_apply",
    "iterations",
    "learning_rate",
    "_all_reduce_sum_gradients",
    "_apply_weight_decay",
    "_backend_apply_gradients",
    "_backend_update_step",
    "_check_variables_are_known",
    "_distributed_tf_update_step",
    "_filter_empty_gradients",
    "_get_current_learning_rate",
    "_overwrite_model_variables_with_average_value",
    "_overwrite_variable_with_gradient",
    "_overwrite_variables_directly_with_gradients",
    "_update_model_variables_moving_average",
)

# Overrides that `update` knows.
_NADAM = keras.optimizers.Nadam
_MUON = getattr(keras.optimizers, "Muon", ())
_KNOWN = (
    (_NADAM, "_backend_update_step"),
    (_MUON, "_apply_weight_decay"),
)


class Step(NamedTuple):
    """One step of the inner optimizer, the same on every replica.

    Attributes:
        gradients: list of tensors or `tf.IndexedSlices`, the mean gradients;
            with `combine_updates`, this replica's own.
        finite: scalar bool. If false, the step is skipped.
        learning_rate: scalar.
        base_steps: scalar, base steps that this step stands for in the average
            of the weights; None for one, which is Keras's own average.
        assignments: list of `(variable, value)` to assign if the step is taken.
        combine_updates: callable. If given, every replica first takes the step
            by its own gradients; the callable turns the list of its changes of
            the variables into the list of changes that all replicas apply.
    """

    gradients: list[Any]
    finite: tf.Tensor
    learning_rate: Any
    base_steps: tf.Tensor | None = None
    assignments: Sequence[tuple[Any, tf.Tensor]] = ()
    combine_updates: Callable[[list[tf.Tensor]], list[tf.Tensor]] | None = None


def check(optimizer: keras.optimizers.Optimizer, *, name: str) -> None:
    """Raises a ValueError if an optimizer steps in another way than `update`.

    Args:
        optimizer: Keras optimizer, not a wrapper.
        name: str, the wrapper that asks.

    Example:

    >>> check(keras.optimizers.SGD(), name="AdaScale")
    """
    known = [(hook, getattr(cls, hook)) for cls, hook in _KNOWN if cls]
    check_overrides(
        optimizer, keras.optimizers.Optimizer, REPLACED, known, name=name
    )


def check_overrides(
    optimizer: keras.optimizers.Optimizer,
    base: type,
    hooks: Sequence[str],
    known: Sequence[tuple[str, Any]] = (),
    *,
    name: str,
) -> None:
    """Raises a ValueError if an optimizer overrides what a wrapper replaces.

    Args:
        optimizer: Keras optimizer.
        base: class of Keras whose methods and properties count.
        hooks: their names.
        known: pairs of a name and an override that the wrapper knows.
        name: str, the wrapper that asks.

    Example:

    >>> check_overrides(keras.optimizers.SGD(), keras.optimizers.Optimizer,
    ...                 ["apply"], name="AdaScale")
    """
    overridden = [
        hook
        for hook in hooks
        if hook in vars(optimizer)
        or (hook, getattr(type(optimizer), hook, None))
        not in [*known, (hook, getattr(base, hook, None))]
    ]
    if overridden:
        raise ValueError(
            "`inner_optimizer` must not override "
            f"keras.optimizers.{base.__name__}.{overridden[0]}: {name} takes "
            "its step without calling it. Received: "
            f"inner_optimizer={optimizer!r}, which overrides {overridden}"
        )


def update(
    strategy: tf.distribute.Strategy,
    optimizer: keras.optimizers.Optimizer,
    variables: list[Any],
    gradients: list[Any],
    rate: Any,
) -> None:
    """Takes an optimizer's step: weight decay, slots and weights.

    Args:
        strategy: `tf.distribute.Strategy`.
        optimizer: Keras optimizer that passes `check`, built.
        variables: list of those to update.
        gradients: list of tensors or `tf.IndexedSlices`.
        rate: scalar, the learning rate.

    Example:

    >>> sgd, weight = keras.optimizers.SGD(), keras.Variable([1.0])
    >>> sgd.build([weight])
    >>> update(updates.strategy(), sgd, [weight], [tf.constant([2.0])], 0.25)
    >>> weight.numpy().tolist()
    [0.5]
    """

    def update_one(variable, gradient, rate, *, decay):
        # Keras's _apply_weight_decay would leave the context of the update.
        if decay is not None:
            variable.assign_sub(
                variable
                * tf.cast(decay, variable.dtype)
                * tf.cast(rate, variable.dtype)
            )
        with effective_rate.held(optimizer, rate):
            optimizer.update_step(gradient, variable, rate)

    if gradients and isinstance(optimizer, _NADAM):
        _advance_nadam(strategy, optimizer)
    for variable, gradient in zip(variables, gradients):
        decay = _weight_decay(optimizer, variable)
        updates.update(
            strategy,
            variable,
            functools.partial(update_one, decay=decay),
            gradient,
            rate,
        )


def combined(
    strategy: tf.distribute.Strategy,
    optimizer: keras.optimizers.Optimizer,
    variables: list[Any],
    step: Step,
) -> Step:
    """Takes each replica's own step if they are to be combined, then does so.

    Call it in replica context.

    Args:
        strategy: `tf.distribute.Strategy`.
        optimizer: Keras optimizer that passes `check`, built.
        variables: list of those to update.
        step: `Step`.

    Returns:
        `Step` without gradients, whose assignments apply the combined changes;
        the step itself if it has no `combine_updates`.

    Example:

    >>> sgd, weight = keras.optimizers.SGD(), keras.Variable([1.0])
    >>> sgd.build([weight])
    >>> step = Step([tf.constant([2.0])], tf.constant(True), 0.25,
    ...             combine_updates=lambda changes: changes)
    >>> step = combined(updates.strategy(), sgd, [weight], step)
    >>> [(_, value)] = step.assignments
    >>> step.gradients, value.numpy().tolist()
    ([], [0.5])
    """
    if step.combine_updates is None:
        return step
    before = [tf.convert_to_tensor(v) for v in variables]
    updates.hand_off_if(
        step.finite,
        lambda strategy, *values: update(
            strategy, optimizer, variables, *values
        ),
        strategy,
        (step.gradients, step.learning_rate),
    )
    changes = [tf.convert_to_tensor(v) - b for v, b in zip(variables, before)]
    assignments = [
        (v, b + change)
        for v, b, change in zip(
            variables, before, step.combine_updates(changes)
        )
    ]
    return step._replace(
        gradients=[], assignments=[*step.assignments, *assignments]
    )


def averaged_weights(
    optimizer: keras.optimizers.Optimizer,
) -> list[tuple[Any, Any]]:
    """Returns a list of each variable that `use_ema` averages, and its slot.

    Example:

    >>> averaged_weights(keras.optimizers.SGD())
    []
    """
    if not optimizer.use_ema:
        return []
    pairs = zip(
        optimizer._trainable_variables,
        optimizer._model_variables_moving_average,
    )
    # A variable that its gradient overwrites has no slot.
    return [(variable, slot) for variable, slot in pairs if slot is not None]


def average(
    strategy: tf.distribute.Strategy,
    optimizer: keras.optimizers.Optimizer,
    *,
    before: list[tf.Tensor],
    base_steps: tf.Tensor | None,
) -> None:
    """Advances the averages of `use_ema`, once the weights are updated.

    To be called before the optimizer's iterations are incremented.

    Args:
        strategy: `tf.distribute.Strategy`.
        optimizer: Keras optimizer, built.
        before: list of tensors, the variables of `averaged_weights` before the
            step.
        base_steps: scalar, base steps that the step stands for, see
            `ema_ops.advance_average`; None for one, as Keras has it.

    Example:

    >>> sgd = keras.optimizers.SGD(use_ema=True, ema_momentum=0.5)
    >>> weight = keras.Variable([1.0])
    >>> sgd.build([weight])
    >>> average(updates.strategy(), sgd, before=[], base_steps=None)
    >>> sgd._model_variables_moving_average[0].numpy().tolist()
    [1.0]
    """
    momentum = optimizer.ema_momentum if optimizer.use_ema else None
    period = optimizer.ema_overwrite_frequency
    iterations = optimizer.iterations.value

    def by_one(average, variable):
        started = tf.cast(iterations > 0, average.dtype)
        average.assign(
            ema_ops.update_average(average, variable, started * momentum)
        )

    def by_several(average, variable, before, steps):
        steps = tf.cast(steps, average.dtype)
        first = before + (variable - before) / steps
        start = tf.where(iterations > 0, average, first)
        average.assign(
            ema_ops.advance_average(
                start, before, variable, momentum=momentum, steps=steps
            )
        )

    def overwrite(variable, average):
        due = (iterations + 1) % period == 0
        variable.assign(tf.where(due, average, variable))

    for place, (variable, slot) in enumerate(averaged_weights(optimizer)):
        if base_steps is None:
            updates.update(strategy, slot, by_one, variable)
        else:
            updates.update(
                strategy, slot, by_several, variable, before[place], base_steps
            )
        if period:
            updates.update(strategy, variable, overwrite, slot)


def constrain(strategy: tf.distribute.Strategy, variable: Any) -> None:
    """Applies a variable's constraint, if any.

    Example:

    >>> layer = keras.layers.Dense(1, kernel_constraint="non_neg")
    >>> layer.build((1, 1))
    >>> _ = layer.kernel.assign([[-1.0]])
    >>> constrain(updates.strategy(), layer.kernel)
    >>> layer.kernel.numpy().item() >= 0  # Keras 3.10 makes it -0.0.
    True
    """
    constraint = getattr(variable, "constraint", None)
    if constraint is None:
        return

    def constrain_one(native):
        shown = native
        if isinstance(variable, keras.Variable):  # As Keras's `apply` has it.
            shown = copy.copy(variable)
            object.__setattr__(shown, "_value", native)
        native.assign(constraint(shown))

    updates.update(strategy, variable, constrain_one)


def _weight_decay(optimizer, variable):
    """Returns the weight decay of a variable, or None."""
    # Keras 3.10's Muon decays weights as any optimizer does.
    if hasattr(optimizer, "adam_weight_decay") and isinstance(optimizer, _MUON):
        # Muon looks at a variable's path, which only Keras's variables have.
        if not optimizer._use_weight_decay(variable):
            return None
        if optimizer._should_use_adamw(variable):
            return optimizer.adam_weight_decay
        return optimizer.weight_decay
    if optimizer.weight_decay is None or not optimizer._use_weight_decay(
        updates.native(variable)
    ):
        return None
    return optimizer.weight_decay


def _advance_nadam(strategy, nadam):
    """Advances the one variable of Nadam that serves all weights.

    u <- u beta_1 (1 - 0.96^(t+1) / 2)
    """
    step = tf.cast(nadam.iterations.value + 1, nadam._u_product.dtype)
    factor = 1 - 0.5 * 0.96**step
    updates.update(
        strategy,
        nadam._u_product,
        lambda u, x: u.assign(u * nadam.beta_1 * x),  # In the order of Keras.
        factor,
    )
