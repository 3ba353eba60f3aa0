"""Replicas: what is summed, where a step is handed off to, what is updated."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_adascale import replicas

COUNTS = [1, 2, 3]


def index():
    """This replica's number, as a float32."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.float32)


def locals_of(strategy, value):
    """The parts of a value, of one replica each."""
    value = value.value if isinstance(value, keras.Variable) else value
    return [v.numpy() for v in strategy.experimental_local_results(value)]


@pytest.fixture(params=[False, True], ids=["eager", "function"])
def run(request):
    """A function that runs another on each replica of a strategy."""

    def run(strategy, function):
        def step():
            return replicas.run(strategy, function)

        return (tf.function(step) if request.param else step)()

    return run


class TestContext:
    def test_strategy_in_effect(self, strategy_of):
        default = replicas.strategy()
        assert default is tf.distribute.get_strategy()
        mirrored = strategy_of(2)
        with mirrored.scope():
            assert replicas.strategy() is mirrored
        assert replicas.strategy() is default

    def test_in_replica_context(self, strategy_of, run):
        assert replicas.in_replica_context()
        strategy = strategy_of(2)
        with strategy.scope():
            assert not replicas.in_replica_context()
        seen = []
        run(strategy, lambda: seen.append(replicas.in_replica_context()))
        assert seen == [True, True]


@pytest.mark.parametrize("count", COUNTS)
class TestTotal:
    def test_sums_every_tensor_on_every_replica(self, count, strategy_of, run):
        strategy = strategy_of(count)

        def function():
            i = index()
            return replicas.total([i, tf.stack([1.0, i]), tf.cast(i, "int64")])

        scalar, vector, integer = run(strategy, function)
        # 0 + 1 + ... + (count - 1).
        numbers = count * (count - 1) / 2
        for got in locals_of(strategy, scalar):
            assert got == numbers
        for got in locals_of(strategy, vector):
            assert got.tolist() == [count, numbers]
        for got in locals_of(strategy, integer):
            assert got == numbers
            assert got.dtype == np.int64

    def test_sums_sparse_beside_dense(self, count, strategy_of, run):
        strategy = strategy_of(count)

        def function():
            rows = tf.ones([2, 1]) * (1 + index())
            indices = tf.cast(tf.stack([index(), 2.0]), tf.int64)
            slices = tf.IndexedSlices(rows, indices, tf.constant([4, 1]))
            dense, sparse = replicas.total([tf.constant(1.0), slices])
            assert isinstance(sparse, tf.IndexedSlices)
            return dense, tf.convert_to_tensor(sparse)

        dense, sparse = run(strategy, function)
        # Replica i adds i + 1 to rows i and 2.
        expected = np.zeros([4, 1])
        for i in range(count):
            expected[i] += i + 1
            expected[2] += i + 1
        for got in locals_of(strategy, dense):
            assert got == count
        for got in locals_of(strategy, sparse):
            assert np.array_equal(got, expected)

    def test_leaves_the_list_alone(self, count, strategy_of, run):
        values = []

        def function():
            given = [tf.constant(1.0), tf.constant(2.0)]
            values.append((given, replicas.total(given)))

        run(strategy_of(count), function)
        for given, total in values:
            assert len(given) == len(total) == 2
            assert given is not total


def test_total_reduces_a_whole_list_at_once(strategy_of, monkeypatch):
    calls = []
    stock = tf.distribute.ReplicaContext.all_reduce

    def all_reduce(context, operation, value, *args, **kwargs):
        calls.append((operation, len(value)))
        return stock(context, operation, value, *args, **kwargs)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", all_reduce)
    replicas.run(strategy_of(2), lambda: replicas.total([index()] * 5))
    assert calls == [(tf.distribute.ReduceOp.SUM, 5)] * 2
    # One replica has nothing to wait for.
    replicas.total([tf.constant(1.0)])
    assert len(calls) == 2


@pytest.mark.parametrize("count", COUNTS)
def test_index(count, strategy_of, run):
    strategy = strategy_of(count)
    places = locals_of(strategy, run(strategy, replicas.index))
    assert [int(place) for place in places] == list(range(count))
    assert all(place.dtype == np.int32 for place in places)


@pytest.mark.parametrize("count", COUNTS)
def test_gathered(count, strategy_of, run):
    strategy = strategy_of(count)

    def function():
        result = replicas.gathered(tf.stack([index(), 5.0]))
        assert result.shape == (count, 2)
        return result

    for got in locals_of(strategy, run(strategy, function)):
        assert got.tolist() == [[i, 5.0] for i in range(count)]


