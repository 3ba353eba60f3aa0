"""The steps that reach the inner optimizer, with AdaScale as the wrapper.

`contract_test.py` has the tests that every wrapper passes.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness
from tf_adascale import AdaScale

SGD = keras.optimizers.SGD
LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
schedules = keras.optimizers.schedules

# Inner optimizers, with settings that a wrapper could get wrong.
INNER = {
    "sgd": lambda: SGD(0.1),
    "nesterov": lambda: SGD(0.03, momentum=0.9, nesterov=True),
    "weight_decay": lambda: SGD(0.1, momentum=0.9, weight_decay=0.01),
    "clipnorm": lambda: SGD(0.1, momentum=0.9, clipnorm=1.0),
    "global_clipnorm": lambda: SGD(0.1, momentum=0.9, global_clipnorm=1.0),
    "ema": lambda: SGD(0.1, use_ema=True, ema_momentum=0.9),
    "ema_overwrite": lambda: SGD(
        0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=4
    ),
    "piecewise": lambda: SGD(
        schedules.PiecewiseConstantDecay([3, 6], [0.1, 0.03, 0.01]),
        momentum=0.9,
        weight_decay=0.01,
    ),
    "callable": lambda: SGD(lambda: 0.1),
    "loss_scale_factor": lambda: SGD(0.1, loss_scale_factor=100.0),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(
        schedules.CosineDecay(0.01, 20), weight_decay=0.1
    ),
    "lamb": lambda: keras.optimizers.Lamb(0.01, weight_decay=0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5),
}


def trained(optimizer, dtype="float32", steps=10):
    """Returns weights after steps that are rounded at every operation."""
    weights = harness.variables(harness.twos(), dtype)
    random = np.random.default_rng(0)
    for _ in range(steps):
        optimizer.apply(
            [tf.constant(random.normal(size=v.shape), dtype) for v in weights],
            weights,
        )
    return weights


class TestAtScale1IsTheInnerOptimizer:
    """Weights and slots are equal to the bit."""

    @staticmethod
    def check(make, dtype="float32"):
        plain, wrapped = make(), AdaScale(make())
        weights = trained(plain, dtype)
        assert harness.changed(
            harness.state(weights),
            harness.state(harness.variables(harness.twos(), dtype)),
        )
        harness.assert_same(trained(wrapped, dtype), weights)
        harness.assert_same(wrapped.inner_optimizer.variables, plain.variables)
        assert float(wrapped.scale_invariant_step) == 10

    @pytest.mark.parametrize("name", INNER)
    def test_with_every_setting(self, name):
        self.check(INNER[name])

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_for_weights_of_other_types(self, dtype):
        self.check(lambda: SGD(0.1, momentum=0.9, use_ema=True), dtype)

    def test_in_fit_of_a_stock_model(self):
        """A script trains the same with the wrapper and without it."""
        models = []
        for wrap in (lambda optimizer: optimizer, AdaScale):
            models.append(harness.dense_model(keras.Model))
            models[-1].compile(wrap(INNER["piecewise"]()), "mse")
            x, y = harness.regression(32)
            harness.fit(models[-1], x, y, batch_size=8, epochs=2)
        harness.assert_same(
            models[0].trainable_variables, models[1].trainable_variables
        )


@pytest.mark.parametrize("name", sorted(set(INNER) - {"callable"}))
def test_config_has_the_inner_optimizer_as_if_never_wrapped(name):
    config = AdaScale(INNER[name]()).get_config()
    keras.backend.clear_session(free_memory=False)
    plain = keras.saving.serialize_keras_object(INNER[name]())
    assert config["inner_optimizer"] == plain
    copied = AdaScale.from_config(config)
    assert type(copied.inner_optimizer) is type(INNER[name]())
    assert copied.get_config()["inner_optimizer"] == plain


def test_config_of_an_inner_optimizer_that_keras_does_not_know():
    class Custom(SGD):
        pass

    optimizer = AdaScale(Custom(0.25))
    copied = AdaScale.from_config(
        optimizer.get_config(), custom_objects={"Custom": Custom}
    )
    assert isinstance(copied.inner_optimizer, Custom)


@pytest.mark.parametrize("built", [False, True])
def test_a_loss_scale_may_be_added_later(built):
    optimizer = AdaScale(SGD(0.5))
    weight = keras.Variable([1.0])
    if built:
        optimizer.build([weight])
    optimizer.scale_inside()
    optimizer.scale_inside()
    inner = optimizer.inner_optimizer
    assert isinstance(inner, LossScaleOptimizer)
    assert isinstance(inner.inner_optimizer, SGD)
    optimizer.apply([optimizer.scale_loss(tf.ones(1))], [weight])
    assert weight.numpy() == [0.5]


def test_slices_of_unknown_shape():
    optimizer = AdaScale(SGD(0.5))
    weight = keras.Variable([[0.0], [0.0]])
    optimizer.apply([tf.IndexedSlices(tf.ones((2, 1)), [1, 1])], [weight])
    assert weight.numpy().tolist() == [[0.0], [-1.0]]


class TestLearningRate:
    """Rates at gain 2, from opposite samples of squared norm 1."""

    @staticmethod
    def stepped(inner):
        optimizer = AdaScale(inner, scale=2)
        optimizer.microbatches = 2
        unit = float(optimizer.scale_loss(tf.constant(1.0)))
        optimizer.apply(
            [tf.zeros(1)],
            [keras.Variable([0.0])],
            sample_sqnorm_sum=2.0 * unit**2,
        )
        assert float(optimizer.gain) == 2.0
        return optimizer

    def test_of_a_number_reads_as_it_was_set(self):
        optimizer = self.stepped(SGD(0.125))
        assert float(optimizer.learning_rate) == 0.125
        assert float(optimizer.effective_learning_rate) == 0.25
        assert float(optimizer.inner_optimizer.learning_rate) == 0.25
        optimizer.learning_rate = 0.5
        assert float(optimizer.learning_rate) == 0.5
        assert float(optimizer.effective_learning_rate) == 1.0

    @pytest.mark.parametrize(
        "wrap",
        [lambda inner: inner, LossScaleOptimizer],
        ids=["plain", "scaled"],
    )
    def test_of_a_schedule_reads_as_the_effective_rate(self, wrap):
        rate = schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
        optimizer = self.stepped(wrap(SGD(rate)))
        # tau = 2 now: 0.25 * 2.
        assert float(optimizer.learning_rate) == 0.5
        assert float(optimizer.inner_optimizer.learning_rate) == 0.5
        assert float(optimizer.effective_learning_rate) == 0.5

    def test_may_be_a_callable(self):
        rates = [0.5]
        optimizer = AdaScale(SGD(lambda: rates[-1]))
        weight = keras.Variable([0.0])
        for rate in (0.5, 0.25):
            rates.append(rate)
            optimizer.apply([tf.ones(1)], [weight])
        assert weight.numpy() == [-0.75]

    @pytest.mark.parametrize(
        "callback, expected",
        [
            (
                lambda: keras.callbacks.LearningRateScheduler(
                    lambda epoch, rate: rate * 0.5
                ),
                [0.25, 0.125, 0.0625],
            ),
            (
                # No epoch is better by 100, so the rate falls from the second
                # epoch on.
                lambda: keras.callbacks.ReduceLROnPlateau(
                    "loss", factor=0.5, patience=1, min_delta=100.0, min_lr=0.2
                ),
                [0.5, 0.25, 0.2],
            ),
        ],
        ids=["scheduler", "plateau"],
    )
    def test_set_by_a_callback_has_no_gain(self, callback, expected):
        model = harness.dense_model(tf_adascale.Model)
        model.compile(AdaScale(SGD(0.5)), "mse", microbatches=4)
        rates = []

        def note(epoch, logs):
            optimizer = model.optimizer
            assert float(optimizer.gain) > 1.1
            rates.append(float(optimizer.learning_rate))
            np.testing.assert_allclose(
                optimizer.effective_learning_rate,
                rates[-1] * optimizer.gain,
                rtol=1e-6,
            )

        note = keras.callbacks.LambdaCallback(on_epoch_end=note)
        random = np.random.default_rng(0)
        x, y = random.normal(size=(32, 3)), random.normal(size=(32, 1))
        harness.fit(
            model, x, y, batch_size=16, epochs=3, callbacks=[callback(), note]
        )
        np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        AdaScale,
        lambda sgd: AdaScale(LossScaleOptimizer(sgd)),
        lambda sgd: LossScaleOptimizer(AdaScale(sgd)),
    ],
    ids=["plain", "scaled", "scaled_outside"],
)
def test_swap_ema_weights_finds_the_averages_inside(wrap):
    """Keras's SwapEMAWeights finds the inner optimizer's averages."""
    optimizer = wrap(SGD(0.1, use_ema=True, ema_momentum=0.5))
    inputs = keras.Input((1,))
    outputs = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(
        inputs
    )
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, "mse", auto_scale_loss=False)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(
            model.layers[-1].kernel.numpy().item()
        )
    )
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    x = np.ones((4, 1))
    harness.fit(model, x, 2 * x, batch_size=2, callbacks=[swap, look])
    # Gradients 2 (w - 2): weights 0, 0.4, 0.72; averages 0.4 and 0.56.
    np.testing.assert_allclose(seen, [0.56], rtol=1e-6)


@pytest.mark.parametrize(
    "estimator, wrap, scalars",
    [
        ("moments", lambda inner: inner, [()]),
        ("moments", LossScaleOptimizer, [()]),
        ("differenced", lambda inner: inner, []),
    ],
)
def test_a_step_is_one_reduction(estimator, wrap, scalars, monkeypatch):
    """A step is one all-reduce of gradients and a scalar and a merge_call."""

    def inner():
        return SGD(0.1, momentum=0.9, global_clipnorm=1.0, use_ema=True)

    def asked(make):
        """Returns the collectives that a step calls."""
        run = harness.Run(2, make)
        asked = {"all_reduce": [], "merge_call": [], "all_gather": []}
        context = tf.distribute.ReplicaContext
        for name, calls in asked.items():
            stock = getattr(context, name)

            def call(self, *args, _stock=stock, _calls=calls, **kwargs):
                _calls.append(args)
                return _stock(self, *args, **kwargs)

            monkeypatch.setattr(context, name, call)
        [gradients] = harness.random_gradients(1, 2)
        run.step(gradients)
        monkeypatch.undo()
        return asked

    ours = asked(lambda: AdaScale(wrap(inner()), estimator=estimator))
    assert not ours["all_gather"]
    # Each of two replicas calls it once.
    assert len(ours["all_reduce"]) == 2
    for operation, values in ours["all_reduce"]:
        assert operation == tf.distribute.ReduceOp.SUM
        shapes = sorted(tuple(value.shape) for value in values)
        assert shapes == sorted([*harness.SHAPES, *scalars])
        assert all(value.dtype == tf.float32 for value in values)
    assert len(ours["merge_call"]) <= len(asked(inner)["merge_call"])
