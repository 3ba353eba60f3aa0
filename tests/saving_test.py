"""Saved, loaded and resumed: by every format, at every number of replicas."""

import functools
import os
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tf_adascale import AdaScale, Model

FORMATS = ["model", "weights", "checkpoint"]

# 24 examples, in batches of 12: two steps per epoch.
X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
Y = np.sum(X**2, axis=1, keepdims=True)
STEPS_PER_EPOCH = 2
EPOCHS = 4
SAVED_EPOCHS = 2


def schedule():
    # A short half-life: a wrong tau shows in the rate.
    return keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.5)


def sgd(**kwargs):
    return keras.optimizers.SGD(schedule(), momentum=0.9, **kwargs)


OPTIMIZERS = {
    "momentum": lambda: AdaScale(sgd()),
    "adamw": lambda: AdaScale(
        keras.optimizers.AdamW(0.01, weight_decay=0.1), power=0.5
    ),
    "loss_scaled": lambda: AdaScale(
        keras.optimizers.LossScaleOptimizer(
            # The scale doubles at steps 3 and 6: before saving and after it.
            sgd(),
            initial_scale=2.0**8,
            dynamic_growth_steps=3,
        )
    ),
    "differenced": lambda: AdaScale(sgd(), scale=4, estimator="differenced"),
    "ema": lambda: AdaScale(
        sgd(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)
    ),
}

# Beside the iterations and AdaScale's own scalars, what is in the state: parts
# of names.
SLOTS = {
    "momentum": ["momentum"],
    "adamw": ["learning_rate", "momentum", "velocity"],
    "loss_scaled": ["step_counter", "dynamic_scale", "momentum"],
    "differenced": ["previous_gradient", "seen_steps", "momentum"],
    "ema": ["average", "momentum"],
}
SCALARS = [
    "gradient_variance",
    "gradient_sqnorm",
    "averaged_steps",
    "scale_invariant_step",
    "scale_invariant_fraction",
    "skipped_steps",
    "iteration",
]


def make(name="momentum", *, microbatches=2, units=3, optimizer=None):
    """A model with the same weights at every call, its optimizer built."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(units, activation="tanh", name="hidden")(inputs)
    model = Model(inputs, keras.layers.Dense(1, name="output")(hidden))
    model.compile(
        OPTIMIZERS[name]() if optimizer is None else optimizer,
        "mse",
        microbatches=microbatches,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, *, epochs=EPOCHS, batch_size=12, **kwargs):
    return model.fit(
        X,
        Y,
        batch_size=batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        **kwargs,
    )


def variables(model):
    return model.weights + model.optimizer.variables


def state(model):
    return [v.numpy() for v in variables(model)]


def assert_same_state(model, expected):
    values = state(model)
    assert len(values) == len(expected)
    for variable, value, wanted in zip(variables(model), values, expected):
        np.testing.assert_array_equal(value, wanted, err_msg=variable.path)


def scramble(model, seed):
    """Gives every variable a value of its own, in place of the one it has."""
    random = np.random.default_rng(seed)
    for variable in variables(model):
        if "int" in variable.dtype:
            value = random.integers(1, 2**40)
        else:
            value = random.uniform(0.1, 0.9, variable.shape)
        variable.assign(value)


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
    """A model restored; if by weights, in a model where all else was wrong."""
    if kind == "model":
        return keras.saving.load_model(path)
    model = make()
    scramble(model, seed=1)
    if kind == "weights":
        model.load_weights(path)
    else:
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        status = checkpoint.restore(str(path))
        status.assert_consumed()
        status.assert_existing_objects_matched()
    return model


class SaveByCheckpointManager(keras.callbacks.Callback):
    def __init__(self, directory):
        super().__init__()
        self.directory = directory

    def on_train_begin(self, logs=None):
        self.manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=self.model, optimizer=self.model.optimizer
            ),
            str(self.directory),
            max_to_keep=None,
        )

    def on_epoch_end(self, epoch, logs=None):
        self.manager.save(checkpoint_number=epoch + 1)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def run(request, tmp_path_factory):
    """An uninterrupted run, saved after each epoch in every format."""
    name = request.param
    directory = tmp_path_factory.mktemp(name)
    model = make(name)
    fit(
        model,
        callbacks=[
            keras.callbacks.ModelCheckpoint(directory / "{epoch}.keras"),
            keras.callbacks.ModelCheckpoint(
                directory / "{epoch}.weights.h5", save_weights_only=True
            ),
            SaveByCheckpointManager(directory),
        ],
    )
    paths = {
        "model": directory / f"{SAVED_EPOCHS}.keras",
        "weights": directory / f"{SAVED_EPOCHS}.weights.h5",
        "checkpoint": directory / f"ckpt-{SAVED_EPOCHS}",
    }
    return name, model, state(model), paths


class StopAt(keras.callbacks.Callback):
    """Fails at the end of a step, as a machine would that goes away."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.states = []

    def on_train_batch_end(self, batch, logs=None):
        self.states.append(state(self.model))
        if len(self.states) == self.step:
            raise InterruptedError


