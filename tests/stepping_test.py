"""Steps of Keras's optimizers by hand: to the bit, and each device its own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_adascale import replicas, stepping

optimizers = keras.optimizers

MAKE = {
    "sgd": lambda: optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda: optimizers.AdamW(0.1, weight_decay=0.2),
    "lamb": lambda: optimizers.Lamb(0.1),
    "nadam": lambda: optimizers.Nadam(0.1),
    "rmsprop": lambda: optimizers.RMSprop(0.1, momentum=0.5),
}


def gradients(steps=20):
    random = np.random.default_rng(0)
    return random.normal(size=(steps, 2, 3)).astype("float32")


def new_weights():
    return [keras.Variable(np.ones(3, "float32")) for _ in range(2)]


@pytest.mark.parametrize("name", MAKE)
def test_update_is_that_of_apply(name):
    plain, ours = MAKE[name](), MAKE[name]()
    theirs, mine = new_weights(), new_weights()
    ours.build(mine)
    strategy = replicas.strategy()
    for pair in gradients():
        pair = [tf.constant(g) for g in pair]
        plain.apply(pair, theirs)
        stepping.update(strategy, ours, mine, pair, ours.learning_rate)
        stepping.increment(strategy, ours.iterations)
    for left, right in zip(
        [*theirs, *plain.variables], [*mine, *ours.variables]
    ):
        assert np.array_equal(left.numpy(), right.numpy())


def test_devices_step_by_their_own_gradients(strategy_of):
    """What Adasum combines: weights and slots of devices go their own ways."""
    strategy = strategy_of(3)
    with strategy.scope():
        weights = new_weights()
        optimizer = MAKE["sgd"]()
        optimizer.build(weights)
    steps = gradients()

    @tf.function
    def step(pair):
        def replica():
            context = tf.distribute.get_replica_context()
            factor = tf.cast(context.replica_id_in_sync_group, tf.float32)
            replicas.hand_off(
                lambda strategy, own: stepping.update(
                    strategy, optimizer, weights, own, 0.1
                ),
                strategy,
                [factor * g for g in tf.unstack(pair)],
            )

        strategy.run(replica)

    for pair in steps:
        step(tf.constant(pair))
    for device in range(3):
        plain, expected = MAKE["sgd"](), new_weights()
        for pair in steps:
            plain.apply([tf.constant(device * g) for g in pair], expected)
        for variable, other in zip(
            [*weights, *optimizer.variables[2:]],
            [*expected, *plain.variables[2:]],
        ):
            got = strategy.experimental_local_results(variable.value)[device]
            np.testing.assert_allclose(got, other.numpy(), rtol=1e-6)


def test_optimizers_with_steps_of_their_own_are_refused():
    class Odd(optimizers.SGD):
        def _backend_update_step(self, *args):
            raise NotImplementedError

    with pytest.raises(
        ValueError, match=r"AdaScale cannot follow. Expected .* Received: opt"
    ):
        stepping.check(Odd(), name="AdaScale")


def test_averages_without_use_ema_do_nothing():
    optimizer, weights = optimizers.SGD(), new_weights()
    optimizer.build(weights)
    assert stepping.averaged_weights(optimizer) == []
    stepping.average(
        replicas.strategy(), optimizer, before=[], base_steps=tf.constant(2.0)
    )
    assert weights[0].numpy().tolist() == [1, 1, 1]