class TestInnerProducts:
    SHAPES = ((3, 4), (), (25,), (0,), (7, 1))

    def values(self, count, dtype):
        random = np.random.default_rng(count)
        return [
            random.normal(size=(count, *s)).astype(dtype) for s in self.SHAPES
        ]

    @pytest.mark.parametrize("count", COUNTS)
    @pytest.mark.parametrize("entries", [1, 4, 10, 10**6])
    def test_of_pieces_of_any_size(
        self, entries, count, strategy_of, monkeypatch
    ):
        monkeypatch.setattr(replicas, "BYTES_PER_GATHER", 8 * entries)
        strategy = strategy_of(count)
        values = self.values(count, "float64")
        results = self.run(strategy, values)
        for got in results:
            # The same on every replica to the bit.
            assert got.tobytes() == results[0].tobytes()
            assert got.dtype == np.float64
            for value, products in zip(values, got, strict=True):
                rows = value.reshape(count, -1)
                np.testing.assert_allclose(
                    products, rows @ rows.T, rtol=0, atol=1e-12
                )

    @pytest.mark.parametrize(
        ("dtypes", "expected"),
        [
            (["float16"], "float32"),
            (["bfloat16", "float32"], "float32"),
            (["float32", "float64"], "float64"),
        ],
        ids=str,
    )
    def test_types(self, dtypes, expected, strategy_of):
        strategy = strategy_of(2)

        def function():
            # 64^2 * 40 = 163840: more than float16 has.
            return replicas.inner_products(
                [tf.fill([40], tf.constant(64.0, dtype)) for dtype in dtypes]
            )

        for got in locals_of(strategy, replicas.run(strategy, function)):
            assert got.dtype == expected
            assert np.array_equal(got, np.full((len(dtypes), 2, 2), 163840.0))

    def test_pieces_wait_for_one_another(self, monkeypatch):
        """At any time a replica needs to hold no more than one of all."""
        entries = 10
        monkeypatch.setattr(replicas, "BYTES_PER_GATHER", 8 * entries)
        sent, received = [], []
        stock = replicas.gathered

        def gathered(value):
            result = stock(value)
            sent.append(value)
            received.append(result)
            return result

        monkeypatch.setattr(replicas, "gathered", gathered)
        values = self.values(1, "float64")

        @tf.function
        def step():
            return replicas.inner_products([tf.constant(v[0]) for v in values])

        step.get_concrete_function()
        # 12 + 1 + 25 + 7 = 45 entries.
        sizes = [value.shape.num_elements() for value in sent]
        assert sizes == [10, 10, 10, 10, 5]
        for before, after in zip(received, sent[1:]):
            assert before.op in ancestors(after.op)

    def run(self, strategy, values):
        @tf.function
        def step():
            place = replicas.index()
            return replicas.inner_products(
                [tf.gather(tf.constant(value), place) for value in values]
            )

        return locals_of(strategy, replicas.run(strategy, step))


def ancestors(operation):
    """All operations that must run before one of a graph."""
    found, left = set(), [operation]
    while left:
        operation = left.pop()
        before = [x.op for x in operation.inputs] + operation.control_inputs
        left += [op for op in before if op not in found]
        found.update(before)
    return found


@pytest.mark.parametrize("count", COUNTS)
class TestHandOff:
    def test_updates_every_copy_with_its_devices_value(
        self, count, strategy_of, run
    ):
        strategy = strategy_of(count)
        with strategy.scope():
            variables = [tf.Variable(10.0), keras.Variable(10.0)]

        def take(strategy, value, nested):
            for variable in variables:
                replicas.update(
                    strategy,
                    variable,
                    lambda v, x, y: v.assign_add(x + y["key"]),
                    value,
                    nested,
                )

        run(
            strategy,
            lambda: replicas.hand_off(
                take, strategy, index(), {"key": 10 * index()}
            ),
        )
        # Replica i adds i + 10 i.
        expected = [10.0 + 11 * i for i in range(count)]
        for variable in variables:
            assert locals_of(strategy, variable) == expected

    def test_update_takes_variables_as_values(self, count, strategy_of, run):
        strategy = strategy_of(count)
        with strategy.scope():
            target, source = keras.Variable(1.0), keras.Variable(3.0)

        def take(strategy):
            replicas.update(
                strategy, target, lambda v, x: v.assign(2 * x), source
            )

        run(strategy, lambda: replicas.hand_off(take, strategy))
        assert locals_of(strategy, target) == [6.0] * count

    def test_allows_a_condition_around_updates(self, count, strategy_of):
        strategy = strategy_of(count)
        with strategy.scope():
            variable = keras.Variable(0.0)

        def take(strategy, wanted):
            def update():
                replicas.update(strategy, variable, lambda v: v.assign_add(1.0))
                return True

            tf.cond(replicas.local(strategy, wanted), update, lambda: False)

        @tf.function
        def step(wanted):
            replicas.run(
                strategy, lambda: replicas.hand_off(take, strategy, wanted)
            )

        for wanted in (True, False, True):
            step(tf.constant(wanted))
        assert locals_of(strategy, variable) == [2.0] * count


@pytest.mark.parametrize("count", COUNTS)
def test_local_and_mean(count, strategy_of, run):
    strategy = strategy_of(count)
    value = run(strategy, lambda: 2.0 * index())
    assert float(replicas.local(strategy, value)) == 0.0
    # The mean of 0, 2, ..., 2 (count - 1).
    assert float(replicas.mean(strategy, value)) == count - 1


def test_run_passes_values_on(strategy_of):
    strategy = strategy_of(2)
    result = replicas.run(
        strategy, lambda x, y: x - y + index(), tf.constant(5.0), 3.0
    )
    assert locals_of(strategy, result) == [2.0, 3.0]
