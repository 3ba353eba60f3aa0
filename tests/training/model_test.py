"""`Model` against stock Keras, steps by hand and other strategies."""

import contextlib
import inspect
import io

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness
from tf_adascale.distribute import workers

BATCH = 8
RATE = 0.1
ROUNDING = 1e-12

Model = tf_adascale.Model


@pytest.fixture
def float64():
    """Makes Keras compute in float64, to compare up to rounding errors."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)


def data(size=BATCH):
    return harness.regression(size, dtype=keras.config.floatx())


def batches(x, y, size=BATCH):
    return harness.batches(x, y, size)


def sgd():
    return keras.optimizers.SGD(RATE)


def adascale(**arguments):
    return tf_adascale.AdaScale(sgd(), **arguments)


def dense_model(model_class=Model, *, hidden=()):
    return harness.dense_model(model_class, hidden=hidden)


def compiled(make_model, *args, num_replicas=1, **kwargs):
    """Returns a model made and compiled under a strategy."""
    with harness.strategy_of(num_replicas).scope():
        model = make_model()
        args = [arg() if inspect.isroutine(arg) else arg for arg in args]
        model.compile(*args, **kwargs)
    return model


def trained(make_model, optimizer, dataset, *, epochs=1, **arguments):
    model = compiled(make_model, optimizer, "mse", **arguments)
    harness.fit(model, dataset, epochs=epochs)
    return model


def assert_same_weights(model, other, *, atol):
    harness.assert_close(model.get_weights(), other.get_weights(), atol=atol)


# Ways to make a model. The classes are made anew in each test, because making a
# functional instance changes its class.


def functional():
    inputs = keras.Input((3,))
    return Model(inputs, keras.layers.Dense(1)(inputs))


def functional_by_name():
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(1)(inputs)
    return Model(inputs=inputs, outputs=outputs, name="named")


def subclassed():
    class Subclassed(Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    return Subclassed()


def functional_subclass():
    class FunctionalSubclass(Model):
        def __init__(self, units):
            inputs = keras.Input((3,))
            super().__init__(inputs, keras.layers.Dense(units)(inputs))

    return FunctionalSubclass(1)


def subclass_of_a_subclass():
    class Base(Model):
        """A subclass that is made from inputs and outputs."""

    class Derived(Base):
        def __init__(self):
            inputs = keras.Input((3,))
            super().__init__(inputs, keras.layers.Dense(1)(inputs))

    return Derived()


class TestConstruction:
    @pytest.mark.parametrize(
        # Each kind comes before and after each other kind.
        "makers",
        [
            (functional, subclassed, functional_subclass),
            (subclassed, functional_subclass, functional),
            (functional_subclass, functional, subclassed),
        ],
        ids=lambda makers: makers[0].__name__,
    )
    def test_kinds_do_not_disturb_each_other(self, makers):
        x, y = data()
        models = [make() for make in makers]
        for make, model in zip(makers, models):
            if make is subclassed:
                assert not model.built
                assert not getattr(model, "inputs", None)
            model.compile("sgd", "mse", microbatches=2, run_eagerly=True)
            assert np.isfinite(model.train_on_batch(x, y))
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
        assert isinstance(model, Model)
        assert isinstance(model, keras.Model)
        assert model.inputs[0].shape == (None, 3)
        assert model.outputs[0].shape == (None, 1)
        assert model.microbatches == 1
        # The class itself is unchanged.
        assert Model.__bases__ == (keras.Model,)

    def test_clones_and_saves_as_itself(self, tmp_path):
        model = functional()
        assert isinstance(keras.models.clone_model(model), Model)
        model.compile(adascale(), "mse", microbatches=2)
        x, y = data()
        harness.fit(model, x, y)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert isinstance(loaded, Model)
        assert isinstance(loaded.optimizer, tf_adascale.AdaScale)
        assert loaded.microbatches == loaded.optimizer.microbatches == 2
        for each in (model, loaded):
            harness.fit(each, x, y)
        assert_same_weights(loaded, model, atol=0)


class TestCompile:
    def test_a_strategy_that_does_not_step_together(self, monkeypatch):
        monkeypatch.setattr(workers, "is_synchronous", lambda strategy: False)
        with harness.refused("`strategy` must be synchronous", "strategy=<"):
            dense_model().compile("sgd", "mse")

    def test_has_the_arguments_of_keras_and_microbatches(self):
        ours, stock = (
            list(inspect.signature(cls.compile).parameters)
            for cls in (Model, keras.Model)
        )
        assert ours == [*stock, "microbatches"]

    @pytest.mark.parametrize("microbatches", [0, 2.0])
    def test_refuses_what_is_no_count(self, microbatches):
        model, optimizer = functional(), adascale()
        model.compile(optimizer, "mse", microbatches=2)
        with harness.refused(
            "`microbatches` must be an int >= 1", f"microbatches={microbatches}"
        ):
            model.compile("sgd", "mse", microbatches=microbatches)
        # Nothing changed.
        assert model.microbatches == optimizer.microbatches == 2
        assert model.optimizer is optimizer

    def test_sets_the_count_anew(self):
        model, optimizer = functional(), adascale()
        for microbatches in (4, 2):
            model.compile(optimizer, "mse", microbatches=microbatches)
            harness.fit(model, *data(), batch_size=BATCH)
            assert float(optimizer.scale) == microbatches
        assert harness.iterations(model) == 2


def test_a_compile_of_its_own_is_not_called_when_loading(tmp_path):
    """As in Keras, which does not know its arguments."""

    class Own(tf_adascale.Model):
        def compile(self, rate, **kwargs):
            super().compile(keras.optimizers.SGD(rate), "mse", **kwargs)

        @classmethod
        def from_config(cls, config):
            return harness.dense_model(cls)

    model = harness.dense_model(Own)
    model.compile(0.1, microbatches=2)
    path = tmp_path / "model.keras"
    model.save(path)
    with pytest.warns(UserWarning, match="`compile\\(\\)` method is custom"):
        loaded = keras.saving.load_model(path, custom_objects={"Own": Own})
    assert getattr(loaded, "optimizer", None) is None
    harness.assert_close(loaded.get_weights(), model.get_weights())


class TestAgainstStockKeras:
    """`Model` equals stock Keras with one micro-batch on one device."""

    @pytest.mark.parametrize("run_eagerly", [False, True])
    def test_fit_equals(self, run_eagerly):
        dataset = batches(*data(20))  # The last batch has four rows.
        histories, models = [], []
        for model_class in (keras.Model, Model):
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
            history = harness.fit(
                model, dataset, epochs=2, validation_data=dataset
            )
            histories.append(history.history)
            models.append(model)
        stock, ours = histories
        assert set(ours) == set(stock)
        for name, values in stock.items():
            assert ours[name] == pytest.approx(values, rel=1e-6)
        # Two programs may round differently.
        assert_same_weights(*models, atol=1e-6)

    def test_adascale_at_scale_1_equals_its_inner_optimizer(self):
        dataset = batches(*data(20))
        stock, ours = (
            trained(dense_model, optimizer, dataset, epochs=2)
            for optimizer in (sgd, adascale)
        )
        assert_same_weights(ours, stock, atol=1e-6)

    def test_a_call_without_training_and_no_targets(self):
        class Distance(Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1, use_bias=False)

            def call(self, x):
                y = self.dense(x)
                self.add_loss(tf.reduce_mean(y**2))
                return y

        model = Distance()
        model.compile(sgd(), microbatches=2)
        losses = harness.fit(model, data()[0], epochs=3).history["loss"]
        assert losses[0] > losses[1] > losses[2]


class TestMicrobatches:
    """`Model` equals steps written by hand, in float64."""

    @staticmethod
    def step(model, losses):
        """Takes a step of SGD with the mean gradient of the losses."""
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
        "microbatches, jit_compile", [(2, False), (4, True)]
    )
    def test_layers_and_their_losses_see_each_part_alone(
        self, float64, microbatches, jit_compile
    ):
        def make():
            return dense_model(
                hidden=[
                    keras.layers.BatchNormalization,
                    lambda: keras.layers.Dense(4, kernel_regularizer="l2"),
                    lambda: keras.layers.ActivityRegularization(l2=0.01),
                ]
            )

        x, y = data()
        model = trained(
            make,
            sgd,
            batches(x, y),
            epochs=2,
            microbatches=microbatches,
            jit_compile=jit_compile,
        )
        expected = self.expected(make(), x, y, microbatches, steps=2)
        # The weights include moving averages. Keras's normalisation and
        # regularizers have constants in float32.
        assert_same_weights(model, expected, atol=1e-7)

    def test_moving_averages_by_hand(self):
        inputs = keras.Input((1,))
        layer = keras.layers.BatchNormalization(momentum=0.5)
        model = Model(inputs, layer(inputs))
        model.compile(sgd(), "mse", microbatches=2)
        x = np.array([[1], [3], [10], [20]], "float32")
        harness.fit(model, x, x, batch_size=4)
        # Means 2 and 15: 0 -> 1 -> 8. Variances 1 and 25: 1 -> 1 -> 13.
        np.testing.assert_allclose(layer.moving_mean, [8.0], rtol=1e-6)
        np.testing.assert_allclose(layer.moving_variance, [13.0], rtol=1e-6)

    def test_weights_of_samples_and_of_classes(self, float64):
        x, _ = data()
        y = np.arange(BATCH).reshape(-1, 1) % 2
        by_sample = np.arange(BATCH, dtype="float64")
        by_class = np.where(y.ravel() == 1, 3.0, 1.0)
        for weights, arguments in (
            (by_sample, {"sample_weight": by_sample}),
            # Keras converts them to float32, which holds these exactly.
            (by_class, {"class_weight": {0: 1.0, 1: 3.0}}),
        ):
            model = compiled(dense_model, sgd, "mse", microbatches=4)
            harness.fit(model, x, y, **arguments)
            expected = self.expected(dense_model(), x, y, 4, weights)
            assert_same_weights(model, expected, atol=ROUNDING)

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
            return Model(inputs, keras.layers.Dense(1)(x))

        model = trained(
            make,
            sgd,
            batches(ids, y),
            epochs=2,
            microbatches=2,
            jit_compile=jit_compile,
        )
        expected = self.expected(make(), ids, y, 2, steps=2)
        assert_same_weights(model, expected, atol=ROUNDING)

    # Keras warns of the unused weight.
    @pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
    def test_dicts_of_inputs_and_outputs_and_a_weight_of_no_use(self, float64):
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
            return Model(inputs, outputs)

        model, expected = make(), make()
        model.compile(
            sgd(),
            {"value": "mse", "square": "mse"},
            loss_weights={"value": 1.0, "square": 0.5},
            metrics={"value": ["mae"]},
            microbatches=2,
            jit_compile=True,
        )
        inputs = {"x": x, "z": z}
        targets = {"value": y, "square": y**2, "unused": y}
        history = harness.fit(model, batches(inputs, targets)).history
        assert "value_mae" in history

        def loss(rows):
            y_pred = expected({"x": x[rows], "z": z[rows]})
            value = tf.reduce_mean((y_pred["value"] - y[rows]) ** 2)
            square = tf.reduce_mean((y_pred["square"] - y[rows] ** 2) ** 2)
            return value + 0.5 * square

        halves = np.split(np.arange(BATCH), 2)
        self.step(expected, [lambda rows=rows: loss(rows) for rows in halves])
        assert_same_weights(model, expected, atol=ROUNDING)

    @pytest.mark.parametrize(
        "microbatches, jit_compile", [(1, True), (2, False)]
    )
    def test_a_compute_loss_of_ones_own(
        self, float64, microbatches, jit_compile
    ):
        class Quartic(Model):
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
        harness.fit(model, batches(x, y))

        def loss(rows):
            return tf.reduce_mean((expected(x[rows]) - y[rows]) ** 4)

        parts = np.split(np.arange(BATCH), microbatches)
        self.step(expected, [lambda rows=rows: loss(rows) for rows in parts])
        assert_same_weights(model, expected, atol=ROUNDING)

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_dropout_draws_anew_for_each_part(self, jit_compile):
        inputs = keras.Input((64,))
        x = keras.layers.Dropout(0.5)(inputs)
        model = Model(inputs, keras.layers.Dense(1, use_bias=False)(x))
        model.compile(
            adascale(),
            harness.mean_of_outputs,
            microbatches=2,
            jit_compile=jit_compile,
        )
        harness.fit(model, np.ones((2, 64), "float32"), np.zeros((2, 1)))
        # Without dropout, or with one mask, both gradients would be equal. Two
        # masks differ in half of 64 entries of 2:
        # sigma^2 = |g_1 - g_2|^2 = 32 * 4 = 128 or so.
        assert float(model.optimizer.gradient_variance) > 50

    @pytest.mark.parametrize(
        "microbatches, jit_compile", [(1, False), (2, True)]
    )
    def test_metrics_are_those_of_the_whole_batch(
        self, microbatches, jit_compile
    ):
        x, y = data(2 * BATCH)
        targets = (y > 0).astype("float32")
        weights = np.linspace(0, 2, 2 * BATCH)
        histories = []
        for model_class in (keras.Model, Model):
            arguments = {"jit_compile": jit_compile}
            if model_class is Model:
                arguments["microbatches"] = microbatches
            model = compiled(
                lambda cls=model_class: dense_model(cls),
                # At rate 0 no prediction depends on an earlier step.
                keras.optimizers.SGD(0.0),
                "mse",
                metrics=[
                    "mae",
                    keras.metrics.AUC(from_logits=True, name="auc"),
                ],
                weighted_metrics=["mse"],
                **arguments,
            )
            history = harness.fit(
                model, x, targets, sample_weight=weights, batch_size=BATCH
            )
            histories.append(history.history)
        stock, ours = histories
        assert set(ours) == set(stock)
        for name, values in stock.items():
            assert ours[name] == pytest.approx(values, rel=1e-6)

    @pytest.mark.parametrize(
        "microbatches, jit_compile", [(1, True), (2, False)]
    )
    def test_metrics_heed_masks(self, microbatches, jit_compile):
        ids = np.array([[1, 2, 0], [3, 0, 0], [1, 1, 1], [2, 3, 0]])
        targets = np.ones((4, 3, 1), "float32")
        results = []
        for model_class in (keras.Model, Model):
            keras.utils.set_random_seed(7)
            inputs = keras.Input((3,), dtype="int64")
            x = keras.layers.Embedding(4, 2, mask_zero=True)(inputs)
            model = model_class(inputs, keras.layers.Dense(1)(x))
            arguments = {"metrics": ["mae"], "jit_compile": jit_compile}
            if model_class is Model:
                arguments["microbatches"] = microbatches
            model.compile(sgd(), "mse", **arguments)
            history = harness.fit(model, batches(ids, targets))
            results.append(history.history["mae"])
        assert results[1] == pytest.approx(results[0], rel=1e-6)

    def test_an_uneven_batch_of_known_size_is_refused(self):
        model = compiled(dense_model, adascale, "mse", microbatches=2)
        before = model.get_weights()
        dataset = tf.data.Dataset.from_tensor_slices(data(6))
        with harness.refused("`microbatches` must", "batch=3, microbatches=2"):
            harness.fit(model, dataset.batch(3, drop_remainder=True))
        harness.assert_close(model.get_weights(), before, atol=0)

    @pytest.mark.parametrize(
        "num_replicas, steps_per_execution", [(1, 4), (2, 1)]
    )
    def test_an_uneven_batch_is_refused_when_it_comes(
        self, num_replicas, steps_per_execution
    ):
        size = 4 * num_replicas
        x, y = data(3 * size - num_replicas)
        model, expected = (
            compiled(
                dense_model,
                adascale,
                "mse",
                num_replicas=num_replicas,
                microbatches=2,
                steps_per_execution=steps_per_execution,
            )
            for _ in range(2)
        )
        # The third batch has three rows for each replica.
        with harness.refused("`microbatches` must", "batch=3, microbatches=2"):
            harness.fit(model, batches(x, y, size))
        harness.fit(expected, batches(x[: 2 * size], y[: 2 * size], size))
        # The first two steps stay. The third changed nothing.
        assert harness.iterations(model) == 2
        harness.assert_same(model, expected)
        harness.assert_same(model.optimizer, expected.optimizer)


class TestReplicas:
    def oracle(self, x, y, num_samples, steps):
        """Returns the result of AdaScale on linear least squares, in NumPy."""
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

    @pytest.mark.parametrize(
        "num_replicas, microbatches, jit_compile",
        [(1, 4, True), (2, 2, True), (2, 1, False)],
    )
    def test_replicas_and_microbatches_are_all_samples(
        self, num_replicas, microbatches, jit_compile
    ):
        steps = 5
        x, y = data(steps * BATCH)

        def make_model():
            inputs = keras.Input((3,))
            layer = keras.layers.Dense(
                1, use_bias=False, kernel_initializer="zeros"
            )
            return Model(inputs, layer(inputs))

        def optimizer():
            schedule = keras.optimizers.schedules.ExponentialDecay(RATE, 1, 0.9)
            return tf_adascale.AdaScale(keras.optimizers.SGD(schedule))

        model = trained(
            make_model,
            optimizer,
            batches(x, y),
            num_replicas=num_replicas,
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

    def test_the_reported_loss_is_the_mean_over_the_batch(self):
        x, y = data()
        model = compiled(
            dense_model, sgd, "mse", num_replicas=2, microbatches=2
        )
        expected = np.mean((model(x).numpy() - y) ** 2)
        (loss,) = harness.fit(model, batches(x, y)).history["loss"]
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_double_precision(self, float64):
        model = trained(
            dense_model, adascale, batches(*data(2 * BATCH)), microbatches=2
        )
        assert harness.iterations(model) == 2
        assert 1 <= float(model.optimizer.gain) <= 2

    def test_a_plain_optimizer_gets_the_mean_gradient(self):
        def momentum():
            return keras.optimizers.SGD(RATE, momentum=0.9)

        dataset = batches(*data(3 * BATCH))
        stock = trained(lambda: dense_model(keras.Model), momentum, dataset)
        model = trained(
            dense_model, momentum, dataset, num_replicas=2, microbatches=2
        )
        assert_same_weights(model, stock, atol=1e-6)

    def test_layers_with_a_state(self):
        def make_model():
            return dense_model(
                hidden=[
                    lambda: keras.layers.Dropout(0.1),
                    keras.layers.BatchNormalization,
                ]
            )

        before = make_model()
        model = trained(
            make_model,
            adascale,
            batches(*data(2 * BATCH)),
            num_replicas=2,
            microbatches=2,
            jit_compile=True,
        )
        assert harness.iterations(model) == 2
        for weight, initial in zip(model.get_weights(), before.get_weights()):
            assert np.isfinite(weight).all()
            assert (weight != initial).any()


class TestOtherMethods:
    @pytest.mark.parametrize(
        "num_replicas, arguments",
        [
            (2, {"jit_compile": True}),
            (2, {"steps_per_execution": 3}),
            (2, {"run_eagerly": True}),
        ],
        ids=str,
    )
    def test_evaluate_and_predict(self, num_replicas, arguments):
        # The last batch has four rows; two replicas get two each.
        dataset = batches(*data(4 * BATCH + 4))
        stock = dense_model(keras.Model)
        stock.compile("sgd", "mse", metrics=["mae"])
        model = compiled(
            dense_model,
            adascale,
            "mse",
            num_replicas=num_replicas,
            metrics=["mae"],
            microbatches=2,
            **arguments,
        )
        evaluated = model.evaluate(dataset, verbose=0)
        expected = stock.evaluate(dataset, verbose=0)
        assert evaluated == pytest.approx(expected, rel=1e-5)
        harness.assert_close(
            model.predict(dataset, verbose=0),
            stock.predict(dataset, verbose=0),
        )

    @pytest.mark.parametrize(
        "num_replicas, run_eagerly", [(1, False), (2, True)]
    )
    def test_single_batches(self, num_replicas, run_eagerly):
        x, y = data()
        stock = compiled(lambda: dense_model(keras.Model), "sgd", "mse")
        model = compiled(
            dense_model,
            lambda: adascale(scale=1),
            "mse",
            num_replicas=num_replicas,
            microbatches=2,
            run_eagerly=run_eagerly,
        )
        assert model.test_on_batch(x, y) == pytest.approx(
            stock.test_on_batch(x, y), rel=1e-5
        )
        harness.assert_close(
            model.predict_on_batch(x)[:BATCH], stock.predict_on_batch(x)
        )
        first = model.train_on_batch(x, y)
        assert model.train_on_batch(x, y) < first
        assert harness.iterations(model) == 2

    def test_run_eagerly_equals_the_graph(self):
        models = [
            trained(
                dense_model,
                adascale,
                batches(*data(2 * BATCH)),
                num_replicas=2,
                microbatches=2,
                run_eagerly=run_eagerly,
            )
            for run_eagerly in (False, True)
        ]
        assert_same_weights(*models, atol=1e-6)

    def test_validation_split_and_arrays(self):
        model = compiled(
            dense_model, adascale, "mse", num_replicas=2, microbatches=2
        )
        history = harness.fit(
            model, *data(40), batch_size=8, validation_split=0.2, epochs=2
        )
        assert set(history.history) == {"loss", "val_loss"}
        assert harness.iterations(model) == 8


@pytest.mark.filterwarnings("ignore:Gradients do not exist for")
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_jit_compile_compiles_by_xla(num_replicas):
    """XLA cannot call Python, so the error shows that it compiles the step."""

    class CallsPython(keras.layers.Layer):
        def call(self, x):
            return tf.ensure_shape(
                tf.numpy_function(lambda x: x, [x], tf.float32), x.shape
            )

    model = compiled(
        lambda: dense_model(hidden=[CallsPython]),
        adascale,
        "mse",
        num_replicas=num_replicas,
        jit_compile=True,
    )
    with pytest.raises(tf.errors.OpError, match="unsupported operations"):
        harness.fit(model, batches(*data()))


class TestMixedPrecision:
    @pytest.mark.parametrize(
        "policy, num_replicas, jit_compile",
        [("mixed_float16", 2, True), ("mixed_bfloat16", 1, False)],
    )
    def test_trains_like_float32(self, policy, num_replicas, jit_compile):
        # The gradients do not overflow at the first loss scale, 2^15.
        x, y = data(4 * BATCH)
        arguments = {
            "make_model": dense_model,
            "optimizer": adascale,
            "dataset": batches(x / 8, y / 8),
            "num_replicas": num_replicas,
            "microbatches": 2,
        }
        full = trained(**arguments)
        keras.config.set_dtype_policy(policy)
        mixed = trained(**arguments, jit_compile=jit_compile)
        inner = mixed.optimizer.inner_optimizer
        scaled = isinstance(inner, keras.optimizers.LossScaleOptimizer)
        assert scaled == (policy == "mixed_float16")
        assert isinstance(mixed.optimizer, tf_adascale.AdaScale)
        assert int(mixed.optimizer.skipped_steps) == 0
        # bfloat16 has eight bits of precision.
        assert_same_weights(mixed, full, atol=1e-2)

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
        x, y = data()
        model = trained(dense_model, sgd, batches(x / 8, y / 8), microbatches=2)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert np.isfinite(model.get_weights()[0]).all()


def linear():
    return harness.linear_model(Model, sgd(), width=1)


class TestWorkers:
    X, Y = np.ones((8, 1), "float32"), np.ones((8, 1), "float32")

    def shown(self, method, *args, **kwargs):
        buffer = io.StringIO()
        with contextlib.redirect_stdout(buffer):
            getattr(linear(), method)(*args, **kwargs)
        return bool(buffer.getvalue())

    @pytest.mark.parametrize("is_chief", [True, False])
    def test_the_chief_shows_its_progress(self, is_chief, monkeypatch):
        monkeypatch.setattr(workers, "is_chief", lambda strategy: is_chief)
        assert self.shown("fit", self.X, self.Y) == is_chief
        assert self.shown("evaluate", self.X, self.Y) == is_chief
        assert self.shown("predict", self.X) == is_chief

    def test_any_worker_shows_its_progress_if_asked_to(self, monkeypatch):
        monkeypatch.setattr(workers, "is_chief", lambda strategy: False)
        assert self.shown("fit", self.X, self.Y, verbose=1)
        # By position: fit(x, y, batch_size, epochs, verbose).
        assert self.shown("fit", self.X, self.Y, 4, 1, 1)
        assert self.shown("evaluate", self.X, self.Y, 4, 1)
        assert self.shown("predict", self.X, 4, 1)

    @pytest.mark.parametrize("method", ["fit", "evaluate"])
    @pytest.mark.parametrize(
        "count, kind, is_lost",
        [
            (2, tf.errors.AbortedError, True),
            (2, tf.errors.DataLossError, False),
            (1, tf.errors.AbortedError, False),
        ],
    )
    def test_a_lost_worker_is_named(
        self, method, count, kind, is_lost, monkeypatch
    ):
        monkeypatch.setattr(workers, "num_workers", lambda strategy: count)
        original = kind(None, None, "gone")

        def lose(batch, logs=None):
            raise original

        loses = keras.callbacks.LambdaCallback(on_train_batch_end=lose)
        loses.on_test_batch_end = lose
        with pytest.raises(tf.errors.OpError) as raised:
            getattr(linear(), method)(
                self.X, self.Y, verbose=0, callbacks=[loses]
            )
        if is_lost:
            assert type(raised.value) is tf.errors.UnavailableError
            assert raised.value.message.startswith("Another worker")
            assert raised.value.__cause__ is original
        else:
            assert raised.value is original
