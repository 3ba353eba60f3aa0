"""`Model` in programs written for Keras: each promise against `keras.Model`.

`model_test.py` has the tests of what `Model` adds.
"""

import functools
import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness

BATCH = 8
RATE = 0.05

Model = tf_adascale.Model
AdaScale = tf_adascale.AdaScale
LossScaleOptimizer = keras.optimizers.LossScaleOptimizer


def sgd(**arguments):
    return keras.optimizers.SGD(RATE, momentum=0.9, **arguments)


def at_scale_1():
    return AdaScale(sgd(), scale=1)


def compiled(make_model, optimizer, *args, num_replicas=1, **kwargs):
    """Returns a model made and compiled under a strategy."""
    with harness.strategy_of(num_replicas).scope():
        model = make_model()
        optimizer = optimizer() if inspect.isroutine(optimizer) else optimizer
        model.compile(optimizer, *args, **kwargs)
    return model


def assert_same_weights(model, other, *, atol=1e-6):
    harness.assert_close(weights(model), weights(other), atol=atol)


def weights(model):
    return [harness.first(variable) for variable in model.weights]


class TestOverwrittenVariables:
    """float8's scales and maxima, which their gradients overwrite."""

    POLICY = "float8_from_float32"

    def model(self, model_class):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8,))
        hidden = keras.layers.Dense(8, "relu", dtype=self.POLICY)(inputs)
        return model_class(inputs, keras.layers.Dense(1)(hidden))

    def fitted(self, model_class, optimizer, **arguments):
        model = compiled(
            lambda: self.model(model_class), optimizer, "mse", **arguments
        )
        x, y = harness.regression(32, width=8)
        harness.fit(model, x, y, batch_size=16, epochs=20)
        return model

    @staticmethod
    def overwritten(model):
        found = [
            harness.first(variable)
            for variable in model.trainable_variables
            if variable.overwrite_with_gradient
        ]
        assert len(found) == 6  # A scale and a history, of three tensors.
        return found

    @pytest.mark.parametrize(
        "wrap", [at_scale_1, lambda: tf_adascale.Adasum(sgd())], ids=["a", "b"]
    )
    def test_on_one_replica_equal_stock_to_the_bit(self, wrap):
        stock = self.fitted(keras.Model, sgd)
        for model_class in (keras.Model, Model):
            ours = self.fitted(model_class, wrap)
            for expected, received in zip(weights(stock), weights(ours)):
                np.testing.assert_array_equal(received, expected)

    @pytest.mark.parametrize("num_replicas", [1, 2])
    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_are_never_negative(self, num_replicas, microbatches):
        def make():
            # Neither averages, decay nor clipping takes them for weights.
            return AdaScale(sgd(use_ema=True, weight_decay=0.1, clipnorm=1.0))

        model = self.fitted(
            Model, make, num_replicas=num_replicas, microbatches=microbatches
        )
        for value in self.overwritten(model):
            assert np.all(value >= 0)
            assert np.all(np.isfinite(value))
            assert np.any(value > 0)

    @pytest.mark.parametrize("optimizer", [at_scale_1, sgd])
    def test_are_the_largest_of_the_microbatches(self, optimizer):
        """Where only the last part of a batch is large."""
        model = compiled(
            lambda: self.model(Model), optimizer, "mse", microbatches=2
        )
        x, y = harness.regression(16, width=8)
        x[0, 0], x[15, 7] = 50.0, 100.0
        model.train_on_batch(x, y)
        assert np.max(self.overwritten(model)[1]) == 100.0

    def test_are_the_largest_of_the_replicas(self):
        model = compiled(
            lambda: self.model(Model), at_scale_1, "mse", num_replicas=2
        )
        x, y = harness.regression(16, width=8)
        x[0, 0], x[15, 7] = 100.0, 50.0
        harness.fit(model, harness.batches(x, y, 16))
        assert np.max(self.overwritten(model)[1]) == 100.0


