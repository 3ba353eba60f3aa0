"""The messages of refused arguments, and when they are raised.

`contract_test.py` checks that a refusal by any wrapper changes no state.
"""

import keras
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale import AdaScale, Adasum
from tf_adascale.optimizers import checks

SGD = keras.optimizers.SGD
LossScaleOptimizer = keras.optimizers.LossScaleOptimizer


def decays_in_its_own_way():
    class Decay(SGD):
        def _apply_weight_decay(self, variables):
            pass

    return Decay()


# Functions that make a wrong inner optimizer, and the message.
NO_OPTIMIZER = "`inner_optimizer` must be a keras.optimizers.Optimizer"
NO_WRAPPER = "`inner_optimizer` must neither be a wrapper nor be in one"
ACCUMULATES = "`gradient_accumulation_steps` must not be set on the inner"
REFUSED = {
    "name": (lambda: "sgd", NO_OPTIMIZER),
    "class": (lambda: SGD, NO_OPTIMIZER),
    "none": (lambda: None, NO_OPTIMIZER),
    "wrapper": (lambda: AdaScale(SGD()), NO_WRAPPER),
    "scaled_wrapper": (lambda: LossScaleOptimizer(Adasum(SGD())), NO_WRAPPER),
    "inside_a_wrapper": (
        lambda: AdaScale(SGD()).inner_optimizer,
        NO_WRAPPER,
    ),
    "accumulates": (lambda: SGD(gradient_accumulation_steps=4), ACCUMULATES),
    "scaled_accumulates": (
        lambda: LossScaleOptimizer(SGD(gradient_accumulation_steps=4)),
        ACCUMULATES,
    ),
    "own_weight_decay": (
        decays_in_its_own_way,
        "`inner_optimizer` must not override keras.optimizers.Optimizer."
        "_apply_weight_decay",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inner_optimizer(case):
    make, rule = REFUSED[case]
    with harness.refused(rule):
        checks.check_inner_optimizer(make(), {}, wrapper="AdaScale")


def test_inner_optimizer_that_may_be_wrapped():
    for inner in (SGD(), LossScaleOptimizer(SGD())):
        checks.check_inner_optimizer(inner, {}, wrapper="AdaScale")


def test_arguments_of_the_inner_optimizer():
    rule = "`clipnorm` must be an argument of Adasum. Arguments of Keras's"
    with harness.refused(rule, "clipnorm=1.0"):
        checks.check_inner_optimizer(SGD(), {"clipnorm": 1.0}, wrapper="Adasum")


@pytest.mark.parametrize(
    "made, inner_made, used", [(1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 1)]
)
def test_optimizers_made_outside_the_scope(made, inner_made, used):
    optimizers = []
    for num_replicas in (made, inner_made):
        with harness.strategy_of(num_replicas).scope():
            optimizers.append(SGD())
    rule = "`adascale` and its inner optimizer must be made in the scope of"
    with harness.refused(rule, "optimizers made under {<tensorflow"):
        harness.strategy_of(used).run(
            lambda: checks.check_context("adascale", optimizers)
        )


@pytest.mark.parametrize(
    "cls",
    [
        tf.distribute.ParameterServerStrategy,
        tf.compat.v1.distribute.experimental.ParameterServerStrategy,
    ],
)
def test_strategies_that_do_not_step_together(cls):
    strategy = cls.__new__(cls)  # Its constructor connects to a cluster.
    rule = "`strategy` must be synchronous: under ParameterServerStrategy"
    with harness.refused(rule, "strategy=<tensorflow"):
        checks.check_strategy(strategy)


def test_cross_replica_context():
    with harness.strategy_of(2).scope():
        optimizers = [SGD()]
        rule = "`adascale.apply` must be called inside strategy.run, once per"
        with harness.refused(rule, "strategy=<tensorflow"):
            checks.check_context("adascale", optimizers)


@pytest.mark.parametrize("shapes", [[(3, 2)], [(2,), (3, 2)], [(3, 2), (3,)]])
def test_gradients_that_do_not_match(shapes):
    weights = harness.variables(harness.twos())
    gradients = [tf.ones(shape) for shape in shapes]
    rule = (
        "`grads` must hold a gradient of its shape, or None, for each of the "
        "variables [(3, 2), (2,)]"
    )
    with harness.refused(rule, f"gradients of shapes {shapes}"):
        checks.matched(gradients, weights)


def test_gradients_that_match_as_far_as_is_known():
    weights = harness.variables(harness.twos())
    slices = tf.IndexedSlices(tf.ones((1, 2)), [0], tf.constant([3, 2]))
    for kernel in (tf.ones((3, 2)), slices, None):
        gradients = [kernel, None]
        _, variables = checks.matched(gradients, iter(weights))
        assert variables == weights


def test_gradients_without_variables():
    rule = "`trainable_variables` must be passed in the first call of `apply`"
    with harness.refused(rule, "trainable_variables=None, 2 gradients"):
        checks.matched([None, None], None)
