"""Helpers for tests of optimizers, training and callbacks.

`Run` steps an optimizer on N replicas with chosen gradients. Functions compare
variables, make and fit small models, and expect refused calls.

Outside TensorFlow, values are NumPy arrays. A *sample* is the gradient of one
replica's micro-batch. Samples are ordered by replica, then by micro-batch.
"""

import contextlib
import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale

NUM_DEVICES = 8  # Logical CPUs, see conftest.py.

# A kernel and a bias.
SHAPES = ((3, 2), (2,))

WRAPPERS = {
    "adascale": tf_adascale.AdaScale,
    "differenced": functools.partial(
        tf_adascale.AdaScale, estimator="differenced"
    ),
    "adamscale": tf_adascale.AdamScale,
    "adasum_updates": tf_adascale.Adasum,
    "adasum_gradients": functools.partial(
        tf_adascale.Adasum, combine="gradients"
    ),
}

MODES = {"eager": lambda function: function, "function": tf.function}


def strategy_of(num_replicas):
    """Returns a strategy: the default one, or a `MirroredStrategy`.

    Tests share strategies, which keep no state.
    """
    if num_replicas == 1:
        return tf.distribute.get_strategy()
    return _mirrored(num_replicas)


@functools.cache
def _mirrored(num_replicas):
    if not 1 < num_replicas <= NUM_DEVICES:
        raise ValueError(
            f"`num_replicas` must be from 1 to {NUM_DEVICES}, the logical "
            f"devices. Received: num_replicas={num_replicas}"
        )
    return tf.distribute.MirroredStrategy(
        [f"CPU:{index}" for index in range(num_replicas)],
        # The default on CPUs uses collectives, whose groups stay in the
        # process: a second strategy of another size would fail.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


# Variables and their state.


def variables(values, dtype="float32"):
    """Returns Keras variables `weight_0`, `weight_1`, ... of these values."""
    return [
        keras.Variable(value, dtype=dtype, name=f"weight_{number}")
        for number, value in enumerate(values)
    ]


def twos(shapes=SHAPES):
    """Returns arrays of 2, as start values."""
    return [np.full(shape, 2, "float32") for shape in shapes]


def copies(variable):
    """Returns the values of a Keras variable, one per replica."""
    value = variable.value
    return [copy.numpy() for copy in getattr(value, "values", [value])]


def first(variable):
    """Returns the value of a Keras variable on the first replica."""
    return copies(variable)[0]


def values(variables):
    """Returns the values of Keras variables on the first replica."""
    return [first(variable) for variable in variables]


def state(of):
    """Returns a dict, comparable by `==`: path to the bytes per replica.

    Args:
        of: list of Keras variables and optimizers.
    """
    held = {}
    for variable in _flat(of):
        assert variable.path not in held
        held[variable.path] = [copy.tobytes() for copy in copies(variable)]
    return held


def changed(before, after):
    """Returns the set of the paths whose bytes differ in two states."""
    assert before.keys() == after.keys()
    return {path for path in before if before[path] != after[path]}


def assert_same(left, right):
    """Asserts that variables, or optimizers, are equal to the bit.

    Variables are compared in order: the last part of the path, the type and
    the values on all replicas.
    """
    left, right = _flat(left), _flat(right)
    assert [v.name for v in left] == [v.name for v in right]
    for x, y in zip(left, right):
        assert x.dtype == y.dtype, x.path
        np.testing.assert_array_equal(copies(x), copies(y), err_msg=x.path)


def assert_close(received, expected, *, atol=1e-6, rtol=0.0):
    """Asserts that two lists of arrays agree."""
    assert len(received) == len(expected)
    for x, y in zip(received, expected):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def value(optimizer, name):
    """Returns the value of an optimizer's variable, by the end of its path."""
    [variable] = [v for v in optimizer.variables if v.name == name]
    return first(variable)


def _flat(of):
    of = of if isinstance(of, list) else [of]
    return [v for each in of for v in getattr(each, "variables", [each])]


# Steps of an optimizer.


def random_gradients(steps, num_samples=1, shapes=SHAPES, seed=0):
    """Returns gradients for `Run.step`: small whole numbers, exact to add."""
    random = np.random.default_rng(seed)
    return [
        [
            random.integers(-8, 9, (num_samples, *shape)).astype("float32")
            for shape in shapes
        ]
        for _ in range(steps)
    ]


class Run:
    """Weights and their optimizer on the replicas of a strategy.

    Args:
        num_replicas: int, N.
        make: function of no argument that returns an optimizer.
        values: list of arrays to start from.
        microbatches: int, k.
        dtype: string, of the weights.
        graph: bool, whether to step in a `tf.function`. Tracing it takes as
            long as many eager steps.
    """

    def __init__(
        self,
        num_replicas,
        make,
        values=None,
        *,
        microbatches=1,
        dtype="float32",
        graph=False,
    ):
        self.strategy = strategy_of(num_replicas)
        with self.strategy.scope():
            self.variables = variables(
                twos() if values is None else values, dtype
            )
            self.optimizer = make()
            self.optimizer.build(self.variables)
        if microbatches > 1:
            self.optimizer.microbatches = microbatches
        self.microbatches = microbatches
        self._step = self._run
        if graph:
            self._step = tf.function(self._run, autograph=False)

    def step(self, gradients, prepare=lambda gradients: gradients):
        """Takes a step.

        Args:
            gradients: list of arrays, one per variable, of shape
                `(N * k, *variable.shape)`.
            prepare: function from a replica's mean gradients, a list of
                tensors, to the gradients that it passes to `apply`.
        """
        dtypes = [v.dtype for v in self.variables]
        gradients = [tf.constant(g, d) for g, d in zip(gradients, dtypes)]
        self._step(gradients, prepare)
        return self

    def _run(self, gradients, prepare):
        def replica():
            context = tf.distribute.get_replica_context()
            count = context.num_replicas_in_sync
            index = context.replica_id_in_sync_group
            own = [
                tf.reshape(g, (count, self.microbatches, *v.shape))[index]
                for g, v in zip(gradients, self.variables)
            ]
            samples = [
                # Keras divides the loss by the number of replicas.
                [self.optimizer.scale_loss(g[i]) / count for g in own]
                for i in range(self.microbatches)
            ]
            statistics = {}
            if self.microbatches > 1 and self.optimizer.needs_sample_sqnorms:
                statistics["sample_sqnorm_sum"] = tf.add_n(
                    [
                        self.optimizer.sample_sqnorm(sample, self.variables)
                        for sample in samples
                    ]
                )
            mean = [tf.reduce_mean(tf.stack(gs), 0) for gs in zip(*samples)]
            self.optimizer.apply(prepare(mean), self.variables, **statistics)

        self.strategy.run(replica)

    def weights(self):
        """Returns the weights; asserts that replicas have equal bits."""
        for variable in self.variables:
            one, *others = copies(variable)
            for other in others:
                assert one.tobytes() == other.tobytes(), variable.path
        return values(self.variables)

    def state(self):
        """Returns `state` of the weights and the optimizer."""
        return state([*self.variables, self.optimizer])


def slices(dense, shape_known=True):
    """Returns a gradient as slices: a quarter of each row, then the rest."""
    return tf.IndexedSlices(
        tf.concat([0.25 * dense, 0.75 * dense], 0),
        tf.concat([tf.range(dense.shape[0])] * 2, 0),
        tf.shape(dense) if shape_known else None,
    )


# Models.


def mean_of_outputs(y_true, y_pred):
    """A loss whose gradient, in a linear model, is the mean of the inputs."""
    del y_true
    return y_pred


def linear_model(model_class, optimizer, *, width=2, **compiled):
    """Returns a compiled model of one weight vector, which starts at 0.

    The gradient of `mean_of_outputs` is the mean of the batch's rows.
    """
    inputs = keras.Input((width,))
    outputs = keras.layers.Dense(
        1, use_bias=False, kernel_initializer="zeros", name="linear"
    )(inputs)
    model = model_class(inputs, outputs)
    model.compile(optimizer, mean_of_outputs, **compiled)
    return model


def dense_model(model_class, *, hidden=(), units=4):
    """Returns a model of 3 inputs and 1 output, always of the same weights.

    Args:
        model_class: `keras.Model` or `tf_adascale.Model`.
        hidden: list of functions that make layers to put between the two.
        units: int, the width of the first layer.
    """
    keras.utils.set_random_seed(7)
    inputs = keras.Input((3,))
    x = keras.layers.Dense(units, activation="tanh")(inputs)
    for make_layer in hidden:
        x = make_layer()(x)
    return model_class(inputs, keras.layers.Dense(1)(x))


def regression(size, width=3, dtype="float32"):
    """Returns x, y: random rows, and their sums plus noise."""
    random = np.random.default_rng(1)
    x = random.normal(size=(size, width)).astype(dtype)
    noise = random.normal(size=(size, 1)).astype(dtype)
    return x, x.sum(axis=1, keepdims=True) + noise


def batches(x, y, size):
    """Returns a dataset of batches in the order of the rows."""
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def fit(model, *data, **arguments):
    """Fits quietly and in order; returns Keras's `History`."""
    return model.fit(*data, **{"verbose": 0, "shuffle": False, **arguments})


def iterations(model):
    """Returns the iterations of a model's optimizer as an int."""
    return int(first(model.optimizer.iterations))


# Refused calls.


def refused(rule, received=""):
    """Expects a ValueError in the form of this library.

    Args:
        rule: string, the beginning of the first sentence.
        received: string, the beginning of what follows "Received: ".
    """
    pattern = f"(?s){re.escape(rule)}.*Received: {re.escape(received)}"
    return pytest.raises(ValueError, match=pattern)


@contextlib.contextmanager
def untouched(*of):
    """Expects a block to change no variable and no optimizer.

    >>> with untouched(optimizer), refused("`grads` must"):
    ...     optimizer.apply([])
    """
    before = state(list(of))
    yield
    assert state(list(of)) == before
