"""Micro-batches: split, computed one after another, summed and merged."""

import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale.training import microbatches


def test_split_keeps_the_order_of_the_batch():
    batch = tf.reshape(tf.range(24), (6, 2, 2))
    parts = microbatches.split(batch, 3)
    assert parts.shape == (3, 2, 2, 2)
    np.testing.assert_array_equal(tf.reshape(parts, (6, 2, 2)), batch)


@pytest.mark.parametrize("shape", [(None, 3), (None, None), (8, 3)])
def test_split_in_a_graph_knows_as_much_of_the_shape_as_it_can(shape):
    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def split(batch):
        parts = microbatches.split(batch, 4)
        assert parts.shape[0] == 4
        assert parts.shape[2] == shape[1]
        return parts

    batch = np.arange(24.0, dtype="float32").reshape(8, 3)
    np.testing.assert_array_equal(split(batch), batch.reshape(4, 2, 3))


def test_split_refuses_a_batch_of_known_size():
    with harness.refused("`microbatches` must", "batch=7, microbatches=2"):
        microbatches.split(tf.zeros((7, 1)), 2)


def test_split_refuses_a_batch_of_unknown_size_when_it_runs():
    split = tf.function(
        lambda batch: microbatches.split(batch, 2),
        input_signature=[tf.TensorSpec((None, 1))],
    )
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        split(tf.zeros((7, 1)))
    with harness.refused("`microbatches` must", "batch=7, microbatches=2"):
        raise microbatches.uneven_error(raised.value)
    other = tf.errors.InvalidArgumentError(None, None, "something else")
    assert microbatches.uneven_error(other) is None


@pytest.mark.parametrize("jit_compile", [False, True])
def test_summed_equals_a_loop_and_is_traced_once(jit_compile):
    x = np.random.default_rng(0).normal(size=(4, 3, 2))
    weights = np.arange(12.0).reshape(4, 3)
    traces = []

    def function(x, y, weight):
        traces.append(x)
        assert y is None
        samples = [tf.reduce_sum(x, 0), None]
        terms = [None, tf.reduce_sum(weight) ** 2]
        outputs = {"a": x * 2, "b": (weight,)}
        return microbatches.Result(samples, terms, outputs)

    @tf.function(jit_compile=jit_compile)
    def run(x, weights):
        return microbatches.summed(function, [x, None, weights], 4)

    (total, no_sample), (no_term, squares), outputs, _ = run(x, weights)
    assert len(traces) == 1
    assert no_sample is None
    assert no_term is None
    np.testing.assert_allclose(total, x.sum((0, 1)), rtol=1e-12)
    # Rows of 0..11 sum to 3, 12, 21, 30: 9 + 144 + 441 + 900 = 1494.
    assert float(squares) == 1494.0
    np.testing.assert_array_equal(outputs["a"], x.reshape(12, 2) * 2)
    np.testing.assert_array_equal(outputs["b"][0], weights.reshape(12))


def walked(values, merge):
    """Merges neighbours, level by level; an odd one moves up."""
    while len(values) > 1:
        odd_one = values[len(values) // 2 * 2 :]
        values = [merge(a, b) for a, b in zip(values[::2], values[1::2])]
        values += odd_one
    return values[0]


@pytest.mark.parametrize(
    "count, mode",
    [
        *[(count, "function") for count in (1, 2, 3, 5, 6, 8, 11, 16)],
        (7, "eager"),
        (7, "xla"),
    ],
)
def test_samples_are_merged_in_a_tree(count, mode):
    """The merge is neither symmetric nor associative, so order matters."""
    x = np.random.default_rng(count).normal(size=(count, 3))

    def merge(earlier, later):
        assert len(earlier) == len(later) == 2  # None is left out.
        return [0.5 * a + 0.25 * b for a, b in zip(earlier, later)]

    def run(x):
        result = microbatches.summed(
            lambda x: microbatches.Result([x, None, x[0]], [x], x[None]),
            [x],
            count,
            merge=merge,
        )
        first, none, last = result.samples
        assert none is None
        return [first, last], result.terms, result.outputs

    if mode != "eager":
        run = tf.function(run, autograph=False, jit_compile=mode == "xla")
    (vector, scalar), (total,), outputs = run(tf.constant(x))
    expected = walked(list(x), lambda a, b: 0.5 * a + 0.25 * b)
    np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scalar, expected[0], rtol=0, atol=1e-12)
    # The other outputs are summed and concatenated as usual.
    np.testing.assert_allclose(total, x.sum(0), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(outputs, x)
