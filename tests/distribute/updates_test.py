"""Updates of variables, on every device, in the contexts that allow it."""

import keras
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale.distribute import updates

each_count = pytest.mark.parametrize("count", [1, 3])


def index():
    """Returns this replica's number, as a float32."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.float32)


def values(strategy, value):
    """Returns the replicas' parts of a value."""
    value = value.value if isinstance(value, keras.Variable) else value
    return [float(v) for v in strategy.experimental_local_results(value)]


@pytest.fixture(params=[False, True], ids=["eager", "function"])
def run(request):
    """Returns a function that runs another one on each replica."""

    def run(strategy, function):
        def step():
            return strategy.run(function)

        return (tf.function(step) if request.param else step)()

    return run


def test_the_strategy_in_effect():
    default, mirrored = tf.distribute.get_strategy(), harness.strategy_of(2)
    assert updates.strategy() is default
    with mirrored.scope():
        assert updates.strategy() is mirrored


def test_the_replica_context_is_inside_of_run():
    strategy, seen = harness.strategy_of(2), []
    assert updates.in_replica_context()
    with strategy.scope():
        assert not updates.in_replica_context()
    strategy.run(lambda: seen.append(updates.in_replica_context()))
    assert seen == [True, True]


@each_count
class TestHandOff:
    def test_every_copy_is_updated_with_its_devices_value(self, count, run):
        strategy = harness.strategy_of(count)
        with strategy.scope():
            variables = [tf.Variable(10.0), keras.Variable(10.0)]
            factor = keras.Variable(2.0)

        def take(strategy, value, nested):
            for variable in variables:
                updates.update(
                    strategy,
                    variable,
                    lambda v, x, y, z: v.assign_add(z * (x + y["key"])),
                    value,
                    nested,
                    factor,
                )

        run(
            strategy,
            lambda: updates.hand_off(
                take, strategy, index(), {"key": 10 * index()}
            ),
        )
        # Replica i adds 2 (i + 10 i).
        expected = [10.0 + 22 * i for i in range(count)]
        for variable in variables:
            assert values(strategy, variable) == expected

    def test_returns_what_its_function_returns(self, count, run):
        strategy = harness.strategy_of(count)
        received = run(
            strategy,
            lambda: updates.hand_off(lambda _, x: x, strategy, 2 * index()),
        )
        assert values(strategy, received) == [2.0 * i for i in range(count)]
        assert float(updates.local(strategy, received)) == 0.0

    def test_one_of_two_functions_is_chosen_in_the_graph(self, count):
        strategy = harness.strategy_of(count)
        with strategy.scope():
            kept, taken, others = (keras.Variable(x) for x in (0.0, 0, 0))

        def take(strategy, value):
            updates.assign(strategy, [kept], [value])
            updates.increment(strategy, taken)

        def other(strategy, variable):
            updates.increment(strategy, variable)

        @tf.function
        def step(wanted, otherwise):
            strategy.run(
                lambda: updates.hand_off_if(
                    wanted,
                    take,
                    strategy,
                    (1.5 * index(),),
                    otherwise=other if otherwise else None,
                    other_values=(others,) if otherwise else (),
                )
            )

        for wanted, otherwise in [(True, True), (False, True), (False, False)]:
            step(tf.constant(wanted), otherwise)
        assert values(strategy, kept) == [1.5 * i for i in range(count)]
        assert values(strategy, taken) == [1] * count
        assert values(strategy, others) == [1] * count
