"""Steps equal those of Keras's optimizers, on one device or on each.

`wrapper_test.py` covers every optimizer of Keras.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale.distribute import updates
from tf_adascale.optimizers import inner_step

optimizers = keras.optimizers


@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizers.AdamW(0.1, weight_decay=0.2),
        lambda: optimizers.Nadam(0.1),
    ],
    ids=["adamw", "nadam"],
)
def test_update_is_that_of_apply(make):
    plain, ours = make(), make()
    theirs, mine = (harness.variables(harness.twos()) for _ in range(2))
    ours.build(mine)
    strategy = updates.strategy()
    for gradients in harness.random_gradients(5):
        gradients = [tf.constant(g[0]) for g in gradients]
        plain.apply(gradients, theirs)
        inner_step.update(strategy, ours, mine, gradients, ours.learning_rate)
        updates.increment(strategy, ours.iterations)
    harness.assert_same(mine, theirs)
    for x, y in zip(ours.variables, plain.variables, strict=True):
        assert np.array_equal(x.numpy(), y.numpy())


def test_devices_step_by_their_own_gradients():
    """Weights and slots differ by device, as in Adasum of updates."""

    def make():
        return optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)

    strategy = harness.strategy_of(3)
    with strategy.scope():
        weights, optimizer = harness.variables(harness.twos()), make()
        optimizer.build(weights)
    steps = harness.random_gradients(3)

    def replica(gradients):
        index = tf.distribute.get_replica_context().replica_id_in_sync_group
        factor = tf.cast(index, tf.float32)
        updates.hand_off(
            lambda strategy, own: inner_step.update(
                strategy, optimizer, weights, own, 0.1
            ),
            strategy,
            [factor * g[0] for g in gradients],
        )

    for gradients in steps:
        strategy.run(replica, args=(gradients,))
    for device in range(3):
        plain, expected = make(), harness.variables(harness.twos())
        for gradients in steps:
            plain.apply(
                [tf.constant(device * g[0]) for g in gradients], expected
            )
        for received, wanted in zip(
            [*weights, *optimizer.momentums], [*expected, *plain.momentums]
        ):
            np.testing.assert_allclose(
                harness.copies(received)[device], wanted, rtol=1e-6
            )


@pytest.mark.parametrize(
    "hook", ["_backend_update_step", "_apply_weight_decay"]
)
def test_optimizers_with_steps_of_their_own_are_refused(hook):
    odd = type("Odd", (optimizers.SGD,), {hook: lambda self, *args: None})
    with harness.refused(
        f"`inner_optimizer` must not override keras.optimizers.Optimizer.{hook}"
    ):
        inner_step.check(odd(), name="AdaScale")


def test_averages_without_use_ema_do_nothing():
    optimizer, weights = optimizers.SGD(), harness.variables(harness.twos())
    optimizer.build(weights)
    assert inner_step.averaged_weights(optimizer) == []
    with harness.untouched(optimizer, *weights):
        inner_step.average(
            updates.strategy(),
            optimizer,
            before=[],
            base_steps=tf.constant(2.0),
        )
