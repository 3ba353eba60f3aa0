"""Replicas: what is summed, where a step is handed off to, what is updated."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
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


class Cluster(tf.distribute.MultiWorkerMirroredStrategy):
    """A strategy that knows of its workers, and starts nothing."""

    def __init__(self, cluster):
        self._cluster = cluster

    def __del__(self):
        pass

    @property
    def cluster_resolver(self):
        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(self._cluster)
        )


TWO_WORKERS = {"worker": ["a:1", "b:1"]}


@pytest.mark.parametrize(
    "cluster, expected",
    [
        ({}, 1),
        ({"worker": ["a:1"]}, 1),
        (TWO_WORKERS, 2),
        ({"chief": ["a:1"], "worker": ["b:1", "c:1"]}, 3),
        # These do not train.
        ({**TWO_WORKERS, "evaluator": ["c:1"], "ps": ["d:1", "e:1"]}, 2),
    ],
)
def test_num_workers_counts_those_that_train(cluster, expected):
    assert replicas.num_workers(Cluster(cluster)) == expected


@pytest.mark.parametrize("count", COUNTS)
def test_one_process_is_the_chief_of_itself(count, strategy_of):
    strategy = strategy_of(count)
    assert replicas.num_workers(strategy) == 1
    assert replicas.is_chief(strategy)
    assert replicas.agree(strategy, 3)


@pytest.mark.parametrize("is_chief", [False, True])
def test_the_chief_is_who_should_save(is_chief, strategy_of):
    class Extended:
        should_checkpoint = is_chief

    class Strategy:
        extended = Extended()

    assert replicas.is_chief(Strategy()) is is_chief


class TestAgree:
    @pytest.fixture(autouse=True)
    def two_workers(self, monkeypatch):
        monkeypatch.setattr(replicas, "num_workers", lambda strategy: 2)

    # More than float64 and int32 can hold.
    @pytest.mark.parametrize("number", [0, 7, 2**31 + 1, 2**60 + 1])
    def test_all_have_the_same(self, number, strategy_of):
        assert replicas.agree(strategy_of(2), number) is True

    def test_one_has_another(self, strategy_of, monkeypatch):
        strategy = strategy_of(2)
        reduce = strategy.reduce

        def reduce_with_anothers(operation, value, axis):
            assert operation == "SUM"
            # One replica's number is larger by one.
            return reduce(operation, value, axis=axis) + 1

        monkeypatch.setattr(strategy, "reduce", reduce_with_anothers)
        assert replicas.agree(strategy, 7) is False


@pytest.mark.parametrize(
    "synchronization, aggregation, expected",
    [
        ("AUTO", "NONE", False),
        ("ON_WRITE", "MEAN", False),
        ("ON_READ", "SUM", True),
        ("ON_READ", "MEAN", True),
        ("ON_READ", "ONLY_FIRST_REPLICA", False),
    ],
)
def test_variables_that_only_all_workers_can_read(
    synchronization, aggregation, expected, strategy_of
):
    mirrored = strategy_of(2)
    with mirrored.scope():
        variable = tf.Variable(
            1.0,
            trainable=False,
            synchronization=tf.VariableSynchronization[synchronization],
            aggregation=tf.VariableAggregation[aggregation],
        )
    two = Cluster(TWO_WORKERS)
    assert replicas.only_all_workers_can_read(two, variable) is expected
    # One process has all the parts.
    assert not replicas.only_all_workers_can_read(mirrored, variable)


@pytest.mark.parametrize("count", COUNTS)
def test_preemption_check_of_one_process_asks_at_once(count, strategy_of):
    asked = []

    def is_asked():
        asked.append(1)
        return len(asked) > 1

    check = replicas.preemption_check(strategy_of(count), is_asked)
    assert [check(), check()] == [False, True]
    assert len(asked) == 2


class TestLostWorker:
    LOST = (
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
        tf.errors.UnavailableError,
    )
    OTHERS = (
        tf.errors.InvalidArgumentError,
        tf.errors.ResourceExhaustedError,
        tf.errors.DataLossError,
    )
    MESSAGE = "node a/b/c defined at (most recent call last): ...\n"

    def error(self, kind, message=MESSAGE + "Collective ops is aborted: gone"):
        return kind(None, None, message)

    @pytest.mark.parametrize("kind", LOST)
    def test_is_said_in_three_parts(self, kind):
        lost = replicas.lost_worker_error(
            Cluster(TWO_WORKERS), self.error(kind)
        )
        assert type(lost) is tf.errors.UnavailableError
        assert lost.message == (
            "Another worker was lost. Expected all workers of the cluster to "
            "train until the end; start all of them again, and training goes "
            "on from the last checkpoint. Received: workers=2, "
            "error=Collective ops is aborted: gone"
        )

    def test_says_all_where_there_is_no_program(self):
        error = self.error(tf.errors.AbortedError, "gone")
        lost = replicas.lost_worker_error(Cluster(TWO_WORKERS), error)
        assert lost.message.endswith("error=gone")

    @pytest.mark.parametrize("kind", OTHERS)
    def test_other_errors_are_others(self, kind):
        error = self.error(kind)
        assert replicas.lost_worker_error(Cluster(TWO_WORKERS), error) is None

    @pytest.mark.parametrize("kind", LOST)
    def test_one_process_loses_none(self, kind, strategy_of):
        for count in COUNTS:
            assert (
                replicas.lost_worker_error(strategy_of(count), self.error(kind))
                is None
            )

    @pytest.mark.parametrize("method", ["fit", "evaluate"])
    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize(
        "kind", [tf.errors.AbortedError, tf.errors.DataLossError]
    )
    def test_the_model_says_so(self, method, workers, kind, monkeypatch):
        monkeypatch.setattr(replicas, "num_workers", lambda strategy: workers)
        original = self.error(kind)

        class Loses(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                raise original

            def on_test_batch_end(self, batch, logs=None):
                raise original

        inputs = keras.Input((1,))
        model = tf_adascale.Model(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
        with pytest.raises(tf.errors.OpError) as error:
            getattr(model, method)(
                np.ones((2, 1)), np.ones((2, 1)), verbose=0, callbacks=[Loses()]
            )
        if workers == 2 and kind is tf.errors.AbortedError:
            assert type(error.value) is tf.errors.UnavailableError
            assert error.value.message.startswith("Another worker was lost.")
            assert error.value.__cause__ is original
        else:
            assert error.value is original