class TestComputeLoss:
    """`compute_loss` is called as Keras calls it."""

    @staticmethod
    def renamed(model_class):
        class Renamed(model_class):
            def compute_loss(self, a=None, b=None, c=None, d=None):
                return 3 * super().compute_loss(a, b, c, d)

        return Renamed

    @staticmethod
    def required(model_class):
        class Required(model_class):
            def compute_loss(self, x, y, y_pred, sample_weight, training):
                loss = super().compute_loss(x, y, y_pred, sample_weight)
                return 2 * loss if training else loss

        return Required

    @staticmethod
    def training_only(model_class):
        class TrainingOnly(model_class):
            def compute_loss(
                self, x, y, y_pred, sample_weight=None, training=False
            ):
                error = tf.reduce_mean(abs(y - y_pred))
                return error if training else -error

        return TrainingOnly

    @pytest.mark.parametrize(
        "kind, num_replicas",
        [
            ("renamed", 1),
            ("required", 1),
            ("training_only", 1),
            ("training_only", 2),
        ],
    )
    def test_trains_and_evaluates_as_stock(self, kind, num_replicas):
        x, y = harness.regression(16)
        histories, models = [], []
        for model_class in (keras.Model, Model):
            made = getattr(self, kind)(model_class)
            model = compiled(
                lambda made=made: harness.dense_model(made),
                at_scale_1,
                "mse",
                num_replicas=num_replicas,
            )
            data = harness.batches(x, y, BATCH)
            history = harness.fit(model, data, epochs=2, validation_data=data)
            histories.append(history.history)
            models.append(model)
        stock, ours = histories
        assert_same_weights(*models)
        assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
        assert ours["val_loss"] == pytest.approx(stock["val_loss"], rel=1e-5)

    def test_dropout_in_a_call_that_takes_no_training(self):
        """Keras then trains as if it were not training."""

        def plain(model_class):
            class Plain(model_class):
                def __init__(self):
                    super().__init__()
                    self.dropout = keras.layers.Dropout(0.5, seed=1)
                    self.dense = keras.layers.Dense(1)

                def call(self, x):
                    return self.dense(self.dropout(x))

            return Plain

        models = []
        for model_class in (keras.Model, Model):
            keras.utils.set_random_seed(0)
            model = compiled(plain(model_class), at_scale_1, "mse")
            harness.fit(model, *harness.regression(16), batch_size=BATCH)
            models.append(model)
        assert_same_weights(*models)

    def test_a_call_that_takes_no_training(self):
        class Plain(Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1)

            def call(self, x, **kwargs):
                assert not kwargs
                return self.dense(x)

        model = compiled(Plain, at_scale_1, "mse")
        harness.fit(model, *harness.regression(16), batch_size=BATCH)


SUM = keras.losses.MeanSquaredError(reduction="sum")


def sums_by_itself(model_class):
    class Sums(model_class):
        def compute_loss(
            self, x=None, y=None, y_pred=None, sample_weight=None, training=True
        ):
            return tf.reduce_mean((y - y_pred) ** 2)

    return Sums