class TestResumedTraining:
    """Equal, to the bit, to training that was not interrupted."""

    @pytest.mark.parametrize("kind", FORMATS)
    def test_from_a_file_of_each_format(self, run, kind):
        name, uninterrupted, final, paths = run
        model = restored(paths[kind], kind, lambda: make(name))
        steps = SAVED_EPOCHS * STEPS_PER_EPOCH
        assert int(model.optimizer.iterations) == steps
        assert model.microbatches == 2
        fit(model, initial_epoch=SAVED_EPOCHS)
        assert_same_state(model, final)
        for attribute in ["gain", "scale_invariant_step", "noise_scale"]:
            value = float(getattr(model.optimizer, attribute))
            assert value == float(getattr(uninterrupted.optimizer, attribute))

    def test_is_a_run_that_could_tell(self, run):
        _, model, final, _ = run
        optimizer = model.optimizer
        assert int(optimizer.skipped_steps) == 0
        assert 1 < float(optimizer.gain) < optimizer.scale
        fresh = state(make(optimizer=keras.optimizers.SGD(0.1)))
        assert not np.array_equal(final[0], fresh[0])

    def test_by_backup_and_restore(self, run, tmp_path):
        name, _, final, _ = run
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        total = EPOCHS * STEPS_PER_EPOCH
        random = np.random.default_rng(list(OPTIMIZERS).index(name))
        stop = StopAt(random.integers(1, total))
        with pytest.raises(InterruptedError):
            fit(make(name), callbacks=[backup, stop])
        model = make(name)
        fit(model, callbacks=[backup])
        assert_same_state(model, final)

    def test_by_backup_within_an_epoch(self, tmp_path):
        # Keras backs up after steps 3 and 6 and fails after 7. It resumes at an
        # epoch's start: the state is all there is to be compared.
        def backup():
            return keras.callbacks.BackupAndRestore(
                tmp_path / "backup", save_freq=3
            )

        stop = StopAt(7)
        with pytest.raises(InterruptedError):
            fit(make(), callbacks=[backup(), stop])
        model = make()
        callback = backup()
        callback.set_model(model)
        callback.on_train_begin()
        assert_same_state(model, stop.states[5])


SCRIPT = f"""
import sys
import tf_adascale
from tf_adascale.adascale import keras
import numpy as np

x, y = np.load("x.npy"), np.load("y.npy")
for name in sys.argv[1:]:
    model = keras.saving.load_model(name + ".keras")
    model.fit(
        x, y, batch_size=12, shuffle=False, verbose=0,
        initial_epoch={SAVED_EPOCHS}, epochs={EPOCHS},
    )
    variables = model.weights + model.optimizer.variables
    np.savez(name + ".npz", *[v.numpy() for v in variables])
"""


