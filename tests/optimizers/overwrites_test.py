"""Variables that their gradients overwrite, beside ordinary weights."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale import AdamScale, AdaScale
from tf_adascale.distribute import collectives
from tf_adascale.optimizers import overwrites

SGD = keras.optimizers.SGD


def inner(wrap):
    if wrap is AdamScale:
        return keras.optimizers.AdamW(0.1, weight_decay=0.1, clipnorm=1.0)
    return SGD(
        0.1,
        momentum=0.9,
        weight_decay=0.1,
        global_clipnorm=1.0,
        use_ema=True,
        loss_scale_factor=16.0,
    )


def marked(variable):
    variable.overwrite_with_gradient = True
    return variable


class Pair:
    """Equal weights, with and without overwritten variables beside them."""

    def __init__(self, num_replicas, wrap):
        self.strategy = harness.strategy_of(num_replicas)
        self.count = num_replicas
        with self.strategy.scope():
            self.weights = [harness.variables(harness.twos()) for _ in range(2)]
            self.overwritten = [
                marked(keras.Variable([5.0, 5.0], name="scale")),
                marked(keras.Variable(5.0, name="maximum", dtype="float16")),
            ]
            self.optimizers = [wrap(inner(wrap)) for _ in range(2)]
        self.run = tf.function(self._run, autograph=False)

    def step(self, gradients, new_values):
        """Takes a step of each optimizer, in a graph.

        Args:
            gradients: list of arrays, a row for each replica.
            new_values: likewise, for `overwritten`.
        """
        self.run(*([*map(tf.constant, x)] for x in (gradients, new_values)))

    def _run(self, gradients, new_values):
        def replica():
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            own, values = (
                [x[index] for x in tensors]
                for tensors in (gradients, new_values)
            )
            first, second = self.optimizers
            own = [first.scale_loss(g) / self.count for g in own]
            first.apply(own, self.weights[0])
            # In between and in front, where places could be confused.
            second.apply_gradients(
                [
                    (values[0], self.overwritten[0]),
                    (own[0], self.weights[1][0]),
                    (values[1], self.overwritten[1]),
                    (own[1], self.weights[1][1]),
                ]
            )

        self.strategy.run(replica)


def steps(num_replicas, count=4):
    random = np.random.default_rng(0)
    for gradients in harness.random_gradients(count, num_replicas):
        yield (
            gradients,
            [
                random.normal(size=(num_replicas, 2)).astype("float32"),
                random.normal(size=num_replicas).astype("float16"),
            ],
        )


@pytest.mark.parametrize(
    "wrap", harness.WRAPPERS.values(), ids=harness.WRAPPERS
)
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_weights_and_gain_are_as_without_them(num_replicas, wrap):
    pair = Pair(num_replicas, wrap)
    for gradients, new_values in steps(num_replicas):
        pair.step(gradients, new_values)
        for variable, values in zip(pair.overwritten, new_values):
            np.testing.assert_array_equal(
                harness.first(variable), values.max(0)
            )
    harness.assert_same(*pair.weights)
    first, second = pair.optimizers
    for variable in first.variables:
        names = [v for v in second.variables if v.name == variable.name]
        np.testing.assert_array_equal(
            harness.copies(variable), harness.copies(names[0])
        )
    # They have no slots.
    assert len(first.variables) == len(second.variables)


@pytest.mark.parametrize("spoilt", ["gradient", "value"])
def test_a_value_that_is_not_finite_skips_the_step(spoilt):
    pair = Pair(2, AdaScale)
    [(gradients, new_values)] = steps(2, 1)
    with pair.strategy.scope():
        pair.optimizers[1].build([*pair.overwritten, *pair.weights[1]])
    if spoilt == "gradient":
        gradients[0][1, 0, 0] = np.inf
    else:
        new_values[0][1, 0] = np.nan
    with harness.untouched(*pair.overwritten, *pair.weights[1]):
        pair.step(gradients, new_values)
    assert int(pair.optimizers[1].skipped_steps) == 1


def test_a_sample_has_the_norm_that_it_has_without_them():
    scale, weight = marked(keras.Variable([5.0])), keras.Variable([0.0, 0.0])
    gradients = [tf.constant([7.0]), tf.constant([3.0, 4.0])]
    optimizer = AdaScale(SGD(0.1))
    assert float(optimizer.sample_sqnorm(gradients, [scale, weight])) == 25.0


def test_no_second_collective_where_there_are_none(monkeypatch):
    calls = collections.Counter()
    for name in ("total", "gathered"):
        stock = getattr(collectives, name)

        def counted(values, stock=stock, name=name):
            calls[name] += 1
            return stock(values)

        monkeypatch.setattr(collectives, name, counted)
    run = harness.Run(2, lambda: AdaScale(SGD(0.1)))
    run.step(*harness.random_gradients(1, 2))
    assert calls == {"total": 2}  # One on each of two replicas.


def test_only_overwritten_variables():
    variable = marked(keras.Variable([5.0]))
    optimizer, plain = AdaScale(SGD(0.1)), SGD(0.1)
    for each in (optimizer, plain):
        each.apply([tf.constant([7.0])], [variable])
        assert variable.numpy() == [7.0]
        assert int(each.iterations) == 1
        variable.assign([5.0])


@pytest.mark.parametrize("mode", harness.MODES)
def test_a_step_of_them_alone_is_one_base_step(mode):
    """As Keras counts it; the gain before does not come back."""
    optimizer = AdaScale(SGD(0.1), scale=4, estimator="differenced")
    weight = keras.Variable([1.0, 2.0])
    scale = marked(keras.Variable(1.0))
    optimizer.build([weight, scale])

    @harness.MODES[mode]
    def step(*gradients):
        optimizer.apply(gradients, [weight, scale][-len(gradients) :])

    for sign in (1, -1, 1, -1):
        step(tf.constant([0.3 * sign, 0.1]), tf.constant(2.0))
    before = float(optimizer.scale_invariant_step)
    assert before > 4.1
    for value in (3.0, 4.0):
        step(tf.constant(value))
    assert scale.numpy() == 4.0
    assert int(optimizer.iterations) == 6
    assert float(optimizer.scale_invariant_step) == pytest.approx(before + 2)


def test_the_averages_end_in_the_other_weights():
    weight, scale = keras.Variable([0.0]), marked(keras.Variable([5.0]))
    optimizer = AdaScale(SGD(1.0, use_ema=True, ema_momentum=0.5))
    for _ in range(2):
        optimizer.apply([tf.ones(1), tf.ones(1) * 7], [weight, scale])
    optimizer.finalize_variable_values([weight, scale])
    # After -1 and -2: 0.5 (-1) + 0.5 (-2).
    assert weight.numpy() == [-1.5]
    assert scale.numpy() == [7.0]


def test_split_and_join():
    weight, scale = tf.Variable(1.0), marked(keras.Variable(1.0))
    variables = [scale, weight, scale]
    pairs = overwrites.split([1, 2, None], variables)
    assert pairs.gradients == [2]
    assert pairs.new_values == [1, None]
    joined = overwrites.join(pairs.gradients, pairs.new_values, variables)
    assert joined == [1, 2, None]
