"""Steps equal those of Keras's optimizers, on one device or on each.

`keras_optimizers_test.py` covers every optimizer of Keras.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness
from tf_adascale.distribute import updates
from tf_adascale.optimizers import inner_step, loss_scale

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


class TestOverridesAreRefused:
    @staticmethod
    def rule(hook):
        return (
            "`inner_optimizer` must not override "
            f"keras.optimizers.Optimizer.{hook}: AdaScale takes its step"
        )

    @pytest.mark.parametrize("hook", inner_step.REPLACED)
    @pytest.mark.parametrize("base", [optimizers.SGD, optimizers.Nadam])
    def test_by_name(self, hook, base):
        if not hasattr(base, hook):
            pytest.skip(f"Keras {keras.__version__} has no {hook}")
        odd = base()
        # A subclass of Keras's that overrides something else is followed.
        inner_step.check(odd, name="AdaScale")
        # Its properties cannot be read, so no constructor would run.
        odd.__class__ = type("Odd", (base,), {hook: lambda self, *args: None})
        with harness.refused(self.rule(hook), "inner_optimizer="):
            inner_step.check(odd, name="AdaScale")

    def test_of_an_instance(self):
        odd = optimizers.SGD()
        odd.apply = lambda grads, variables: None
        with harness.refused(self.rule("apply"), "inner_optimizer="):
            inner_step.check(odd, name="AdaScale")

    def test_what_the_wrapper_calls_may_be_overridden(self):
        class Halved(optimizers.SGD):
            def update_step(self, gradient, variable, learning_rate):
                super().update_step(gradient / 2, variable, learning_rate)

            def _clip_gradients(self, grads):
                return [4 * g for g in grads]

        weight = keras.Variable([0.0])
        tf_adascale.AdaScale(Halved(0.25), scale=1).apply(
            [tf.ones(1)], [weight]
        )
        assert weight.numpy() == [-0.5]

    @pytest.mark.parametrize("hook", loss_scale.REPLACED)
    def test_of_a_loss_scale(self, hook):
        scaled = type(
            "Odd",
            (optimizers.LossScaleOptimizer,),
            {hook: lambda self, *args: None},
        )(optimizers.SGD())
        rule = (
            "`inner_optimizer` must not override "
            f"keras.optimizers.LossScaleOptimizer.{hook}"
        )
        with harness.refused(rule, "inner_optimizer="):
            tf_adascale.AdaScale(scaled)


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
