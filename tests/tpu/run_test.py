"""The program of a TPU core takes the steps of eight replicas on CPUs.

It runs on CPUs in place of cores. Equal results show that the compiled programs
are AdaScale and Adasum.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests.tpu import compiler, lowering, programs, stub_strategy
from tf_adascale import AdamScale, AdaScale, Adasum

CORES = stub_strategy.CORES
BATCH, ENTRIES, CLASSES = 4, 20, 3


def adam():
    # A large epsilon, so that no division amplifies rounding errors.
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.9)
    return keras.optimizers.Adam(schedule, epsilon=0.1)


def make_model(make_optimizer, microbatches):
    """Returns a model whose variables start at zero, as in a program."""
    inputs = keras.Input((ENTRIES,))
    outputs = keras.layers.Dense(CLASSES, kernel_initializer="zeros")(inputs)
    model = tf_adascale.Model(inputs, outputs)
    model.compile(
        make_optimizer(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        microbatches=microbatches,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def state(model):
    """Returns weights, averages and slots of a model in training."""
    return [*model.trainable_variables, *model.optimizer.variables]


def data(steps, *, overflow):
    """Returns the batches of each replica for all steps."""
    random = np.random.default_rng(0)
    y = random.integers(CLASSES, size=(CORES, steps, BATCH)).astype("int32")
    x = random.normal(size=(*y.shape, ENTRIES)).astype("float32")
    x[..., :CLASSES] += np.eye(CLASSES)[y]
    if overflow:
        x[3, 1] = np.inf
    return x, y


def of_replicas(strategy, model, x, y):
    """Returns the state of each replica after steps of `strategy.run`."""

    @tf.function(autograph=False)
    def step(x, y):
        def of_replica():
            index = tf.distribute.get_replica_context().replica_id_in_sync_group
            model.train_step((x[index], y[index]))

        strategy.run(of_replica)

    for number in range(x.shape[1]):
        step(tf.constant(x[:, number]), tf.constant(y[:, number]))
    return [
        [v.numpy() for v in strategy.experimental_local_results(variable.value)]
        for variable in state(model)
    ]


def of_cores(strategy, model, x, y):
    """Returns the state of each core after the same steps in a program."""

    def steps(x, y):
        for number in range(x.shape[0]):
            model.train_step((x[number], y[number]))
        return [tf.convert_to_tensor(variable) for variable in state(model)]

    text = lowering.lowered(
        strategy,
        steps,
        tf.TensorSpec(x.shape[1:]),
        tf.TensorSpec(y.shape[1:], tf.int32),
    )
    return compiler.run(text, x, y)[: len(state(model))]


@pytest.mark.parametrize(
    ("make_optimizer", "microbatches", "steps"),
    [
        (programs.sgd, 1, 3),
        (programs.adascale, 1, 3),
        (programs.adascale, 2, 3),
        (lambda: AdaScale(programs.sgd(), estimator="differenced"), 1, 4),
        # AdamScale does not divide gradients in the first five steps.
        (lambda: AdamScale(adam()), 1, 8),
        (lambda: Adasum(adam()), 2, 3),
        (lambda: Adasum(adam(), combine="gradients", group_size=2), 1, 3),
    ],
    ids=["sgd", "one", "two", "differenced", "adamscale", "updates", "groups"],
)
def test_steps_like_replicas(make_optimizer, microbatches, steps, strategy_of):
    is_stock = make_optimizer is programs.sgd
    # One batch of one replica overflows, so all must skip this step.
    x, y = data(steps, overflow=not is_stock)
    results = []
    for strategy, train in [
        (strategy_of(CORES), of_replicas),
        (stub_strategy.tpu_strategy(), of_cores),
    ]:
        with strategy.scope():
            model = make_model(make_optimizer, microbatches)
        results.append(train(strategy, model, x, y))
    for values in zip(*results, strict=True):
        for expected, received in zip(*values, strict=True):
            np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)
    # All cores have the same weights, and these have changed.
    for weights in results[1][:2]:
        for weight in weights:
            assert np.array_equal(weight, weights[0])
            assert np.abs(weight).max() > 1e-3
    counts = [int(v[0]) for v in results[1] if v[0].dtype == np.int64]
    if not is_stock:
        assert steps - 1 in counts
        assert 1 in counts  # Steps that were skipped.
