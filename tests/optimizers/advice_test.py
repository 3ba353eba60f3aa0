"""Warnings of settings that do nothing, each once."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale import AdamScale, AdaScale, Adasum, Model

SGD = keras.optimizers.SGD
ONE_SAMPLE = "gets one gradient sample per step, so its gain stays 1"
ADAPTIVE = "`power` is 1, which suits SGD.*AdamScale"


def warned(function):
    """Returns the messages of the warnings that a function issues."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


class TestOneSample:
    @staticmethod
    def fit(optimizer, *, num_replicas=1, **arguments):
        with harness.strategy_of(num_replicas).scope():
            model = harness.dense_model(Model)
            model.compile(optimizer(), "mse", **arguments)
        x, y = harness.regression(16)
        return warned(
            lambda: harness.fit(model, harness.batches(x, y, 8), epochs=2)
        )

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda: AdaScale(SGD()),
            lambda: AdaScale(SGD(), estimator="differenced"),
            lambda: AdamScale(keras.optimizers.Adam()),
        ],
        ids=["adascale", "differenced", "adamscale"],
    )
    def test_is_warned_of_once(self, optimizer):
        messages = self.fit(optimizer)
        [message] = [m for m in messages if ONE_SAMPLE in m]
        assert "`microbatches`" in message
        assert "scale=1" in message

    @pytest.mark.parametrize(
        "optimizer, arguments",
        [
            (lambda: AdaScale(SGD(), scale=1), {}),
            (lambda: AdaScale(SGD()), {"microbatches": 2}),
            (lambda: AdaScale(SGD()), {"num_replicas": 2}),
            (lambda: AdaScale(SGD(), scale=4, estimator="differenced"), {}),
            (lambda: Adasum(SGD()), {}),
        ],
        ids=["scale", "microbatches", "replicas", "differenced", "adasum"],
    )
    def test_is_not_where_it_is_meant_or_measures(self, optimizer, arguments):
        assert self.fit(optimizer, **arguments) == []

    def test_in_a_loop_that_is_not_traced(self):
        optimizer, weight = AdaScale(SGD()), keras.Variable([0.0])

        def steps():
            for _ in range(3):
                optimizer.apply([tf.ones(1)], [weight])

        assert len(warned(steps)) == 1


class TestPowerOfAnAdaptiveOptimizer:
    @pytest.mark.parametrize(
        "name", ["Adam", "RMSprop", "Lion", "Adafactor", "Lamb", "Nadam"]
    )
    @pytest.mark.parametrize("scaled", [False, True])
    def test_names_adamscale(self, name, scaled):
        inner = getattr(keras.optimizers, name)()
        if scaled:
            inner = keras.optimizers.LossScaleOptimizer(inner)
        with pytest.warns(UserWarning, match=ADAPTIVE) as caught:
            AdaScale(inner)
        assert name in str(caught[0].message)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize(
        "make",
        [
            lambda: AdaScale(SGD()),
            lambda: AdaScale(keras.optimizers.Adam(), power=0.5),
            lambda: AdaScale(keras.optimizers.Adam(), scale=1),
            lambda: AdamScale(keras.optimizers.Adam()),
            lambda: Adasum(keras.optimizers.Adam()),
        ],
        ids=["sgd", "power", "scale", "adamscale", "adasum"],
    )
    def test_is_not_where_it_suits(self, make):
        assert warned(make) == []

    def test_is_not_for_an_optimizer_that_is_not_keras_own(self):
        class Own(keras.optimizers.Adam):
            pass

        assert warned(lambda: AdaScale(Own())) == []


@pytest.mark.parametrize(
    "wrap", [lambda: AdaScale(SGD(), scale=1), lambda: Adasum(SGD())]
)
@pytest.mark.parametrize("mode", harness.MODES)
def test_a_variable_without_a_gradient(mode, wrap):
    weights, optimizer = harness.variables(harness.twos()), wrap()
    optimizer.build(weights)

    @harness.MODES[mode]
    def step():
        optimizer.apply([tf.constant(np.ones((3, 2), "float32")), None])

    with pytest.warns(UserWarning, match=r"Gradients do not exist.*weight_1"):
        step()