def test_resumes_in_a_process_that_only_imports_the_package(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    final = {}
    names = ["loss_scaled", "differenced"]
    for name in names:
        model = make(name)
        path = tmp_path / f"{name}.keras"
        save_epochs = keras.callbacks.ModelCheckpoint(
            tmp_path / (name + "{epoch}.keras")
        )
        fit(model, callbacks=[save_epochs])
        (tmp_path / f"{name}{SAVED_EPOCHS}.keras").rename(path)
        final[name] = state(model)
    root = str(pathlib.Path(tf_adascale.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        check=True,
    )
    for name in names:
        result = np.load(tmp_path / f"{name}.npz")
        assert len(result) == len(final[name])
        for value, wanted in zip(result.values(), final[name]):
            np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("kind", FORMATS)
class TestEveryVariable:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_is_in_the_file(self, name, kind, tmp_path):
        model = make(name)
        scramble(model, seed=0)
        expected = state(model)
        names = [v.name for v in model.optimizer.variables]
        for part in SCALARS + SLOTS[name]:
            assert any(part in n for n in names), part
        path = save(model, tmp_path, kind)
        loaded = restored(path, kind, lambda: make(name))
        assert_same_state(loaded, expected)

    def test_goes_into_layers_of_any_names(self, kind, tmp_path):
        # As two builds of a model in one process have them: dense, dense_1.
        def build():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
            model = Model(model.inputs, model.outputs)
            model.compile(OPTIMIZERS["differenced"](), "mse")
            model.optimizer.build(model.trainable_variables)
            return model

        model = build()
        scramble(model, seed=0)
        path = save(model, tmp_path, kind)
        assert_same_state(restored(path, kind, build), state(model))

    def test_of_an_optimizer_that_is_not_built_yet(self, kind, tmp_path):
        def build():
            model = make()
            model.compile(OPTIMIZERS["momentum"](), "mse", microbatches=2)
            return model

        model = make()
        scramble(model, seed=0)
        path = save(model, tmp_path, kind)
        if kind == "model":
            loaded = keras.saving.load_model(path)
        elif kind == "weights":
            loaded = build()
            loaded.load_weights(path)
        else:
            loaded = build()
            tf.train.Checkpoint(
                model=loaded, optimizer=loaded.optimizer
            ).restore(path)
        loaded.optimizer.build(loaded.trainable_variables)
        assert_same_state(loaded, state(model))

    def test_and_a_rate_that_was_set(self, kind, tmp_path):
        model = make("adamw")
        model.optimizer.learning_rate = 0.003
        path = save(model, tmp_path, kind)
        loaded = restored(path, kind, lambda: make("adamw"))
        assert float(loaded.optimizer.learning_rate) == np.float32(0.003)
        rate = float(loaded.optimizer.effective_learning_rate)
        assert rate == np.float32(0.003)  # The gain is 1 before the first step.


class HalfWay(keras.optimizers.schedules.LearningRateSchedule):
    """A user's schedule, which the user did not register."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + tf.cast(step, tf.float32))

    def get_config(self):
        return {"rate": self.rate}


class TestSavedConfig:
    @pytest.mark.parametrize("name", ["momentum", "loss_scaled"])
    def test_has_the_schedule_of_the_user(self, name, tmp_path):
        model = make(name)
        path = save(model, tmp_path, "model")
        with zipfile.ZipFile(path) as file:
            config = file.read("config.json").decode()
        assert "_Rate" not in config
        optimizer = keras.saving.load_model(path).optimizer
        assert optimizer.get_config() == model.optimizer.get_config()
        config = optimizer.get_config()["optimizer"]["config"]
        if name == "loss_scaled":
            config = config["inner_optimizer"]["config"]
        rate = config["learning_rate"]
        assert rate["class_name"] == "ExponentialDecay"
        assert rate["config"] == schedule().get_config()

    def test_loads_with_a_schedule_from_custom_objects(self, tmp_path):
        model = make(optimizer=AdaScale(keras.optimizers.SGD(HalfWay(0.5))))
        fit(model, epochs=1)
        path = save(model, tmp_path, "model")
        loaded = keras.saving.load_model(
            path, custom_objects={"HalfWay": HalfWay}
        )
        rate = float(model.optimizer.effective_learning_rate)
        assert float(loaded.optimizer.effective_learning_rate) == rate
        # Two steps of a gain above 1 are behind: 0.5 gain / (1 + floor(tau)).
        tau = np.floor(float(model.optimizer.scale_invariant_step))
        gain = float(model.optimizer.gain)
        assert rate == pytest.approx(0.5 * gain / (1 + tau), rel=1e-6)

    def test_has_the_arguments_of_compile(self, tmp_path):
        optimizer = AdaScale(
            sgd(),
            scale=5,
            estimator="ratio",
            smoothing=0.25,
            power=0.5,
            scale_ema=False,
            name="mine",
        )
        model = make(optimizer=optimizer, microbatches=3)
        loaded = keras.saving.load_model(save(model, tmp_path, "model"))
        assert loaded.microbatches == 3
        assert loaded.optimizer.microbatches == 3
        assert loaded.optimizer.get_config() == optimizer.get_config()
        assert loaded.optimizer.scale == 5


# Replicas and micro-batches of the run that is saved and of the one it becomes.
MOVES = [
    ((4, 2), (2, 2)),
    ((4, 2), (8, 1)),
    ((4, 2), (1, 3)),
    ((2, 1), (4, 1)),
    ((8, 1), (4, 1)),
    ((1, 3), (4, 1)),
]


def everything():
    """AdaScale around as many kinds of state as go together."""
    return AdaScale(
        keras.optimizers.LossScaleOptimizer(
            sgd(use_ema=True, ema_momentum=0.9), initial_scale=2.0**8
        )
    )


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A function that makes a run of one step and saves it in every format."""

    @functools.cache
    def made(strategy_of, num_replicas, microbatches):
        with strategy_of(num_replicas).scope():
            model = make(optimizer=everything(), microbatches=microbatches)
        fit(model, epochs=1, batch_size=24)
        directory = tmp_path_factory.mktemp("run")
        return model, {kind: save(model, directory, kind) for kind in FORMATS}

    return made


class TestOtherNumberOfReplicas:
    @pytest.mark.parametrize("source, target", MOVES)
    def test_continues_from_the_same_averages(
        self, source, target, strategy_of, saved_run
    ):
        def make_target():
            return make(optimizer=everything(), microbatches=target[1])

        model, paths = saved_run(strategy_of, *source)
        assert 1 < float(model.optimizer.gain) < source[0] * source[1]
        expected = state(model)
        for kind, path in paths.items():
            with strategy_of(target[0]).scope():
                loaded = restored(path, kind, make_target)
                if kind == "model":
                    assert loaded.microbatches == source[1]
                    loaded.compile(
                        loaded.optimizer, "mse", microbatches=target[1]
                    )
            assert_same_state(loaded, expected)
            samples = target[0] * target[1]
            assert loaded.optimizer.scale == samples
            gain = float(model.optimizer.gain_at(samples))
            assert float(loaded.optimizer.gain) == gain
            tau = float(model.optimizer.scale_invariant_step)
            assert float(loaded.optimizer.scale_invariant_step) == tau
        # The next step, beside the same samples taken on one device.
        single = restored(
            path,
            kind,
            lambda: make(optimizer=everything(), microbatches=samples),
        )
        for each in loaded, single:
            fit(each, epochs=1, batch_size=24)
        assert int(loaded.optimizer.iterations.numpy()) == 2
        for variable, value, wanted in zip(
            variables(single), state(loaded), state(single)
        ):
            np.testing.assert_allclose(
                value, wanted, rtol=1e-5, atol=1e-6, err_msg=variable.path
            )

    @pytest.mark.parametrize("num_replicas", [1, 2, 8])
    @pytest.mark.parametrize("name", ["adamw", "differenced"])
    def test_restores_every_slot(
        self, name, num_replicas, strategy_of, tmp_path
    ):
        with strategy_of(4).scope():
            model = make(name)
            scramble(model, seed=0)
        expected = state(model)
        for kind in FORMATS:
            path = save(model, tmp_path, kind)
            with strategy_of(num_replicas).scope():
                loaded = restored(path, kind, lambda: make(name))
            assert_same_state(loaded, expected)
            # All the copies, not only the first.
            strategy = strategy_of(num_replicas)
            for variable, wanted in zip(variables(loaded), expected):
                for copy in strategy.experimental_local_results(variable.value):
                    np.testing.assert_array_equal(copy, wanted)


REFUSAL = r"another optimizer or model\. Expected [^\n]+\. Received: \S"

STRANGERS = {
    "plain_sgd": lambda: make(
        optimizer=keras.optimizers.SGD(schedule(), momentum=0.9),
        microbatches=1,
    ),
    "other_estimator": lambda: make("differenced"),
    "other_inner_optimizer": lambda: make(
        optimizer=AdaScale(keras.optimizers.Adam(schedule()))
    ),
    "rate_without_schedule": lambda: make(
        optimizer=AdaScale(keras.optimizers.SGD(0.1, momentum=0.9))
    ),
}


def own_state(optimizer):
    """What the inner optimizer does not have."""
    inner = {id(v) for v in optimizer.inner_optimizer.variables}
    return [v.numpy() for v in optimizer.variables if id(v) not in inner]


class TestStateOfAnotherModel:
    # Keras goes on to what else is in the file, and warns of that.
    pytestmark = pytest.mark.filterwarnings(
        "ignore:Skipping variable loading for optimizer",
        "ignore:Skipping nested container",
    )

    @pytest.mark.parametrize("stranger", STRANGERS)
    def test_is_refused_from_a_file(self, stranger, tmp_path):
        path = save(STRANGERS[stranger](), tmp_path, "weights")
        model = make()
        scramble(model, seed=0)
        before = own_state(model.optimizer)
        with pytest.raises(ValueError, match=REFUSAL):
            model.load_weights(path)
        np.testing.assert_equal(own_state(model.optimizer), before)

    def test_is_refused_by_another_estimator(self, tmp_path):
        path = save(make(), tmp_path, "weights")
        model = make("differenced")
        scramble(model, seed=0)
        before = own_state(model.optimizer)
        with pytest.raises(ValueError, match=REFUSAL):
            model.load_weights(path)
        np.testing.assert_equal(own_state(model.optimizer), before)

    @pytest.mark.parametrize("name", ["momentum", "differenced"])
    def test_of_another_architecture_is_refused(self, name, tmp_path):
        # What is wrong first is a layer, so the message is Keras's.
        path = save(make(name, units=5), tmp_path, "weights")
        model = make(name)
        scramble(model, seed=0)
        before = own_state(model.optimizer)
        with pytest.raises(ValueError, match="could not be loaded"):
            model.load_weights(path)
        np.testing.assert_equal(own_state(model.optimizer), before)

    @pytest.mark.parametrize("name", ["momentum", "differenced"])
    def test_is_refused_without_a_file(self, name):
        optimizer = make(name).optimizer
        saved = {}
        optimizer.save_own_variables(saved)
        before = own_state(optimizer)
        scalar = next(key for key in saved if saved[key].shape == ())
        lacking = {k: v for k, v in saved.items() if k != scalar}
        reshaped = {**saved, scalar: np.zeros(3)}
        for store in [lacking, reshaped, {**saved, "more": np.zeros(())}]:
            with pytest.raises(ValueError, match=REFUSAL) as refusal:
                optimizer.load_own_variables(store)
            assert str(refusal.value).startswith("The ")
            np.testing.assert_equal(own_state(optimizer), before)

    @pytest.mark.filterwarnings("ignore:Skipping variable loading")
    def test_weights_without_an_optimizer_are_welcome(self, tmp_path):
        """As of a pretrained model, which was never compiled."""
        trained = make()
        scramble(trained, seed=1)
        pretrained = Model(trained.inputs, trained.outputs)
        path = str(tmp_path / "pretrained.weights.h5")
        pretrained.save_weights(path)
        model = make()
        scramble(model, seed=0)
        before = own_state(model.optimizer)
        model.load_weights(path)
        np.testing.assert_equal(own_state(model.optimizer), before)
        np.testing.assert_equal(model.get_weights(), trained.get_weights())

    def test_weights_go_into_a_model_without_an_optimizer(self, tmp_path):
        path = save(make(), tmp_path, "weights")
        trained = make()
        trained.load_weights(path)
        model = Model(trained.inputs, trained.outputs)
        before = model.get_weights()
        model.set_weights([0 * weight for weight in before])
        model.load_weights(path)
        np.testing.assert_equal(model.get_weights(), before)

    def test_is_noticed_by_a_checkpoint(self, tmp_path):
        # TensorFlow's own message: it knows names only.
        path = save(
            make(optimizer=keras.optimizers.SGD(schedule()), microbatches=1),
            tmp_path,
            "checkpoint",
        )
        model = make()
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        with pytest.raises(AssertionError):
            checkpoint.restore(path).assert_existing_objects_matched()

    def test_of_another_architecture_is_refused_by_a_checkpoint(self, tmp_path):
        path = save(make(units=5), tmp_path, "checkpoint")
        model = make()
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        with pytest.raises(ValueError, match="incompatible"):
            checkpoint.restore(path)


@pytest.mark.parametrize("jit_compile", [False, True])
class TestServing:
    def trained(self, jit_compile):
        model = make()
        model.compile(
            OPTIMIZERS["momentum"](),
            "mse",
            microbatches=2,
            jit_compile=jit_compile,
        )
        fit(model, epochs=1)
        return model

    def test_exports_a_compiled_model(self, jit_compile, tmp_path):
        model = self.trained(jit_compile)
        model.export(tmp_path / "exported", verbose=False)
        loaded = tf.saved_model.load(str(tmp_path / "exported"))
        served = loaded.serve(X)
        np.testing.assert_allclose(served, model(X), rtol=1e-6, atol=1e-6)

    def test_is_saved_by_tensorflow(self, jit_compile, tmp_path):
        model = self.trained(jit_compile)
        tf.saved_model.save(model, str(tmp_path / "saved"))
        loaded = tf.saved_model.load(str(tmp_path / "saved"))
        served = loaded.signatures["serving_default"](tf.constant(X))
        (outputs,) = served.values()
        np.testing.assert_allclose(outputs, model(X), rtol=1e-6, atol=1e-6)
