"""`Model` against stock Keras, steps written by hand, other strategies."""

import contextlib
import io
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tf_adascale import replicas

BATCH = 8
RATE = 0.1
ROUNDING = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def float64():
    """Makes Keras work in double precision, to compare to rounding errors."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)


def data(size=BATCH, width=3):
    generator = np.random.default_rng(1)
    x = generator.normal(size=(size, width)).astype(keras.config.floatx())
    noise = generator.normal(size=(size, 1)).astype(keras.config.floatx())
    return x, x.sum(axis=1, keepdims=True) + noise


def batches(x, y, size=BATCH):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def sgd():
    return keras.optimizers.SGD(RATE)


def adascale(**arguments):
    return tf_adascale.AdaScale(sgd(), **arguments)


def dense_model(model_class=tf_adascale.Model, *, hidden=(), units=4):
    """A model of two layers, and any made by `hidden` between.

    The weights are always the same.
    """
    keras.utils.set_random_seed(7)
    inputs = keras.Input((3,))
    x = keras.layers.Dense(units, activation="tanh")(inputs)
    for make_layer in hidden:
        x = make_layer()(x)
    return model_class(inputs, keras.layers.Dense(1)(x))


def fit(model, dataset, **arguments):
    return model.fit(
        dataset, **{"verbose": 0, "shuffle": False, **arguments}
    ).history


def trained(
    strategy,
    optimizer,
    dataset,
    *,
    make_model=dense_model,
    epochs=1,
    **compiled,
):
    """Returns a model made, compiled and fitted under a strategy."""
    with strategy.scope():
        model = make_model()
        model.compile(optimizer(), "mse", **compiled)
    fit(model, dataset, epochs=epochs)
    return model


def iterations(model):
    return int(tf.convert_to_tensor(model.optimizer.iterations))


def assert_same_weights(model, other, **tolerance):
    weights, expected = model.get_weights(), other.get_weights()
    assert len(weights) == len(expected)
    for weight, value in zip(weights, expected):
        np.testing.assert_allclose(weight, value, **tolerance)


# Ways to make a model. The classes are made anew in each test, because making a
# functional instance changes its class.


def functional():
    inputs = keras.Input((3,))
    return tf_adascale.Model(inputs, keras.layers.Dense(1)(inputs))


def functional_by_name():
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(1)(inputs)
    return tf_adascale.Model(inputs=inputs, outputs=outputs, name="named")


def subclassed():
    class Subclassed(tf_adascale.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    return Subclassed()


def functional_subclass():
    class FunctionalSubclass(tf_adascale.Model):
        def __init__(self, units):
            inputs = keras.Input((3,))
            super().__init__(inputs, keras.layers.Dense(units)(inputs))

    return FunctionalSubclass(1)


def subclass_of_a_subclass():
    class Base(tf_adascale.Model):
        """Adds a method, and is made from inputs and outputs."""

    class Derived(Base):
        def __init__(self):
            inputs = keras.Input((3,))
            super().__init__(inputs, keras.layers.Dense(1)(inputs))

    return Derived()


class TestConstruction:
    @pytest.mark.parametrize(
        "makers",
        list(
            itertools.permutations(
                (functional, subclassed, functional_subclass)
            )
        ),
        ids=lambda makers: "-".join(maker.__name__ for maker in makers),
    )
    def test_kinds_do_not_disturb_each_other(self, makers):
        x, y = data()
        models = [make() for make in makers]
        for model in models:
            model.compile("sgd", "mse", microbatches=2, run_eagerly=True)
            loss = model.train_on_batch(x, y)
            assert np.isfinite(loss)
            assert model.predict_on_batch(x).shape == (BATCH, 1)
            assert [w.shape for w in model.get_weights()] == [(3, 1), (1,)]

    @pytest.mark.parametrize(
        "make",
        [
            functional,
            functional_by_name,
            functional_subclass,
            subclass_of_a_subclass,
        ],
    )
    def test_functional_models_are_keras_functional_models(self, make):
        model = make()
        assert isinstance(model, tf_adascale.Model)
        assert isinstance(model, keras.Model)
        assert model.inputs[0].shape == (None, 3)
        assert model.outputs[0].shape == (None, 1)
        assert model.microbatches == 1

    def test_a_subclass_has_no_inputs_of_its_own(self):
        functional()
        model = subclassed()
        assert not model.built
        assert not hasattr(model, "inputs") or not model.inputs

    def test_model_itself_stays_a_plain_class(self):
        bases = tf_adascale.Model.__bases__
        functional()
        functional_subclass()
        assert tf_adascale.Model.__bases__ == bases == (keras.Model,)

    def test_clones_and_saves_as_itself(self, tmp_path):
        model = functional()
        clone = keras.models.clone_model(model)
        assert isinstance(clone, tf_adascale.Model)
        model.compile(adascale(), "mse", microbatches=2)
        x, y = data()
        model.fit(x, y, verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert isinstance(loaded, tf_adascale.Model)
        assert isinstance(loaded.optimizer, tf_adascale.AdaScale)
        assert loaded.microbatches == loaded.optimizer.microbatches == 2
        for each in (model, loaded):
            each.fit(x, y, verbose=0)
        assert_same_weights(loaded, model, rtol=0, atol=0)


class TestCompile:
    @pytest.mark.parametrize("microbatches", [0, -1, 2.0, "2", None])
    def test_refuses_what_is_no_count(self, microbatches):
        model = functional()
        optimizer = adascale()
        model.compile(optimizer, "mse", microbatches=2)
        with pytest.raises(
            ValueError,
            match="A batch cannot be split in this many parts. Expected an int "
            f">= 1. Received: microbatches={microbatches!r}",
        ):
            model.compile("sgd", "mse", microbatches=microbatches)
        # Nothing changed.
        assert model.microbatches == optimizer.microbatches == 2
        assert model.optimizer is optimizer

    def test_compiling_again_sets_the_count(self):
        model, optimizer = functional(), adascale()
        model.compile(optimizer, "mse", microbatches=4)
        x, y = data()
        model.fit(x, y, batch_size=BATCH, verbose=0)
        assert float(optimizer.scale) == 4
        model.compile(optimizer, "mse", microbatches=2)
        model.fit(x, y, batch_size=BATCH, verbose=0)
        assert float(optimizer.scale) == 2
        assert iterations(model) == 2


class TestAgainstStockKeras:
    """One micro-batch, plain optimizers, the default strategy."""

    @pytest.mark.parametrize("run_eagerly", [False, True])
    def test_fit_equals_to_the_bit(self, run_eagerly):
        x, y = data(20)
        histories, models = [], []
        for model_class in (keras.Model, tf_adascale.Model):
            hidden = [
                keras.layers.BatchNormalization,
                lambda: keras.layers.Dropout(0.5, seed=1),
            ]
            model = dense_model(model_class, hidden=hidden)
            model.compile(
                keras.optimizers.SGD(RATE, momentum=0.9),
                "mse",
                metrics=["mae"],
                run_eagerly=run_eagerly,
            )
            histories.append(
                # The last batch has four rows.
                fit(
                    model,
                    batches(x, y),
                    epochs=2,
                    validation_data=batches(x, y),
                )
            )
            models.append(model)
        assert histories[0] == histories[1]
        assert_same_weights(*models, rtol=0, atol=0)

    def test_adascale_at_scale_1_equals_to_the_bit(self, strategy_of):
        x, y = data(20)
        stock = dense_model(keras.Model)
        stock.compile(sgd(), "mse")
        fit(stock, batches(x, y), epochs=2)
        ours = trained(strategy_of(1), adascale, batches(x, y), epochs=2)
        assert_same_weights(ours, stock, rtol=0, atol=0)

    def test_a_call_without_training_and_no_targets(self):
        class Distance(tf_adascale.Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1, use_bias=False)

            def call(self, x):
                y = self.dense(x)
                self.add_loss(tf.reduce_mean(y**2))
                return y

        model = Distance()
        model.compile(sgd(), microbatches=2)
        x, _ = data()
        history = model.fit(x, verbose=0, epochs=20).history
        assert history["loss"][-1] < history["loss"][0]


class TestMicrobatches:
    """Against steps written by hand, in float64."""

    @staticmethod
    def step(model, losses):
        """Takes a step of SGD by the mean of the gradients of the losses."""
        samples = []
        for loss in losses:
            with tf.GradientTape() as tape:
                value = loss()
            samples.append(tape.gradient(value, model.trainable_variables))
        for variable, *gradients in zip(model.trainable_variables, *samples):
            if gradients[0] is not None:
                mean = sum(map(tf.convert_to_tensor, gradients))
                variable.assign_sub(RATE * mean / len(losses))

    def expected(self, model, x, y, count, weights=None, steps=1):
        """Trains by hand on the squared error and the model's own losses."""
        weights = np.ones(len(y)) if weights is None else weights
        parts = np.split(np.arange(len(y)), count)

        def loss(rows):
            error = model(x[rows], training=True) - y[rows]
            squares = tf.reduce_mean(error**2, axis=-1) * weights[rows]
            return tf.reduce_mean(squares) + sum(model.losses)

        for _ in range(steps):
            self.step(model, [lambda rows=rows: loss(rows) for rows in parts])
        return model

    @pytest.mark.parametrize(
        "microbatches, jit_compile", [(1, True), (2, False), (4, True)]
    )
    def test_batch_statistics_of_each_part(
        self, float64, microbatches, jit_compile
    ):
        x, y = data()

        def make():
            return dense_model(hidden=[keras.layers.BatchNormalization])

        model = make()
        model.compile(
            sgd(), "mse", microbatches=microbatches, jit_compile=jit_compile
        )
        fit(model, batches(x, y), epochs=2)
        expected = self.expected(make(), x, y, microbatches, steps=2)
        # get_weights has the moving averages too. Keras's normalisation has
        # constants in float32.
        assert_same_weights(model, expected, rtol=0, atol=1e-7)

    def test_moving_averages_by_hand(self):
        inputs = keras.Input((1,))
        layer = keras.layers.BatchNormalization(momentum=0.5)
        model = tf_adascale.Model(inputs, layer(inputs))
        model.compile(sgd(), "mse", microbatches=2)
        x = np.array([[1], [3], [10], [20]], "float32")
        model.fit(x, x, batch_size=4, shuffle=False, verbose=0)
        # Means 2 and 15: 0 -> 1 -> 8. Variances 1 and 25: 1 -> 1 -> 13.
        np.testing.assert_allclose(layer.moving_mean, [8.0])
        np.testing.assert_allclose(layer.moving_variance, [13.0])

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_regularizers_and_added_losses(self, float64, jit_compile):
        x, y = data()

        def make():
            return dense_model(
                hidden=[
                    lambda: keras.layers.Dense(4, kernel_regularizer="l2"),
                    lambda: keras.layers.ActivityRegularization(l2=0.01),
                ]
            )

        model = make()
        model.compile(sgd(), "mse", microbatches=2, jit_compile=jit_compile)
        fit(model, batches(x, y))
        # Keras keeps the factors of its regularizers in float32.
        assert_same_weights(
            model, self.expected(make(), x, y, 2), rtol=0, atol=1e-7
        )

    def test_sample_weights(self, float64):
        x, y = data()
        weights = np.arange(BATCH, dtype="float64")
        model = dense_model()
        model.compile(sgd(), "mse", microbatches=2)
        model.fit(x, y, sample_weight=weights, shuffle=False, verbose=0)
        expected = self.expected(dense_model(), x, y, 2, weights)
        assert_same_weights(model, expected, **ROUNDING)

    def test_class_weights(self, float64):
        x, _ = data()
        y = np.arange(BATCH).reshape(-1, 1) % 2
        model = dense_model()
        model.compile(sgd(), "mse", microbatches=4)
        model.fit(x, y, class_weight={0: 1.0, 1: 3.0}, shuffle=False, verbose=0)
        weights = np.where(y.ravel() == 1, 3.0, 1.0)
        expected = self.expected(dense_model(), x, y, 4, weights)
        # Keras makes them float32 weights; these are exact.
        assert_same_weights(model, expected, **ROUNDING)

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_embeddings(self, float64, jit_compile):
        ids = np.array([[0, 1], [1, 1], [3, 0], [3, 3]] * 2)
        _, y = data()

        def make():
            keras.utils.set_random_seed(7)
            inputs = keras.Input((2,), dtype="int64")
            # Row 2 and row 4 are never looked up.
            x = keras.layers.Embedding(5, 3)(inputs)
            x = keras.layers.Flatten()(x)
            return tf_adascale.Model(inputs, keras.layers.Dense(1)(x))

        model = make()
        model.compile(sgd(), "mse", microbatches=2, jit_compile=jit_compile)
        fit(model, batches(ids, y), epochs=2)
        expected = self.expected(make(), ids, y, 2, steps=2)
        assert_same_weights(model, expected, **ROUNDING)

    # Of the weight of no use.
    @pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_dicts_of_inputs_and_outputs_and_a_weight_of_no_use(
        self, float64, jit_compile
    ):
        x, y = data()
        z = x[:, :2] ** 2

        def make():
            keras.utils.set_random_seed(7)
            inputs = {
                "x": keras.Input((3,), name="x"),
                "z": keras.Input((2,), name="z"),
            }
            joined = keras.layers.Concatenate()([inputs["x"], inputs["z"]])
            outputs = {
                "value": keras.layers.Dense(1, name="value")(joined),
                "square": keras.layers.Dense(1, name="square")(joined),
                "unused": keras.layers.Dense(2, name="unused")(joined),
            }
            return tf_adascale.Model(inputs, outputs)

        model, expected = make(), make()
        model.compile(
            sgd(),
            {"value": "mse", "square": "mse"},
            loss_weights={"value": 1.0, "square": 0.5},
            metrics={"value": ["mae"]},
            microbatches=2,
            jit_compile=jit_compile,
        )
        inputs = {"x": x, "z": z}
        targets = {"value": y, "square": y**2, "unused": y}
        history = fit(model, batches(inputs, targets))
        assert "value_mae" in history

        def loss(rows):
            y_pred = expected({"x": x[rows], "z": z[rows]})
            value = tf.reduce_mean((y_pred["value"] - y[rows]) ** 2)
            square = tf.reduce_mean((y_pred["square"] - y[rows] ** 2) ** 2)
            return value + 0.5 * square

        halves = np.split(np.arange(BATCH), 2)
        self.step(expected, [lambda rows=rows: loss(rows) for rows in halves])
        assert_same_weights(model, expected, **ROUNDING)

    @pytest.mark.parametrize("microbatches", [1, 2])
    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_a_compute_loss_of_ones_own(
        self, float64, microbatches, jit_compile
    ):
        class Quartic(tf_adascale.Model):
            def compute_loss(
                self,
                x=None,
                y=None,
                y_pred=None,
                sample_weight=None,
                training=True,
            ):
                return tf.reduce_mean((y_pred - y) ** 4)

        x, y = data()
        model, expected = dense_model(Quartic), dense_model()
        model.compile(sgd(), microbatches=microbatches, jit_compile=jit_compile)
        fit(model, batches(x, y))
        parts = np.split(np.arange(BATCH), microbatches)
        self.step(
            expected,
            [
                lambda rows=rows: tf.reduce_mean(
                    (expected(x[rows]) - y[rows]) ** 4
                )
                for rows in parts
            ],
        )
        assert_same_weights(model, expected, **ROUNDING)

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_dropout_draws_anew_for_each_part(self, jit_compile):
        inputs = keras.Input((64,))
        x = keras.layers.Dropout(0.5)(inputs)
        outputs = keras.layers.Dense(1, use_bias=False)(x)
        model = tf_adascale.Model(inputs, outputs)
        model.compile(
            adascale(),
            lambda y_true, y_pred: y_pred,
            microbatches=2,
            jit_compile=jit_compile,
        )
        fit(model, batches(np.ones((2, 64), "float32"), np.zeros((2, 1))))
        # Without dropout both gradients are all ones. With one mask for both
        # they would be equal, too. Two masks differ in half of 64 entries of 2:
        # sigma^2 = |g_1 - g_2|^2 = 32 * 4 = 128 or so.
        assert float(model.optimizer.gradient_variance) > 50

    @pytest.mark.parametrize(
        "microbatches, jit_compile", [(1, False), (2, True), (4, False)]
    )
    def test_metrics_are_those_of_the_whole_batch(
        self, microbatches, jit_compile
    ):
        x, y = data(2 * BATCH)
        targets = (y > 0).astype("float32")
        weights = np.linspace(0, 2, 2 * BATCH)
        histories = []
        for model_class in (keras.Model, tf_adascale.Model):
            model = dense_model(model_class)
            arguments = {"jit_compile": jit_compile}
            if model_class is tf_adascale.Model:
                arguments["microbatches"] = microbatches
            model.compile(
                # The predictions of the second batch depend on the first step.
                keras.optimizers.SGD(0.0),
                "mse",
                metrics=[
                    "mae",
                    keras.metrics.AUC(from_logits=True, name="auc"),
                ],
                weighted_metrics=["mse"],
                **arguments,
            )
            histories.append(
                model.fit(
                    x,
                    targets,
                    sample_weight=weights,
                    batch_size=BATCH,
                    shuffle=False,
                    verbose=0,
                ).history
            )
        stock, ours = histories
        assert set(ours) == set(stock)
        for name, values in stock.items():
            assert ours[name] == pytest.approx(values, rel=1e-6)

    @pytest.mark.parametrize(
        "microbatches, jit_compile", [(1, False), (1, True), (2, False)]
    )
    def test_metrics_heed_masks(self, microbatches, jit_compile):
        ids = np.array([[1, 2, 0], [3, 0, 0], [1, 1, 1], [2, 3, 0]])
        targets = np.ones((4, 3, 1), "float32")
        results = []
        for model_class in (keras.Model, tf_adascale.Model):
            keras.utils.set_random_seed(7)
            inputs = keras.Input((3,), dtype="int64")
            x = keras.layers.Embedding(4, 2, mask_zero=True)(inputs)
            outputs = keras.layers.Dense(1)(x)
            model = model_class(inputs, outputs)
            arguments = {}
            if model_class is tf_adascale.Model:
                arguments["microbatches"] = microbatches
            model.compile(
                sgd(),
                "mse",
                metrics=["mae"],
                jit_compile=jit_compile,
                **arguments,
            )
            results.append(fit(model, batches(ids, targets))["mae"])
        assert results[1] == pytest.approx(results[0], rel=1e-6)

    def test_uneven_batch_of_known_size(self):
        x, y = data(6)
        model = dense_model()
        model.compile(adascale(), "mse", microbatches=2)
        before = dense_model()
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(
            3, drop_remainder=True
        )
        with pytest.raises(ValueError, match="batch=3, microbatches=2"):
            fit(model, dataset)
        assert_same_weights(model, before, rtol=0, atol=0)

    @pytest.mark.parametrize(
        "num_replicas, steps_per_execution", [(1, 1), (1, 4), (2, 4)]
    )
    def test_uneven_batch_of_size_known_when_it_comes(
        self, strategy_of, num_replicas, steps_per_execution
    ):
        size = 4 * num_replicas
        x, y = data(3 * size - num_replicas)

        def compiled():
            with strategy_of(num_replicas).scope():
                model = dense_model()
                model.compile(
                    adascale(),
                    "mse",
                    microbatches=2,
                    steps_per_execution=steps_per_execution,
                )
            return model

        # The third batch has three rows for each replica.
        model, expected = compiled(), compiled()
        with pytest.raises(
            ValueError,
            match="Micro-batches do not divide the batch. Expected a batch per "
            r"replica that is a multiple of `microbatches`; .*"
            r"drop_remainder=True\? Received: batch=3, microbatches=2$",
        ):
            fit(model, batches(x, y, size))
        fit(expected, batches(x[: 2 * size], y[: 2 * size], size))
        # What the two steps before did stays, and nothing of the third.
        assert iterations(model) == 2
        assert_same_weights(model, expected, rtol=0, atol=0)
        for variable, value in zip(
            model.optimizer.variables, expected.optimizer.variables
        ):
            np.testing.assert_array_equal(
                tf.convert_to_tensor(variable), tf.convert_to_tensor(value)
            )


