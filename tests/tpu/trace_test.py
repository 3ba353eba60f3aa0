"""Training can be traced under a TPUStrategy of eight stub cores."""

import collections

import keras
import pytest
import tensorflow as tf

from tests.tpu import programs, stub_strategy
from tf_adascale import Adasum


@pytest.fixture(scope="module")
def strategy():
    return stub_strategy.tpu_strategy()


def graphs_of(graph):
    """Returns a graph and the graphs of the functions that it calls."""
    functions = getattr(graph, "_functions", {})
    return [graph, *(function.graph for function in functions.values())]


def operations(graph):
    return [op for g in graphs_of(graph) for op in g.get_operations()]


def train_function(strategy, make_optimizer, *, steps=1, microbatches=1):
    """Returns the graph that `fit` runs on a distributed dataset."""
    with strategy.scope():
        model = programs.image_model(
            make_optimizer(), microbatches=microbatches
        )
        model.steps_per_execution = steps
    dataset = tf.data.Dataset.from_tensors(
        tuple(tf.zeros(s.shape, s.dtype) for s in programs.image_batch())
    )
    dataset = dataset.unbatch().repeat()
    dataset = dataset.batch(programs.BATCH * stub_strategy.CORES, True)
    # Batches stay on the host, because there is no device.
    options = tf.distribute.InputOptions(experimental_fetch_to_device=False)
    iterator = iter(strategy.experimental_distribute_dataset(dataset, options))
    train = model.make_train_function()
    function = tf.function(lambda: train(iterator), autograph=False)
    return function.get_concrete_function().graph


def adasum(**kwargs):
    return lambda: Adasum(keras.optimizers.Adam(), **kwargs)


# SGD sums the gradients of ten weights, and AdaScale also sums a scalar. Adasum
# also sums the inner products of three weights and gathers, in one sum each,
# these three and the other seven. Its updates need a flag: are all finite?
@pytest.mark.parametrize(
    ("make_optimizer", "count", "steps", "microbatches"),
    [
        (programs.sgd, 10, 3, 4),
        (programs.adascale, 11, 1, 1),
        (programs.adascale, 11, 3, 4),
        (adasum(), 14, 1, 4),
        (adasum(), 14, 3, 1),
        (adasum(group_size=4), 14, 1, 2),
        (adasum(combine="gradients"), 13, 1, 1),
        (adasum(combine="gradients", group_size=2), 13, 1, 1),
    ],
)
def test_fit(make_optimizer, count, steps, microbatches, strategy):
    graph = train_function(
        strategy, make_optimizer, steps=steps, microbatches=microbatches
    )
    found = operations(graph)
    types = collections.Counter(op.type for op in found)
    # One program, which a loop runs if there are several steps.
    assert types["TPUReplicateMetadata"] == 1
    assert types["CrossReplicaSum"] == count
    # TPUs can at best emulate float64.
    outputs = [tensor for op in found for tensor in op.outputs]
    assert not [tensor for tensor in outputs if tensor.dtype == tf.float64]


def test_own_loop(strategy):
    with strategy.scope():
        step, batch = programs.PROGRAMS["AdaScale, own loop"]()

    @tf.function(autograph=False)
    def run(*batch):
        return strategy.run(step, args=batch)

    graph = run.get_concrete_function(*batch).graph
    types = collections.Counter(op.type for op in operations(graph))
    # Three weights, one of them an embedding, and the scalar.
    assert types["CrossReplicaSum"] == 4
