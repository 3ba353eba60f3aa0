"""Executions: what `fit`, `evaluate` and `train_on_batch` call.

One *step* takes one batch: every replica computes on its part of it. One
*execution* is up to `steps_per_execution` steps in one call from Python. The
loop over the steps is in `Executor._execute`.

Relies on `_element_spec` of `tf.experimental.Optional`, which TensorFlow does
not document and Keras's own loop sets too. Checked on TensorFlow 2.18 to 2.21.
And on `_keras_mask`, where Keras keeps a tensor's mask. Checked on Keras 3.10
to 3.15.
"""

import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_adascale.training import microbatches


class Executor:
    """Function of an iterator of batches that returns the last step's outputs.

    Keras calls it in place of its own train and test functions.

    Args:
        step: callable of a replica's batch, once per replica, that returns
            nested numbers or tensors, such as a dict of metrics.
        strategy: `tf.distribute.Strategy` of the replicas.
        steps_per_execution: int >= 1, steps per call.
        run_eagerly: bool, whether not to compile to graphs.

    Example:

    >>> double = Executor(
    ...     lambda batch: {"double": 2.0 * batch},
    ...     strategy=tf.distribute.get_strategy(), steps_per_execution=2)
    >>> dataset = tf.data.Dataset.from_tensor_slices([1.0, 2.0, 3.0])
    >>> iterator = iter(dataset)
    >>> [float(double(iterator)["double"]) for _ in range(2)]
    [4.0, 6.0]
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        *,
        strategy: tf.distribute.Strategy,
        steps_per_execution: int = 1,
        run_eagerly: bool = False,
    ):
        self._step_of_replica = step
        self._strategy = strategy
        self._steps_per_execution = steps_per_execution
        if not run_eagerly:
            options = {"autograph": False, "reduce_retracing": True}
            self._execute = tf.function(self._execute, **options)
            self._execute_on = tf.function(self._execute_on, **options)

    def __call__(self, iterator):
        """Takes the steps; returns their last outputs, means over replicas.

        Raises:
            ValueError: if micro-batches do not divide a batch.
            tf.errors.OutOfRangeError, StopIteration: if no batch is left.
        """
        try:
            if hasattr(iterator, "get_next_as_optional"):
                return self._execute(iterator)
            # A Python iterator, of train_on_batch and test_on_batch.
            outputs = {}
            for _, batch in zip(range(self._steps_per_execution), iterator):
                outputs = self._execute_on(batch)
            return outputs
        except tf.errors.InvalidArgumentError as error:
            uneven = microbatches.uneven_error(error)
            if uneven is None:
                raise
            raise uneven from error

    def _execute(self, iterator):
        """Takes the steps of one execution, fewer where the data end."""
        if self._steps_per_execution == 1:
            return self._mean(self._step(iterator.get_next()))

        # The loop's variables are typed before its body is traced, but only a
        # trace of the step tells the types of its outputs. An Optional can be
        # told them later.
        no_outputs = tf.experimental.Optional.empty(None)

        def told(optional):
            optional._element_spec = no_outputs.element_spec
            return optional

        def is_due(steps, has_batch, _):
            return has_batch & (steps < self._steps_per_execution)

        def take(steps, _, outputs):
            batch = iterator.get_next_as_optional()

            def step():
                received = tf.experimental.Optional.from_value(
                    self._step(batch.get_value())
                )
                no_outputs._element_spec = received.element_spec
                return received

            outputs = tf.cond(batch.has_value(), step, lambda: told(outputs))
            return steps + 1, batch.has_value(), outputs

        _, _, outputs = tf.while_loop(
            is_due, take, (0, tf.constant(True), no_outputs)
        )

        def end():
            iterator.get_next()  # Raises, because no batch is left.
            return False

        with tf.control_dependencies(
            [tf.cond(outputs.has_value(), lambda: True, end)]
        ):
            outputs = told(outputs).get_value()
        return self._mean(outputs)

    def _execute_on(self, batch):
        """Takes one step."""
        return self._mean(self._step(batch))

    def _step(self, batch):
        """Takes one step on all replicas; returns their outputs."""

        def step(batch):
            # Keras 3.10 run eagerly returns floats, of which there is no mean.
            return map_present(
                tf.convert_to_tensor, self._step_of_replica(batch)
            )

        return self._strategy.run(step, args=(without_optionals(batch),))

    def _mean(self, outputs):
        """Returns the means of outputs over the replicas."""
        return map_present(
            lambda value: self._strategy.reduce("MEAN", value, axis=None),
            outputs,
        )


def map_present(function: Callable[[Any], Any], structure: Any) -> Any:
    """Returns nested values, each but None replaced by a function of it.

    Example:

    >>> map_present(abs, {"x": -1, "sample_weight": None})
    {'x': 1, 'sample_weight': None}
    """
    return keras.tree.map_structure(
        lambda value: None if value is None else function(value), structure
    )


def without_optionals(batch: Any) -> Any:
    """Returns a batch with None where Keras 3.15 has an empty Optional.

    Example:

    >>> empty = tf.experimental.Optional.empty(tf.TensorSpec([]))
    >>> without_optionals((1, empty))
    (1, None)
    """
    return map_present(
        lambda value: (
            None if isinstance(value, tf.experimental.Optional) else value
        ),
        batch,
    )


class CompiledPass:
    """A function compiled by XLA, for one graph that calls it.

    Another graph gets another one, because what the function reads from Python,
    such as attributes of a model, may have changed when that graph is made.

    Not a tuple, in which Keras would find the variables.

    Args:
        function: callable of nested tensors.
        variables: list of those that it uses.

    Example:

    >>> compiled = CompiledPass(lambda x: x + 1, [])
    >>> int(compiled.function(tf.constant(1))), compiled.is_of([])
    (2, True)
    """

    def __init__(self, function: Callable[..., Any], variables: list[Any]):
        self._variables = list(variables)
        self._graph = weakref.ref(tf.compat.v1.get_default_graph())
        self.function = tf.function(
            function, autograph=False, jit_compile=True, reduce_retracing=True
        )

    def is_of(self, variables: list[Any]) -> bool:
        """Returns whether it is for this graph and for these variables."""
        return self._graph() is tf.compat.v1.get_default_graph() and list(
            map(id, variables)
        ) == list(map(id, self._variables))


def masks(tensors: Any) -> Any:
    """Returns the nested masks that Keras attached to tensors, None for none.

    Example:

    >>> masks([tf.constant(1)])
    [None]
    """
    return keras.tree.map_structure(
        lambda tensor: getattr(tensor, "_keras_mask", None), tensors
    )


def put_masks(tensors: Any, masks: Any) -> None:
    """Puts masks back on tensors, because a `tf.function` drops them.

    Example:

    >>> x = tf.constant([1])
    >>> put_masks([x], [tf.constant([True])])
    >>> masks([x])[0].numpy()
    array([ True])
    """
    for tensor, mask in zip(tf.nest.flatten(tensors), tf.nest.flatten(masks)):
        if mask is not None:
            tensor._keras_mask = mask


def length(x: Any) -> tf.Tensor:
    """Returns the number of examples in a nested batch, scalar int32.

    Example:

    >>> int(length((None, tf.zeros((3, 2)))))
    3
    """
    return tf.shape(next(v for v in keras.tree.flatten(x) if v is not None))[0]
