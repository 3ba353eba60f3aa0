"""Saving and loading in every format, on any number of replicas.

Most tests assign values to the variables instead of training them.
`contract_test.py` compares steps after loading with those of an uninterrupted
run, and `test_fit_resumes_by_backup_and_restore` does so for `fit`.
"""

import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale import AdamScale, AdaScale, Adasum, Model

FORMATS = ["model", "weights", "checkpoint"]


def schedule():
    # A short half-life, so that a wrong tau changes the rate.
    return keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.5)


def sgd(**settings):
    return keras.optimizers.SGD(schedule(), momentum=0.9, **settings)


def everything():
    """Returns AdaScale with as many kinds of state as possible."""
    return AdaScale(
        keras.optimizers.LossScaleOptimizer(
            sgd(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
            initial_scale=2.0**8,
            dynamic_growth_steps=3,
        )
    )


OPTIMIZERS = {
    "adascale": everything,
    "differenced": lambda: AdaScale(sgd(), scale=4, estimator="differenced"),
    "adamscale": lambda: AdamScale(
        keras.optimizers.AdamW(0.01, weight_decay=0.1)
    ),
    "adasum": lambda: Adasum(keras.optimizers.Nadam(0.01)),
}

# Parts of the names of the state, besides the iterations.
SCALARS = [
    "gradient_variance",
    "gradient_sqnorm",
    "averaged_steps",
    "scale_invariant_step",
    "scale_invariant_fraction",
]
STATE = {
    "adascale": [
        *(*SCALARS, "step_counter", "dynamic_scale", "average", "momentum")
    ],
    "differenced": [*SCALARS, "previous_gradient", "seen_steps", "momentum"],
    "adamscale": [*SCALARS, "learning_rate", "momentum", "velocity"],
    "adasum": ["learning_rate", "momentum", "velocity"],
}


every = pytest.mark.parametrize(
    "wrap", harness.WRAPPERS.values(), ids=harness.WRAPPERS
)


def make(optimizer=None, *, microbatches=2, units=3, num_replicas=1):
    """Returns a model of fixed weights with a built optimizer."""
    with harness.strategy_of(num_replicas).scope():
        model = harness.dense_model(Model, units=units)
        optimizer = everything() if optimizer is None else optimizer()
        model.compile(optimizer, "mse", microbatches=microbatches)
        optimizer.build(model.trainable_variables)
    return model


def variables(model):
    return model.weights + model.optimizer.variables


def assert_same_state(model, other):
    """Asserts that all copies equal the first copy of the other model."""
    for variable, wanted in zip(
        variables(model), variables(other), strict=True
    ):
        for copy in harness.copies(variable):
            np.testing.assert_array_equal(
                copy, harness.first(wanted), err_msg=variable.path
            )


def scrambled(model, seed=0):
    """Returns the model, after giving each variable another value."""
    random = np.random.default_rng(seed)
    for variable in variables(model):
        if "int" in variable.dtype:
            value = random.integers(1, 2**40)
        else:
            value = random.uniform(0.1, 0.9, variable.shape)
        variable.assign(value)
    return model


def save(model, directory, kind):
    """Saves the model; returns what `restored` needs."""
    if kind == "model":
        model.save(directory / "saved.keras")
        return directory / "saved.keras"
    if kind == "weights":
        model.save_weights(directory / "saved.weights.h5")
        return directory / "saved.weights.h5"
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return checkpoint.save(str(directory / "saved"))


def restored(path, kind, make):
    """Returns the restored model; all values were wrong before."""
    if kind == "model":
        return keras.saving.load_model(path)
    model = scrambled(make(), seed=1)
    if kind == "weights":
        model.load_weights(path)
    else:
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        status = checkpoint.restore(str(path))
        status.assert_consumed()
        status.assert_existing_objects_matched()
    return model


def test_names_in_files_stay():
    """Names in files stay, so that later versions can read them."""
    for cls in (AdaScale, AdamScale, Adasum):
        name = keras.saving.get_registered_name(cls)
        assert name == f"tf_adascale>{cls.__name__}"
    # Keras stores the variables by their position.
    optimizer = make(OPTIMIZERS["differenced"]).optimizer
    own = optimizer.variables[: -len(optimizer.inner_optimizer.variables)]
    expected = ["iteration", "skipped_steps", *SCALARS, "counted_iterations"]
    expected += 4 * ["previous_gradient"] + ["seen_steps"]
    for variable, name in zip(own, expected, strict=True):
        assert variable.name.endswith(name)


@pytest.mark.parametrize("kind", FORMATS)
class TestEveryVariable:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_is_in_the_file(self, name, kind, tmp_path):
        model = scrambled(make(OPTIMIZERS[name]))
        names = [v.name for v in model.optimizer.variables]
        for part in ["iteration", "skipped_steps", *STATE[name]]:
            assert any(part in n for n in names), part
        path = save(model, tmp_path, kind)
        loaded = restored(path, kind, lambda: make(OPTIMIZERS[name]))
        assert type(loaded.optimizer) is type(model.optimizer)
        assert_same_state(loaded, model)

    def test_of_an_optimizer_that_is_not_built_yet(self, kind, tmp_path):
        model = scrambled(make())
        path = save(model, tmp_path, kind)
        if kind == "model":
            loaded = keras.saving.load_model(path)
        else:
            loaded = make()
            loaded.compile(everything(), "mse", microbatches=2)
        if kind == "weights":
            with pytest.warns(UserWarning, match="Skipping variable loading"):
                loaded.load_weights(path)
        if kind == "checkpoint":
            tf.train.Checkpoint(
                model=loaded, optimizer=loaded.optimizer
            ).restore(path)
        loaded.optimizer.build(loaded.trainable_variables)
        if kind == "weights":  # As from Keras: only the model's.
            assert int(loaded.optimizer.iterations.numpy()) == 0
            harness.assert_same(loaded.weights, model.weights)
        else:
            assert_same_state(loaded, model)

    @pytest.mark.parametrize(
        "source, target",
        # (replicas, micro-batches) of the run that is saved and of the next.
        [((4, 2), (1, 3)), ((1, 3), (4, 1))],
        ids=str,
    )
    def test_goes_to_another_number_of_replicas(
        self, source, target, kind, tmp_path
    ):
        """The averages stay, and the gain follows the new scale."""

        def make_of(num_replicas, microbatches):
            return make(num_replicas=num_replicas, microbatches=microbatches)

        model = scrambled(make_of(*source))
        path = save(model, tmp_path, kind)
        with harness.strategy_of(target[0]).scope():
            loaded = restored(path, kind, lambda: make_of(*target))
        assert_same_state(loaded, model)
        if kind == "model":
            assert loaded.microbatches == source[1]
            loaded.compile(loaded.optimizer, "mse", microbatches=target[1])
        scale = target[0] * target[1]
        assert loaded.optimizer.scale == scale
        gain = float(loaded.optimizer.gain)
        assert 1 < gain < scale
        assert gain == float(model.optimizer.gain_at(scale))
        tau = float(model.optimizer.scale_invariant_step)
        assert float(loaded.optimizer.scale_invariant_step) == tau


class StopAt(keras.callbacks.Callback):
    """Raises at the end of a step, like a machine that disappears."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == self.step:
            raise InterruptedError


def test_fit_resumes_by_backup_and_restore(tmp_path):
    """Resumes to the bit after a failure in the third of four epochs."""

    def fit(model, *callbacks):
        x, y = harness.regression(24)
        return harness.fit(
            model, x, y**2, batch_size=12, epochs=4, callbacks=callbacks
        )

    model = make()
    fit(model)
    assert 1 < float(model.optimizer.gain) < model.optimizer.scale
    assert int(model.optimizer.skipped_steps) == 0
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(InterruptedError):
        fit(make(), backup, StopAt(5))
    resumed = make()
    fit(resumed, backup)
    assert_same_state(resumed, model)


class HalfWay(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is not registered with Keras."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + tf.cast(step, tf.float32))

    def get_config(self):
        return {"rate": self.rate}


class TestSavedConfig:
    def test_has_the_arguments_of_compile(self, tmp_path):
        model = make(microbatches=3)
        path = save(model, tmp_path, "model")
        loaded = keras.saving.load_model(path)
        assert loaded.microbatches == loaded.optimizer.microbatches == 3
        assert loaded.optimizer.get_config() == model.optimizer.get_config()
        # The file holds the user's schedule, not the wrapper's.
        with zipfile.ZipFile(path) as file:
            assert "_Rate" not in file.read("config.json").decode()
        config = loaded.optimizer.get_config()["inner_optimizer"]["config"]
        rate = config["inner_optimizer"]["config"]["learning_rate"]
        assert rate["class_name"] == "ExponentialDecay"
        assert rate["config"] == schedule().get_config()

    def test_loads_with_a_schedule_from_custom_objects(self, tmp_path):
        model = make(lambda: AdaScale(keras.optimizers.SGD(HalfWay(0.5))))
        optimizer = scrambled(model).optimizer
        path = save(model, tmp_path, "model")
        loaded = keras.saving.load_model(
            path, custom_objects={"HalfWay": HalfWay}
        )
        rate = float(optimizer.effective_learning_rate)
        assert float(loaded.optimizer.effective_learning_rate) == rate
        # 0.5 gain / (1 + floor(tau)).
        tau = np.floor(float(optimizer.scale_invariant_step))
        gain = float(optimizer.gain)
        np.testing.assert_allclose(rate, 0.5 * gain / (1 + tau), rtol=1e-6)


@pytest.mark.parametrize("model_class", [keras.Model, Model])
@every
def test_a_model_of_float8_loads(wrap, model_class, tmp_path):
    """Loading makes its scales before the kernel, training after it."""
    model = harness.dense_model(model_class, hidden=[])
    model.layers[-1].quantize("float8")
    model.compile(wrap(keras.optimizers.Adam(schedule())), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "saved.keras")
    loaded = keras.saving.load_model(tmp_path / "saved.keras")
    assert int(loaded.optimizer.iterations) == 0
    x, y = harness.regression(8)
    for each in (model, loaded):
        harness.fit(each, x, y, batch_size=4)
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


@pytest.mark.parametrize("model_class", [keras.Model, Model])
@pytest.mark.parametrize("kind", ["model", "weights"])
@pytest.mark.parametrize("place", ["wrapper", "inner"])
def test_a_schedule_in_the_place_of_a_number(
    place, kind, model_class, tmp_path
):
    def make(rate=0.1):
        model = harness.dense_model(model_class)
        optimizer = AdaScale(keras.optimizers.SGD(rate, momentum=0.9), scale=1)
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        return model

    model = scrambled(make())
    where = model.optimizer
    if place == "inner":
        where = where.inner_optimizer
    where.learning_rate = schedule()
    path = save(model, tmp_path, kind)
    loaded = restored(path, kind, lambda: make(schedule()))
    assert_same_state(loaded, model)


@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize("model_class", [keras.Model, Model])
@every
def test_a_model_that_never_trained_loads(wrap, model_class, tmp_path):
    model = harness.dense_model(model_class)
    model.compile(wrap(keras.optimizers.Adam(schedule())), "mse")
    model.save(tmp_path / "saved.keras")
    loaded = keras.saving.load_model(tmp_path / "saved.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    x, y = harness.regression(8)
    for each in (model, loaded):
        harness.fit(each, x, y, batch_size=4)
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


@every
@pytest.mark.parametrize("rate", [schedule, lambda: 0.1])
def test_weights_of_the_same_before_it_is_built(rate, wrap, tmp_path):
    """Keras warns that it leaves the optimizer as it is."""
    models = [
        harness.dense_model(Model, units=units, hidden=[]) for units in (2, 2)
    ]
    for model in models:
        model.compile(wrap(keras.optimizers.RMSprop(rate())), "mse")
    harness.fit(models[0], *harness.regression(8), batch_size=4)
    path = save(models[0], tmp_path, "weights")
    optimizer = models[1].optimizer
    with (
        harness.untouched(*TestStateOfAnotherModel.own(models[1])),
        pytest.warns(UserWarning, match="Skipping variable loading"),
    ):
        models[1].load_weights(path)
    assert not optimizer.built
    np.testing.assert_equal(models[1].get_weights(), models[0].get_weights())


STRANGERS = {
    "other_estimator": OPTIMIZERS["differenced"],
    "other_inner_optimizer": lambda: AdaScale(
        keras.optimizers.Adam(schedule())
    ),
    "rate_without_schedule": lambda: AdaScale(
        keras.optimizers.SGD(0.1, momentum=0.9)
    ),
}


class TestStateOfAnotherModel:
    # Keras continues with the rest of the file, and warns.
    pytestmark = pytest.mark.filterwarnings(
        "ignore:Skipping variable loading for optimizer",
        "ignore:Skipping nested container",
    )

    @staticmethod
    def momentum():
        return scrambled(make(lambda: AdaScale(sgd())))

    @staticmethod
    def own(model):
        """Returns the variables that the inner optimizer lacks."""
        inner = model.optimizer.inner_optimizer.variables
        return model.optimizer.variables[: -len(inner)]

    @pytest.mark.parametrize("stranger", STRANGERS)
    def test_is_refused_from_a_file(self, stranger, tmp_path):
        other = make(STRANGERS[stranger], microbatches=1)
        path = save(other, tmp_path, "weights")
        model = self.momentum()
        with (
            harness.untouched(*self.own(model)),
            harness.refused("The state saved for `adascale` must be that of"),
        ):
            model.load_weights(path)

    @pytest.mark.parametrize(
        "plain",
        [
            sgd,
            lambda: keras.optimizers.Adam(),
            lambda: keras.optimizers.LossScaleOptimizer(sgd()),
        ],
    )
    def test_without_a_wrapper_is_left_aside(self, plain, tmp_path):
        """Keras warns too, and loads the weights."""
        other = make(plain, microbatches=1)
        path = save(scrambled(other, seed=1), tmp_path, "weights")
        model = self.momentum()
        with (
            harness.untouched(*self.own(model)),
            pytest.warns(
                UserWarning, match="The state of `adascale` is not loaded"
            ),
        ):
            model.load_weights(path)
        np.testing.assert_equal(model.get_weights(), other.get_weights())

    def test_of_another_architecture_is_refused(self, tmp_path):
        # A layer fails first, so the message is Keras's.
        path = save(make(units=5), tmp_path, "weights")
        model = make()
        with (
            harness.untouched(*self.own(model)),
            pytest.raises(ValueError, match="could not be loaded"),
        ):
            model.load_weights(path)

    def test_of_plain_sgd_is_refused_by_the_weights_shapes(self):
        # Without momentum no other saved state depends on the model.
        narrow, wide = (
            make(lambda: AdaScale(keras.optimizers.SGD(0.1)), units=units)
            for units in (3, 5)
        )
        store = {}
        narrow.optimizer.save_own_variables(store)
        with (
            harness.untouched(*wide.optimizer.variables),
            harness.refused("The state saved for `adascale` must be that of"),
        ):
            wide.optimizer.load_own_variables(store)

    def test_weights_without_an_optimizer_are_welcome(self, tmp_path):
        """Weights of a pretrained model that was never compiled load."""
        trained = scrambled(make(), seed=1)
        pretrained = Model(trained.inputs, trained.outputs)
        path = tmp_path / "pretrained.weights.h5"
        pretrained.save_weights(path)
        model = make()
        with harness.untouched(*self.own(model)):
            model.load_weights(path)
        np.testing.assert_equal(model.get_weights(), trained.get_weights())

    def test_weights_go_into_a_model_without_an_optimizer(self, tmp_path):
        trained = scrambled(make())
        path = save(trained, tmp_path, "weights")
        model = harness.dense_model(Model, units=3)
        model.load_weights(path)
        np.testing.assert_equal(model.get_weights(), trained.get_weights())

    def test_is_noticed_by_a_checkpoint(self, tmp_path):
        # TensorFlow compares names and shapes only, and writes the message.
        model = self.momentum()
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        plain = make(lambda: keras.optimizers.SGD(schedule()), microbatches=1)
        path = save(plain, tmp_path, "checkpoint")
        with pytest.raises(AssertionError):
            checkpoint.restore(path).assert_existing_objects_matched()
        wider = make(lambda: AdaScale(sgd()), units=5)
        path = save(wider, tmp_path, "checkpoint")
        with pytest.raises(ValueError, match="incompatible"):
            checkpoint.restore(path)


def test_a_compiled_model_may_be_served(tmp_path):
    model = make()
    model.compile(everything(), "mse", microbatches=2, jit_compile=True)
    x, y = harness.regression(4)
    model.train_on_batch(x, y)
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    served = loaded.serve(x)
    np.testing.assert_allclose(served, model(x), rtol=1e-6, atol=1e-6)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    outputs = loaded.signatures["serving_default"](tf.constant(x))
    [served] = outputs.values()
    np.testing.assert_allclose(served, model(x), rtol=1e-6, atol=1e-6)