class TestLossesThatKerasDoesNotDivide:
    """At equal shares the update is stock's."""

    @staticmethod
    def models(model_class_of, loss, **arguments):
        """Returns a model of stock Keras, and one of ours, fitted alike."""
        x, y = harness.regression(16)
        made = []
        for model_class, more in ((keras.Model, {}), (Model, arguments)):
            num_replicas = arguments.get("num_replicas", 1)
            keras.utils.set_random_seed(0)
            model = compiled(
                lambda cls=model_class: model_class_of(cls),
                lambda: AdaScale(keras.optimizers.SGD(0.001), scale=1),
                loss,
                **{**more, "num_replicas": num_replicas},
            )
            harness.fit(model, harness.batches(x, y, BATCH), epochs=3)
            made.append(model)
        return made

    @pytest.mark.parametrize(
        "loss, make",
        [(SUM, lambda cls: cls), (None, sums_by_itself)],
        ids=["reduction", "compute_loss"],
    )
    def test_on_two_replicas(self, loss, make):
        models = self.models(
            lambda cls: harness.dense_model(make(cls)), loss, num_replicas=2
        )
        assert_same_weights(*models)

    @pytest.mark.parametrize("num_replicas", [1, 2])
    def test_a_sum_over_microbatches(self, num_replicas):
        """A regularizer beside it is not summed."""
        regularized = [
            lambda: keras.layers.Dense(
                3, kernel_regularizer=keras.regularizers.L2(10.0)
            )
        ]
        stock, ours = self.models(
            lambda cls: harness.dense_model(cls, hidden=regularized),
            SUM,
            num_replicas=num_replicas,
            microbatches=4 // num_replicas,
        )
        assert_same_weights(stock, ours)
        x, y = harness.regression(16)
        data = harness.batches(x, y, BATCH)
        losses = [harness.fit(m, data).history["loss"] for m in (stock, ours)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    def test_a_sum_beside_a_mean(self):
        def two_outputs(model_class):
            inputs = keras.Input((3,))
            x = keras.layers.Dense(4, "tanh")(inputs)
            outputs = {
                name: keras.layers.Dense(1, name=name)(x) for name in "ab"
            }
            return model_class(inputs, outputs)

        x, y = harness.regression(16)
        data = harness.batches(x, {"a": y, "b": 2 * y}, BATCH)
        models, logs = [], []
        for model_class, more in (
            (keras.Model, {}),
            (Model, {"microbatches": 2}),
        ):
            keras.utils.set_random_seed(0)
            model = two_outputs(model_class)
            model.compile(
                AdaScale(keras.optimizers.SGD(0.001), scale=1),
                {"a": SUM, "b": "mse"},
                loss_weights={"a": 0.5, "b": 7.0},
                **more,
            )
            history = harness.fit(model, data, epochs=2).history
            models.append(model)
            logs.append([history[f"{name}loss"] for name in ("", "a_", "b_")])
        assert_same_weights(*models)
        np.testing.assert_allclose(*logs, rtol=1e-5)


@pytest.mark.parametrize(
    "jit_compile, microbatches", [(False, 1), (True, 1), (True, 2)]
)
class TestTrainFunctionMadeAgain:
    """A program never outlives the variables that it was traced for.

    The layers have one shape, so a stale program would step the wrong one.
    """

    @staticmethod
    def model(model_class, **arguments):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        x = keras.layers.Dense(4, name="a")(inputs)
        x = keras.layers.BatchNormalization(name="norm")(x)
        x = keras.layers.Dense(4, name="b")(x)
        model = model_class(inputs, keras.layers.Dense(1)(x))
        model.compile(
            AdaScale(keras.optimizers.SGD(RATE), scale=1), "mse", **arguments
        )
        return model

    def pair(self, jit_compile, microbatches):
        """Returns stock Keras's model, or our plain one, and ours."""
        # Batch statistics differ among micro-batches: compare with our own.
        plain = {"microbatches": microbatches} if microbatches > 1 else {}
        model_class = Model if plain else keras.Model
        return (
            self.model(model_class, jit_compile=False, **plain),
            self.model(Model, jit_compile=jit_compile, **plain),
        )

    @staticmethod
    def freeze(model, **trainable):
        for name, value in trainable.items():
            model.get_layer(name).trainable = value

    def test_between_fit_and_train_on_batch(self, jit_compile, microbatches):
        x, y = harness.regression(16, width=4)
        models = self.pair(jit_compile, microbatches)
        for model in models:
            harness.fit(model, x, y, batch_size=8)
            for frozen in ({"a": False}, {"a": True, "b": False}):
                before = [w.copy() for w in model.get_weights()]
                self.freeze(model, **frozen)
                model.make_train_function(force=True)
                if "b" in frozen:
                    harness.fit(model, x, y, batch_size=8)
                model.train_on_batch(x[:8], y[:8])
                kept = [
                    np.array_equal(w, old)
                    for w, old in zip(model.get_weights(), before)
                ]
                # Kernels of a and b.
                assert [kept[0], kept[6]] == [
                    not model.get_layer("a").trainable,
                    not model.get_layer("b").trainable,
                ]
        assert_same_weights(*models, atol=1e-5)

    def test_in_another_method_of_the_same_batch(
        self, jit_compile, microbatches
    ):
        """Keras traces `train_on_batch` apart from `fit`."""
        x, y = harness.regression(8, width=4)
        models = self.pair(jit_compile, microbatches)
        for model in models:
            harness.fit(model, x, y, batch_size=8)
            before = model.get_weights()[0].copy()
            self.freeze(model, a=False)
            model.train_on_batch(x, y)
            np.testing.assert_array_equal(model.get_weights()[0], before)
        assert_same_weights(*models, atol=1e-5)

    def test_an_attribute_set_between_methods(self, jit_compile, microbatches):
        def penalized(model_class):
            class Own(model_class):
                penalty = 0.0

                def build(self, shape):
                    self.head.build(shape)

                def call(self, inputs):
                    return self.head(inputs)

                def compute_loss(
                    self, x=None, y=None, y_pred=None, *args, **kwargs
                ):
                    loss = super().compute_loss(x, y, y_pred, *args, **kwargs)
                    return loss + self.penalty * tf.reduce_mean(y_pred**2)

            keras.utils.set_random_seed(0)
            model = Own()
            model.head = keras.layers.Dense(1)
            return model

        x, y = harness.regression(8, width=4)
        models = penalized(keras.Model), penalized(Model)
        optimizers = [AdaScale(sgd(), scale=1) for _ in models]
        models[0].compile(optimizers[0], "mse", jit_compile=False)
        models[1].compile(
            optimizers[1],
            "mse",
            jit_compile=jit_compile,
            microbatches=microbatches,
        )
        for model in models:
            harness.fit(model, x, y, batch_size=8)
            model.penalty = 5.0
            model.train_on_batch(x, y)
            model.penalty = 0.0
            harness.fit(model, x, y, batch_size=8)
        assert_same_weights(*models)

    def test_with_a_batch_of_another_size(self, jit_compile, microbatches):
        """Keras traces its step again, without being asked to."""
        x, y = harness.regression(16, width=4)
        models = self.pair(jit_compile, microbatches)
        for model in models:
            model.train_on_batch(x[:8], y[:8])
            self.freeze(model, a=False)
            model.train_on_batch(x[:4], y[:4])
            self.freeze(model, a=True, norm=False)
            model.train_on_batch(x, y)
        assert_same_weights(*models, atol=1e-5)

    def test_a_layer_swapped_for_another(self, jit_compile, microbatches):
        def swapping(model_class):
            class Swapping(model_class):
                def __init__(self):
                    super().__init__()
                    self.first = keras.layers.Dense(4)
                    self.other = keras.layers.Dense(4)
                    self.last = keras.layers.Dense(1)
                    self.use_other = False

                def call(self, x):
                    layer = self.other if self.use_other else self.first
                    return self.last(layer(x))

            return Swapping

        x, y = harness.regression(16, width=4)
        models = []
        for model_class, arguments in (
            (keras.Model, {"jit_compile": False}),
            (
                Model,
                {"jit_compile": jit_compile, "microbatches": microbatches},
            ),
        ):
            keras.utils.set_random_seed(0)
            model = swapping(model_class)()
            for layer in (model.first, model.other):
                layer.build((None, 4))
            model.last.build((None, 4))
            model.compile(
                AdaScale(keras.optimizers.SGD(RATE), scale=1),
                "mse",
                **arguments,
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Gradients do not exist for")
                harness.fit(model, x, y, batch_size=8)
                model.use_other = True
                model.make_train_function(force=True)
                harness.fit(model, x, y, batch_size=8)
            models.append(model)
        assert_same_weights(*models, atol=1e-5)


class TestApplyGradients:
    """`Model.train_step` steps through `apply_gradients`, as Keras does."""

    @staticmethod
    def centralized():
        class Centralized(keras.optimizers.SGD):
            def apply_gradients(self, grads_and_vars):
                return super().apply_gradients(
                    [(g - tf.reduce_mean(g), v) for g, v in grads_and_vars]
                )

        return Centralized(RATE)

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_of_a_plain_optimizer(self, jit_compile):
        x, y = harness.regression(16)
        models = []
        for model_class in (keras.Model, Model):
            model = harness.dense_model(model_class)
            model.compile(self.centralized(), "mse", jit_compile=jit_compile)
            harness.fit(model, x, y, batch_size=BATCH)
            models.append(model)
        assert_same_weights(*models)

    def test_of_an_inner_optimizer_is_refused(self):
        rule = (
            "`inner_optimizer` must not override "
            "keras.optimizers.Optimizer.apply_gradients"
        )
        with harness.refused(rule):
            AdaScale(self.centralized())


ORDERS = {
    "outside": lambda: LossScaleOptimizer(AdaScale(sgd())),
    "inside": lambda: AdaScale(LossScaleOptimizer(sgd())),
    "both": lambda: LossScaleOptimizer(AdaScale(LossScaleOptimizer(sgd()))),
    "none": lambda: AdaScale(sgd()),
    "static": lambda: AdaScale(sgd(loss_scale_factor=64.0)),
    "static_inside": lambda: LossScaleOptimizer(
        AdaScale(sgd(loss_scale_factor=64.0))
    ),
}


class TestLossScaleInAnyOrder:
    """The gradients are divided by the loss scale once, whoever scales."""

    @staticmethod
    @functools.cache
    def reference(policy, num_replicas, microbatches):
        """Returns the weights and numbers with the scale inside."""
        keras.config.set_dtype_policy(policy)
        model, numbers = TestLossScaleInAnyOrder.fitted(
            Model,
            "inside",
            num_replicas=num_replicas,
            microbatches=microbatches,
            auto_scale_loss=False,
        )
        return weights(model), numbers

    @staticmethod
    def wrapper_of(model):
        optimizer = model.optimizer
        while not isinstance(optimizer, AdaScale):
            optimizer = optimizer.inner_optimizer
        return optimizer

    @classmethod
    def fitted(cls, model_class, order, *, spoilt=False, **arguments):
        """Returns a model, and the numbers in its optimizer."""
        model = compiled(
            lambda: harness.dense_model(model_class),
            ORDERS[order],
            "mse",
            **arguments,
        )
        x, y = harness.regression(32)
        if spoilt:
            x[15] = np.inf  # The last row of the second step's batch.
        harness.fit(model, harness.batches(x / 8, y / 8, BATCH))
        optimizer = cls.wrapper_of(model)
        return model, (
            float(optimizer.gain),
            float(optimizer.scale_invariant_step),
            harness.iterations(model),
        )

    @pytest.mark.parametrize(
        "order, policy",
        [
            *((order, "float32") for order in ORDERS),
            # Keras puts a scale around these.
            *((order, "mixed_float16") for order in ("inside", "none")),
        ],
    )
    def test_in_a_stock_model_on_one_device(self, order, policy):
        expected, numbers = self.reference(policy, 1, 1)
        keras.config.set_dtype_policy(policy)
        model, received = self.fitted(keras.Model, order)
        harness.assert_close(weights(model), expected)
        assert received == pytest.approx(numbers, rel=1e-6)

    @pytest.mark.parametrize(
        "order, num_replicas, microbatches",
        [
            *((order, 1, 2) for order in ORDERS),
            *((order, 2, 2) for order in ("outside", "both")),
        ],
    )
    def test_in_our_model(self, order, num_replicas, microbatches):
        expected, numbers = self.reference(
            "float32", num_replicas, microbatches
        )
        model, received = self.fitted(
            Model, order, num_replicas=num_replicas, microbatches=microbatches
        )
        harness.assert_close(weights(model), expected)
        assert received == pytest.approx(numbers, rel=1e-6)
        assert numbers[0] > 1.01
        # The wrapper is outermost, and what scales the loss inside it.
        assert isinstance(model.optimizer, AdaScale)
        assert model.optimizer.microbatches == microbatches

    @pytest.mark.parametrize(
        "order, num_replicas",
        [("outside", 1), ("outside", 2), ("inside", 2), ("static", 1)],
    )
    def test_an_overflow_skips_one_step(self, order, num_replicas):
        model, (*_, iterations) = self.fitted(
            Model, order, spoilt=True, num_replicas=num_replicas
        )
        assert iterations == 3
        assert int(model.optimizer.skipped_steps) == 1
        assert all(np.isfinite(w).all() for w in weights(model))

    @pytest.mark.parametrize("built", [False, True])
    def test_is_refused_before_and_after_build_on_several(self, built):
        """`build` refuses first, unless it was called before."""
        strategy = harness.strategy_of(2)
        rule = "`adascale` must not be inside another optimizer on several"
        with strategy.scope():
            weights = harness.variables(harness.twos())
            optimizer = AdaScale(sgd())
            if built:
                optimizer.build(weights)
            LossScaleOptimizer(optimizer)
            if not built:
                with harness.refused(rule, "replicas=2"):
                    optimizer.build(weights)
        ones = [tf.ones(shape) for shape in harness.SHAPES]
        with harness.refused(rule, "replicas=2"):
            strategy.run(lambda: optimizer.apply(ones, weights))

    def test_the_settings_of_the_one_outside_are_kept(self):
        scaler = LossScaleOptimizer(
            AdaScale(sgd()), initial_scale=8.0, dynamic_growth_steps=2
        )
        model = harness.dense_model(Model)
        model.compile(scaler, "mse")
        harness.fit(model, *harness.regression(16), batch_size=BATCH)
        assert model.optimizer.inner_optimizer is scaler
        assert harness.first(scaler.dynamic_scale) == 16.0

    @pytest.mark.parametrize(
        "order, policy", [("both", "float32"), ("none", "mixed_float16")]
    )
    def test_is_refused_in_a_stock_model_on_several(self, order, policy):
        keras.config.set_dtype_policy(policy)
        rule = "`adascale` must not be inside another optimizer on several"
        with harness.refused(rule, "replicas=2"):
            self.fitted(keras.Model, order, num_replicas=2)

    def test_a_stock_model_is_saved_with_it(self, tmp_path):
        model, _ = self.fitted(keras.Model, "outside")
        path = tmp_path / "model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
        harness.assert_same(model.optimizer, loaded.optimizer)
        x, y = harness.regression(16)
        for each in (model, loaded):
            harness.fit(each, x, y, batch_size=BATCH)
        assert_same_weights(model, loaded, atol=0)

    def test_callbacks_find_the_gain_inside(self):
        model = harness.dense_model(keras.Model)
        model.compile(ORDERS["outside"](), "mse")
        x, y = harness.regression(32)
        history = harness.fit(
            model,
            x,
            y,
            batch_size=BATCH,
            epochs=9,
            callbacks=[
                tf_adascale.callbacks.ScalingLog(),
                tf_adascale.callbacks.StopAtScaleInvariantStep(6),
            ],
        ).history
        assert history["gain"] == [1.0, 1.0]
        assert history["scale_invariant_step"] == [4.0, 6.0]

    def test_microbatches_need_the_wrapper_outermost(self):
        multi = getattr(keras.optimizers, "MultiOptimizer", None)
        if multi is None:
            pytest.skip(f"Keras {keras.__version__} has no MultiOptimizer")
        inner = AdaScale(sgd())
        outer = multi(keras.optimizers.OptimizerMap(inner))
        model = harness.dense_model(Model)
        rule = "`optimizer` must not have a tf_adascale optimizer inside"
        with harness.refused(rule, "optimizer="):
            model.compile(outer, "mse", microbatches=2)


class TestMicrobatchesAreTaken:
    """Or refused in a sentence."""

    def test_a_sum_inside_a_compute_loss(self):
        class Own(Model):
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs)

        x, y = harness.regression(8)
        models = []
        for k in (1, 4):
            keras.utils.set_random_seed(0)
            inputs = keras.Input(x.shape[1:])
            outputs = keras.layers.Dense(1)(inputs)
            model = (keras.Model if k == 1 else Own)(inputs, outputs)
            loss = keras.losses.MeanSquaredError(reduction="sum")
            if k == 1:
                model.compile(keras.optimizers.SGD(0.01), loss)
            else:
                optimizer = AdaScale(keras.optimizers.SGD(0.01), scale=1)
                model.compile(optimizer, loss, microbatches=k)
            harness.fit(model, x, y, batch_size=8)
            models.append(model)
        assert_same_weights(*models, atol=1e-5)
        stock, ours = (
            model.evaluate(x, y, batch_size=8, verbose=0) for model in models
        )
        assert ours == pytest.approx(stock, rel=1e-5)

    def test_a_loss_without_a_reduction(self):
        loss = keras.losses.MeanSquaredError(reduction="none")
        model = harness.dense_model(Model)
        with harness.refused("`loss` must have a reduction", "loss=<"):
            model.compile("sgd", loss, microbatches=2)
        assert not model.compiled

    @staticmethod
    def own_loss(loss, **layers):
        """Returns a model whose loss is a function of it and the data."""

        class Own(Model):
            def build(self, shape):
                """Builds no layer, and Keras does not warn of that."""

            def call(self, inputs):
                return self.body(inputs) if "body" in layers else inputs

            def compute_loss(
                self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs
            ):
                return loss(self, y, y_pred)

        keras.utils.set_random_seed(0)
        model = Own()
        for name, layer in layers.items():
            setattr(model, name, layer)
        return model

    def test_a_loss_per_example(self):
        model = self.own_loss(
            lambda model, y, y_pred: tf.reduce_sum((y - y_pred) ** 2, -1),
            body=keras.layers.Dense(1),
        )
        model.compile(at_scale_1(), microbatches=2)
        with harness.refused(
            "`compute_loss` must return a scalar", "a loss of shape (4,)"
        ):
            harness.fit(model, *harness.regression(8), batch_size=8)

    @pytest.mark.parametrize("jit_compile", [False, True])
    @pytest.mark.parametrize("names", ["head", "body head"])
    def test_layers_that_only_the_loss_builds(self, names, jit_compile):
        found = []
        for microbatches in (1, 2):
            model = self.own_loss(
                lambda model, y, y_pred: tf.reduce_mean(
                    (y - model.head(y_pred)) ** 2
                ),
                **{name: keras.layers.Dense(1) for name in names.split()},
            )
            model.compile(
                at_scale_1(), microbatches=microbatches, jit_compile=jit_compile
            )
            harness.fit(model, *harness.regression(8), batch_size=8, epochs=2)
            found.append(model)
        assert_same_weights(*found)

    @pytest.mark.parametrize("auxiliary", [tf.reduce_sum, lambda x: 1.0])
    def test_an_output_without_a_batch(self, auxiliary):
        class Own(Model):
            def call(self, inputs):
                return {"y": inputs, "auxiliary": auxiliary(inputs)}

        model = Own()
        model.compile(at_scale_1(), {"y": "mse"}, microbatches=2)
        x, y = harness.regression(8)
        with harness.refused("`microbatches` must be 1 for a model with an"):
            harness.fit(model, x, {"y": y}, batch_size=8)

    def test_by_an_optimizer_that_two_models_have(self):
        optimizer = AdaScale(sgd(), estimator="differenced")
        model, other = harness.dense_model(Model), harness.dense_model(Model)
        model.compile(optimizer, "mse", microbatches=4)
        other.compile(optimizer, "mse")
        harness.fit(model, *harness.regression(8), batch_size=8)
        assert optimizer.scale == 4

    @pytest.mark.parametrize("wrap", [tf_adascale.Adasum, AdaScale])
    def test_a_train_step_without_them(self, wrap):
        class Own(Model):
            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                variables = self.trainable_variables
                gradients = tape.gradient(loss, variables)
                self.optimizer.apply(gradients, variables)
                return {"loss": loss}

        model = harness.dense_model(Own)
        model.compile(wrap(sgd()), "mse", microbatches=2)
        before = weights(model)
        with pytest.raises(
            ValueError, match=r"`(microbatches|sample_sqnorm_sum)` must"
        ):
            harness.fit(model, *harness.regression(8), batch_size=8)
        for old, new in zip(before, weights(model)):
            np.testing.assert_array_equal(old, new)


class TestNothingTrainable:
    """Keras warns and continues: metrics are computed, statistics move."""

    @pytest.mark.parametrize(
        "num_replicas, jit_compile, microbatches",
        [(1, False, 1), (1, True, 1), (1, False, 2), (2, True, 2)],
    )
    def test_warns_and_moves_statistics(
        self, num_replicas, jit_compile, microbatches
    ):
        def frozen():
            model = harness.dense_model(
                Model, hidden=[lambda: keras.layers.BatchNormalization()]
            )
            for layer in model.layers:
                if isinstance(layer, keras.layers.Dense):
                    layer.trainable = False
                else:
                    for variable in layer.trainable_variables:
                        variable.trainable = False
            return model

        model = compiled(
            frozen,
            lambda: AdaScale(sgd()),
            "mse",
            num_replicas=num_replicas,
            microbatches=microbatches,
            jit_compile=jit_compile,
        )
        before = weights(model)
        x, y = harness.regression(16)
        with pytest.warns(UserWarning, match="not have any trainable weights"):
            history = harness.fit(model, harness.batches(x, y, BATCH))
        assert np.isfinite(history.history["loss"]).all()
        moved = [
            not np.array_equal(*pair) for pair in zip(before, weights(model))
        ]
        statistics = ["moving" in variable.name for variable in model.weights]
        assert moved == statistics
        assert harness.iterations(model) == 0


@pytest.mark.parametrize(
    "wrap", [at_scale_1, lambda: tf_adascale.Adasum(sgd())]
)
@pytest.mark.parametrize("model_class", [keras.Model, Model])
def test_a_weight_without_a_gradient_is_warned_of(wrap, model_class):
    class Unused(model_class):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.unused = self.add_weight(shape=(2,), name="unused")

        def call(self, x):
            return self.dense(x)

    model = Unused()
    model.compile(wrap(), "mse")
    with pytest.warns(UserWarning, match=r"Gradients do not exist.*unused"):
        harness.fit(model, *harness.regression(8))
