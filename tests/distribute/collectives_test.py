"""Collectives: all replicas compute the same result together."""

import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale.distribute import collectives


def index():
    """Returns this replica's number, as a float32."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.float32)


def on_each(count, function):
    """Runs a function in a graph on `count` replicas; returns their results."""
    strategy = harness.strategy_of(count)
    result = tf.function(lambda: strategy.run(function))()
    parts = [
        [part.numpy() for part in strategy.experimental_local_results(value)]
        for value in tf.nest.flatten(result)
    ]
    return [tf.nest.pack_sequence_as(result, own) for own in zip(*parts)]


each_count = pytest.mark.parametrize("count", [1, 2, 3])


class TestTotal:
    @each_count
    def test_sums_tensors_of_any_type_and_shape(self, count):
        def function():
            i = index()
            given = [i, tf.stack([1.0, i]), tf.cast(i, "int64"), tf.ones(400)]
            totals = collectives.total(given)
            assert totals is not given
            return totals

        # 0 + 1 + ... + (count - 1).
        numbers = count * (count - 1) / 2
        for scalar, vector, integer, large in on_each(count, function):
            assert scalar == integer == numbers
            assert integer.dtype == np.int64
            assert vector.tolist() == [count, numbers]
            assert np.array_equal(large, [count] * 400)

    @each_count
    def test_sums_sparse_beside_dense(self, count):
        def function():
            rows = tf.ones([2, 1]) * (1 + index())
            indices = tf.cast(tf.stack([index(), 2.0]), tf.int64)
            slices = tf.IndexedSlices(rows, indices, tf.constant([4, 1]))
            dense, sparse = collectives.total([tf.constant(1.0), slices])
            assert isinstance(sparse, tf.IndexedSlices)
            return dense, tf.convert_to_tensor(sparse)

        # Replica i adds i + 1 to rows i and 2.
        expected = np.zeros([4, 1])
        for i in range(count):
            expected[i] += i + 1
            expected[2] += i + 1
        for dense, sparse in on_each(count, function):
            assert dense == count
            assert np.array_equal(sparse, expected)

    def test_reduces_a_whole_list_at_once(self, monkeypatch):
        calls = []
        stock = tf.distribute.ReplicaContext.all_reduce

        def all_reduce(context, operation, value, *args, **kwargs):
            calls.append((operation, len(value)))
            return stock(context, operation, value, *args, **kwargs)

        monkeypatch.setattr(
            tf.distribute.ReplicaContext, "all_reduce", all_reduce
        )
        on_each(2, lambda: collectives.total([index()] * 5))
        assert calls == [(tf.distribute.ReduceOp.SUM, 5)] * 2
        # One replica calls no collective.
        on_each(1, lambda: collectives.total([index()] * 5))
        assert len(calls) == 2


@each_count
def test_index_is_the_place_among_the_replicas(count):
    places = on_each(count, collectives.index)
    assert places == list(range(count))
    assert all(place.dtype == np.int32 for place in places)


@each_count
def test_gathered_values_are_in_the_order_of_the_replicas(count):
    def function():
        result = collectives.gathered(tf.stack([index(), 5.0]))
        assert result.shape == (count, 2)
        return result

    for result in on_each(count, function):
        assert result.tolist() == [[i, 5.0] for i in range(count)]


class TestInnerProducts:
    SHAPES = ((3, 4), (), (25,), (0,), (7, 1))  # 12 + 1 + 25 + 7 = 45 entries.

    @pytest.mark.parametrize("count, entries", [(1, 10), (2, 10**6), (3, 4)])
    def test_of_pieces_of_any_size(self, count, entries, monkeypatch):
        monkeypatch.setattr(collectives, "BYTES_PER_GATHER", 8 * entries)
        random = np.random.default_rng(count)
        values = [random.normal(size=(count, *s)) for s in self.SHAPES]

        def function():
            i = collectives.index()
            return collectives.inner_products(
                [tf.gather(tf.constant(value), i) for value in values]
            )

        one, *others = on_each(count, function)
        # All replicas have equal bits.
        assert all(other.tobytes() == one.tobytes() for other in others)
        assert one.dtype == np.float64
        rows = [value.reshape(count, -1) for value in values]
        expected = [row @ row.T for row in rows]
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        "dtypes, expected",
        [
            (["float16"], "float32"),
            (["bfloat16", "float32"], "float32"),
            (["float32", "float64"], "float64"),
        ],
        ids=str,
    )
    def test_of_half_precision_are_float32(self, dtypes, expected):
        def function():
            # 64^2 * 40 = 163840: more than float16 holds.
            return collectives.inner_products(
                [tf.fill([40], tf.constant(64.0, dtype)) for dtype in dtypes]
            )

        for result in on_each(2, function):
            assert result.dtype == expected
            assert np.all(result == 163840.0)
            assert result.shape == (len(dtypes), 2, 2)

    def test_pieces_wait_for_one_another(self, monkeypatch):
        """A replica holds one piece of each other replica at a time."""
        monkeypatch.setattr(collectives, "BYTES_PER_GATHER", 8 * 10)
        sent, received = [], []
        stock = tf.distribute.ReplicaContext.all_gather

        def all_gather(context, value, *args, **kwargs):
            sent.append(value)
            received.append(stock(context, value, *args, **kwargs))
            return received[-1]

        monkeypatch.setattr(
            tf.distribute.ReplicaContext, "all_gather", all_gather
        )

        @tf.function
        def step():
            values = [tf.ones(shape, tf.float64) for shape in self.SHAPES]
            return collectives.inner_products(values)

        step.get_concrete_function()
        sizes = [value.shape.num_elements() for value in sent]
        # A replica's index goes with each piece.
        assert sizes == [11, 11, 11, 11, 6]
        for before, after in zip(received, sent[1:]):
            assert before.op in ancestors(after.op)


def ancestors(operation):
    """Returns all operations that must run before one."""
    found, left = set(), [operation]
    while left:
        operation = left.pop()
        before = [x.op for x in operation.inputs] + operation.control_inputs
        left += [op for op in before if op not in found]
        found.update(before)
    return found