class TestReplicas:
    def oracle(self, x, y, num_samples, steps):
        """AdaScale on a linear least-squares model from zero, in NumPy."""
        weights = np.zeros(x.shape[1])
        variance = sqnorm = progress = 0.0
        for step in range(steps):
            rows = slice(step * BATCH, (step + 1) * BATCH)
            samples = []
            for inputs, targets in zip(
                np.split(x[rows].astype("float64"), num_samples),
                np.split(y[rows].ravel().astype("float64"), num_samples),
            ):
                residual = inputs @ weights - targets
                samples.append(2 * residual @ inputs / len(inputs))
            mean = np.mean(samples, axis=0)
            covariance = np.var(samples, axis=0, ddof=1).sum()
            sample_variance = max(covariance, 1e-30)
            sample_sqnorm = max(mean @ mean - covariance / num_samples, 0)
            # theta = 1 - n/1000: below 1000/n steps, a plain mean.
            weight = max(num_samples / 1000, 1 / (step + 1))
            variance += weight * (sample_variance - variance)
            sqnorm += weight * (sample_sqnorm - sqnorm)
            gain = (variance + sqnorm) / (variance / num_samples + sqnorm)
            weights -= gain * RATE * 0.9 ** int(progress) * mean
            progress += gain
        return weights, gain, progress

    @pytest.mark.parametrize("num_replicas", [1, 2])
    @pytest.mark.parametrize("microbatches", [1, 4])
    def test_reported_loss_is_the_mean_over_the_batch(
        self, strategy_of, num_replicas, microbatches
    ):
        x, y = data()
        strategy = strategy_of(num_replicas)
        with strategy.scope():
            model = dense_model()
            model.compile(sgd(), "mse", microbatches=microbatches)
        expected = np.mean((model(x).numpy() - y) ** 2)
        (loss,) = fit(model, batches(x, y))["loss"]
        assert loss == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        "num_replicas, microbatches, jit_compile",
        [
            (1, 4, False),
            (1, 4, True),
            (2, 2, False),
            (2, 2, True),
            (4, 1, False),
            (2, 4, False),
        ],
    )
    def test_replicas_and_microbatches_are_all_samples(
        self, strategy_of, num_replicas, microbatches, jit_compile
    ):
        steps = 5
        x, y = data(steps * BATCH)

        def make_model():
            inputs = keras.Input((3,))
            outputs = keras.layers.Dense(
                1, use_bias=False, kernel_initializer="zeros"
            )(inputs)
            return tf_adascale.Model(inputs, outputs)

        def optimizer():
            schedule = keras.optimizers.schedules.ExponentialDecay(RATE, 1, 0.9)
            return tf_adascale.AdaScale(keras.optimizers.SGD(schedule))

        model = trained(
            strategy_of(num_replicas),
            optimizer,
            batches(x, y),
            make_model=make_model,
            microbatches=microbatches,
            jit_compile=jit_compile,
        )
        weights, gain, progress = self.oracle(
            x, y, num_replicas * microbatches, steps
        )
        received = model.get_weights()[0].ravel()
        np.testing.assert_allclose(received, weights, rtol=0, atol=1e-5)
        assert float(model.optimizer.gain) == pytest.approx(gain, rel=1e-5)
        tau = float(model.optimizer.scale_invariant_step)
        assert tau == pytest.approx(progress, rel=1e-5)

    def test_double_precision(self, float64):
        x, y = data(2 * BATCH)
        model = dense_model()
        model.compile(adascale(), "mse", microbatches=2)
        fit(model, batches(x, y))
        assert iterations(model) == 2
        assert 1 <= float(model.optimizer.gain) <= 2

    @pytest.mark.parametrize(
        "optimizer",
        [
            keras.optimizers.SGD,
            lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
            keras.optimizers.Adam,
        ],
        ids=["sgd", "momentum", "adam"],
    )
    def test_plain_optimizers(self, strategy_of, optimizer):
        x, y = data(3 * BATCH)
        stock = dense_model(keras.Model)
        stock.compile(optimizer(RATE), "mse")
        fit(stock, batches(x, y))
        model = trained(
            strategy_of(2),
            lambda: optimizer(RATE),
            batches(x, y),
            microbatches=2,
        )
        assert_same_weights(model, stock, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("hidden", ["dropout", "normalization"])
    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_layers_with_a_state(self, strategy_of, hidden, jit_compile):
        x, y = data(2 * BATCH)

        def make_model():
            return dense_model(
                hidden=[
                    lambda: (
                        keras.layers.Dropout(0.1)
                        if hidden == "dropout"
                        else keras.layers.BatchNormalization()
                    )
                ]
            )

        before = make_model()
        model = trained(
            strategy_of(2),
            adascale,
            batches(x, y),
            make_model=make_model,
            microbatches=2,
            jit_compile=jit_compile,
        )
        assert iterations(model) == 2
        for weight, initial in zip(model.get_weights(), before.get_weights()):
            assert np.isfinite(weight).all()
            assert (weight != initial).any()


class TestJitCompile:
    @pytest.mark.parametrize("num_replicas, microbatches", [(1, 2), (2, 1)])
    def test_equals_the_uncompiled(
        self, strategy_of, num_replicas, microbatches
    ):
        x, y = data(4 * BATCH)
        models = [
            trained(
                strategy_of(num_replicas),
                adascale,
                batches(x, y),
                microbatches=microbatches,
                metrics=["mae"],
                jit_compile=jit_compile,
            )
            for jit_compile in (False, True)
        ]
        assert_same_weights(*models, rtol=0, atol=1e-5)
        gains = [float(model.optimizer.gain) for model in models]
        assert gains[0] == pytest.approx(gains[1], rel=1e-4)


class TestStepsPerExecution:
    # m = 3 does not divide 7.
    STEPS = 7

    @pytest.mark.parametrize("num_replicas, microbatches", [(1, 2), (2, 1)])
    def test_takes_the_same_steps(
        self, strategy_of, num_replicas, microbatches
    ):
        x, y = data(self.STEPS * BATCH)
        models = [
            trained(
                strategy_of(num_replicas),
                adascale,
                batches(x, y),
                epochs=2,
                microbatches=microbatches,
                steps_per_execution=steps_per_execution,
            )
            for steps_per_execution in (1, 3)
        ]
        for model in models:
            assert iterations(model) == 2 * self.STEPS
            assert_same_weights(model, models[0], rtol=0, atol=1e-6)

    # Keras warns of every dataset of unknown size at its end.
    @pytest.mark.filterwarnings("ignore:.*ran out of data:UserWarning")
    @pytest.mark.parametrize("num_replicas", [1, 2])
    @pytest.mark.parametrize("steps_per_execution", [1, 3])
    def test_datasets_of_unknown_size(
        self, strategy_of, num_replicas, steps_per_execution
    ):
        x, y = data(self.STEPS * BATCH)
        dataset = tf.data.Dataset.from_generator(
            lambda: zip(x, y),
            output_signature=(tf.TensorSpec((3,)), tf.TensorSpec((1,))),
        ).batch(BATCH)
        model = trained(
            strategy_of(num_replicas),
            adascale,
            dataset,
            epochs=2,
            steps_per_execution=steps_per_execution,
        )
        assert iterations(model) == 2 * self.STEPS
        known = trained(
            strategy_of(num_replicas), adascale, batches(x, y), epochs=2
        )
        assert_same_weights(model, known, rtol=0, atol=1e-6)

    def test_steps_per_epoch(self, strategy_of):
        x, y = data(self.STEPS * BATCH)
        with strategy_of(2).scope():
            model = dense_model()
            model.compile(adascale(), "mse", steps_per_execution=3)
        fit(model, batches(x, y).repeat(), steps_per_epoch=6, epochs=2)
        assert iterations(model) == 12


class TestOtherMethods:
    @pytest.fixture(params=[1, 2], ids=["default", "mirrored"])
    def strategy(self, request, strategy_of):
        return strategy_of(request.param)

    @pytest.mark.parametrize(
        "compiled",
        [
            {},
            {"steps_per_execution": 3},
            {"jit_compile": True},
            {"run_eagerly": True},
        ],
        ids=lambda compiled: next(iter(compiled), "plain"),
    )
    def test_evaluate_and_predict(self, strategy, compiled):
        # The last batch has four rows; two replicas get two each.
        x, y = data(4 * BATCH + 4)
        stock = dense_model(keras.Model)
        stock.compile("sgd", "mse", metrics=["mae"])
        expected = stock.evaluate(batches(x, y), verbose=0)
        with strategy.scope():
            model = dense_model()
            model.compile(
                adascale(), "mse", metrics=["mae"], microbatches=2, **compiled
            )
        evaluated = model.evaluate(batches(x, y), verbose=0)
        assert evaluated == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(
            model.predict(batches(x, y), verbose=0),
            stock.predict(batches(x, y), verbose=0),
            rtol=0,
            atol=1e-6,
        )

    @pytest.mark.parametrize("run_eagerly", [False, True])
    def test_single_batches(self, strategy, run_eagerly):
        x, y = data()
        stock = dense_model(keras.Model)
        stock.compile("sgd", "mse")
        with strategy.scope():
            model = dense_model()
            model.compile(
                adascale(scale=1),
                "mse",
                microbatches=2,
                run_eagerly=run_eagerly,
            )
        assert model.test_on_batch(x, y) == pytest.approx(
            stock.test_on_batch(x, y), rel=1e-5
        )
        np.testing.assert_allclose(
            model.predict_on_batch(x)[:BATCH],
            stock.predict_on_batch(x),
            rtol=0,
            atol=1e-6,
        )
        first = model.train_on_batch(x, y)
        assert model.train_on_batch(x, y) < first
        assert iterations(model) == 2

    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_run_eagerly_equals_the_graph(self, strategy, microbatches):
        x, y = data(2 * BATCH)
        models = [
            trained(
                strategy,
                adascale,
                batches(x, y),
                microbatches=microbatches,
                run_eagerly=run_eagerly,
            )
            for run_eagerly in (False, True)
        ]
        assert_same_weights(*models, rtol=0, atol=1e-6)

    def test_validation_split_and_arrays(self, strategy):
        x, y = data(40)
        with strategy.scope():
            model = dense_model()
            model.compile(adascale(), "mse", microbatches=2)
        history = model.fit(
            x, y, batch_size=8, validation_split=0.2, epochs=2, verbose=0
        ).history
        assert set(history) == {"loss", "val_loss"}
        assert iterations(model) == 8


class TestMixedPrecision:
    @pytest.mark.parametrize(
        "num_replicas, microbatches, policy, jit_compile",
        [
            (1, 2, "mixed_float16", False),
            (2, 1, "mixed_float16", True),
            (1, 2, "mixed_bfloat16", True),
            (2, 1, "mixed_bfloat16", False),
        ],
    )
    def test_trains_like_float32(
        self, strategy_of, num_replicas, microbatches, policy, jit_compile
    ):
        # Gradients small enough for the first loss scale, 2^15.
        x, y = data(4 * BATCH)
        dataset = batches(x / 8, y / 8)
        full = trained(
            strategy_of(num_replicas),
            adascale,
            dataset,
            microbatches=microbatches,
        )
        keras.config.set_dtype_policy(policy)
        mixed = trained(
            strategy_of(num_replicas),
            adascale,
            dataset,
            microbatches=microbatches,
            jit_compile=jit_compile,
        )
        inner = mixed.optimizer.inner_optimizer
        scaled = isinstance(inner, keras.optimizers.LossScaleOptimizer)
        assert scaled == (policy == "mixed_float16")
        assert isinstance(mixed.optimizer, tf_adascale.AdaScale)
        assert int(mixed.optimizer.skipped_steps) == 0
        # bfloat16 has eight bits of precision.
        assert_same_weights(mixed, full, rtol=0, atol=1e-2)

    def test_leaves_a_loss_scale_that_is_there(self):
        keras.config.set_dtype_policy("mixed_float16")
        scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=8.0)
        optimizer = tf_adascale.AdaScale(scaled)
        model = dense_model()
        model.compile(optimizer, "mse")
        assert model.optimizer is optimizer
        assert optimizer.inner_optimizer is scaled

    def test_may_be_left_out(self):
        keras.config.set_dtype_policy("mixed_float16")
        model = dense_model()
        model.compile(adascale(), "mse", auto_scale_loss=False)
        assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.SGD)

    def test_a_plain_optimizer_gets_keras_own(self):
        keras.config.set_dtype_policy("mixed_float16")
        model = dense_model()
        model.compile(sgd(), "mse", microbatches=2)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        x, y = data()
        assert np.isfinite(fit(model, batches(x / 8, y / 8))["loss"][0])


