"""Workers: their number, their chief, agreement, and lost ones."""

import pytest
import tensorflow as tf

from tests import harness
from tf_adascale.distribute import workers


class Cluster(tf.distribute.MultiWorkerMirroredStrategy):
    """A strategy that describes a cluster and starts nothing."""

    def __init__(self, cluster):
        self._cluster = cluster

    def __del__(self):
        pass

    @property
    def cluster_resolver(self):
        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(self._cluster)
        )


TWO = {"worker": ["a:1", "b:1"]}


@pytest.mark.parametrize(
    "cluster, expected",
    [
        ({}, 1),
        ({"worker": ["a:1"]}, 1),
        (TWO, 2),
        ({"chief": ["a:1"], "worker": ["b:1", "c:1"]}, 3),
        # Evaluators and parameter servers do not train.
        ({**TWO, "evaluator": ["c:1"], "ps": ["d:1", "e:1"]}, 2),
    ],
)
def test_the_workers_are_those_that_train(cluster, expected):
    assert workers.num_workers(Cluster(cluster)) == expected


@pytest.mark.parametrize("count", [1, 2])
class TestOneProcess:
    def test_is_the_chief_of_itself(self, count):
        strategy = harness.strategy_of(count)
        assert workers.num_workers(strategy) == 1
        assert workers.is_chief(strategy)
        assert workers.agree(strategy, 3)

    def test_stops_as_soon_as_it_is_asked(self, count):
        answers = iter([False, True])
        check = workers.preemption_check(
            harness.strategy_of(count), lambda: next(answers)
        )
        assert [check(), check()] == [False, True]

    def test_loses_no_worker(self, count):
        error = tf.errors.UnavailableError(None, None, "gone")
        assert (
            workers.lost_worker_error(harness.strategy_of(count), error) is None
        )


@pytest.mark.parametrize("is_chief", [False, True])
def test_the_chief_is_who_should_save(is_chief):
    class Extended:
        should_checkpoint = is_chief

    class Strategy:
        extended = Extended()

    assert workers.is_chief(Strategy()) is is_chief


class TestAgree:
    @pytest.fixture(autouse=True)
    def two_workers(self, monkeypatch):
        monkeypatch.setattr(workers, "num_workers", lambda strategy: 2)

    # Two are too large for int32, and one of them for float64.
    @pytest.mark.parametrize("number", [0, 7, 2**31 + 1, 2**60 + 1])
    def test_all_have_the_same(self, number):
        assert workers.agree(harness.strategy_of(2), number) is True

    def test_one_has_another(self, monkeypatch):
        strategy = harness.strategy_of(2)
        reduce = strategy.reduce

        def reduce_with_anothers(operation, value, axis):
            # Like a replica whose number is larger by one.
            return reduce(operation, value, axis=axis) + 1

        monkeypatch.setattr(strategy, "reduce", reduce_with_anothers)
        assert workers.agree(strategy, 7) is False


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
    synchronization, aggregation, expected
):
    mirrored = harness.strategy_of(2)
    with mirrored.scope():
        variable = tf.Variable(
            1.0,
            trainable=False,
            synchronization=tf.VariableSynchronization[synchronization],
            aggregation=tf.VariableAggregation[aggregation],
        )
    two = Cluster(TWO)
    assert workers.only_all_workers_can_read(two, variable) is expected
    # One process reads all parts.
    assert not workers.only_all_workers_can_read(mirrored, variable)


class TestLostWorker:
    PROGRAM = "node a/b/c defined at (most recent call last): ...\n"

    def error_of(self, kind, message=PROGRAM + "Collective ops: it is gone"):
        error = kind(None, None, message)
        return workers.lost_worker_error(Cluster(TWO), error)

    @pytest.mark.parametrize(
        "kind",
        [
            tf.errors.AbortedError,
            tf.errors.CancelledError,
            tf.errors.DeadlineExceededError,
            tf.errors.UnavailableError,
        ],
    )
    def test_is_named_without_the_places_in_the_program(self, kind):
        lost = self.error_of(kind)
        assert type(lost) is tf.errors.UnavailableError
        assert lost.message.startswith("Another worker of the cluster was lost")
        assert lost.message.endswith(
            "Received: workers=2, error=Collective ops: it is gone"
        )

    def test_is_named_in_full_where_there_is_no_program(self):
        lost = self.error_of(tf.errors.AbortedError, "gone")
        assert lost.message.endswith("Received: workers=2, error=gone")

    @pytest.mark.parametrize(
        "kind", [tf.errors.InvalidArgumentError, tf.errors.DataLossError]
    )
    def test_other_errors_are_others(self, kind):
        assert self.error_of(kind) is None