class TestProgressBar:
    """Of several workers the chief shows it, unless one says otherwise."""

    X, Y = np.ones((8, 1), "float32"), np.ones((8, 1), "float32")

    def shown(self, method, *args, **kwargs):
        inputs = keras.Input((1,))
        model = tf_adascale.Model(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
        buffer = io.StringIO()
        with contextlib.redirect_stdout(buffer):
            getattr(model, method)(*args, **kwargs)
        return bool(buffer.getvalue())

    @pytest.mark.parametrize("is_chief", [True, False])
    def test_is_the_chiefs(self, is_chief, monkeypatch):
        monkeypatch.setattr(replicas, "is_chief", lambda strategy: is_chief)
        assert self.shown("fit", self.X, self.Y) == is_chief
        assert self.shown("evaluate", self.X, self.Y) == is_chief
        assert self.shown("predict", self.X) == is_chief

    def test_is_anyones_who_asks_for_it(self, monkeypatch):
        monkeypatch.setattr(replicas, "is_chief", lambda strategy: False)
        assert self.shown("fit", self.X, self.Y, verbose=1)
        # By its place: fit(x, y, batch_size, epochs, verbose).
        assert self.shown("fit", self.X, self.Y, 4, 1, 1)
        assert self.shown("evaluate", self.X, self.Y, 4, 1)
        assert self.shown("predict", self.X, 4, 1)
