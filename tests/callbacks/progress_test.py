"""Callbacks: when training ends, what logs show, how a run survives."""

import contextlib
import csv
import os
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

import tf_adascale
from tf_adascale import callbacks
from tf_adascale.callbacks import (
    Checkpoint,
    ScalingLog,
    StopAtScaleInvariantStep,
)

NAMES = {
    "gain": "gain",
    "scale_invariant_step": "scale_invariant_step",
    "learning_rate": "effective_learning_rate",
    "gradient_variance": "gradient_variance",
    "gradient_sqnorm": "gradient_sqnorm",
    "noise_scale": "noise_scale",
}
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)


def mean_of_outputs(y_true, y_pred):
    """A loss whose gradient is the mean of the inputs."""
    del y_true
    return y_pred


def linear_model(rate=0.125, **compiled):
    inputs = keras.Input((2,))
    outputs = keras.layers.Dense(1, use_bias=False)(inputs)
    model = tf_adascale.Model(inputs, outputs)
    optimizer = tf_adascale.AdaScale(keras.optimizers.SGD(rate))
    model.compile(optimizer, mean_of_outputs, microbatches=2, **compiled)
    return model


def batches(samples, steps, *, size=2):
    """Batches of the rows of `samples`, which are repeated."""
    rows = np.tile(np.array(samples, "float32"), (steps, 1))
    targets = np.zeros((len(rows), 1), "float32")
    return tf.data.Dataset.from_tensor_slices((rows, targets)).batch(size)


# All signal, so the gain is 1; all noise, so it is 2; and between the two: A =
# 3/2, T = 5/4, gain = A/T = 6/5.
EQUAL = [[1, 2], [1, 2]]
OPPOSITE = [[1, 2], [-1, -2]]
BETWEEN = [[1, 0], [1, 1]]


def noisy(steps, *, size=2):
    """Batches of samples whose gain changes from step to step."""
    samples = np.random.default_rng(0).normal(0.3, 1.0, (size * steps, 2))
    return batches(samples, 1, size=size)


def fit(model, dataset, callbacks, **arguments):
    return model.fit(
        dataset,
        **{"callbacks": callbacks, "verbose": 0, "shuffle": False, **arguments},
    )


def iterations(model):
    return int(tf.convert_to_tensor(model.optimizer.iterations))


class Recorder(keras.callbacks.Callback):
    """Keeps tau after each execution."""

    def __init__(self):
        super().__init__()
        self.progress = []

    def on_train_batch_end(self, batch, logs=None):
        self.progress.append(float(self.model.optimizer.scale_invariant_step))


class TestStopAtScaleInvariantStep:
    @pytest.mark.parametrize(
        "samples, total_steps, expected",
        [
            (EQUAL, 5, 5),
            (EQUAL, 4.5, 5),
            (OPPOSITE, 6, 3),
            (OPPOSITE, 5, 3),
            (OPPOSITE, 1, 1),
            # 1.2, 2.4, 3.6, 4.8, 6.0: the fourth is the first beyond 4.5.
            (BETWEEN, 4.5, 4),
        ],
    )
    def test_stops_at_the_first_step_that_reaches_the_total(
        self, samples, total_steps, expected
    ):
        model = linear_model()
        fit(
            model,
            batches(samples, 10),
            [StopAtScaleInvariantStep(total_steps)],
        )
        assert iterations(model) == expected

    def test_stops_over_several_epochs(self):
        model = linear_model()
        history = fit(
            model,
            batches(EQUAL, 3),
            [StopAtScaleInvariantStep(7)],
            epochs=10,
        )
        assert iterations(model) == 7
        assert len(history.epoch) == 3

    @pytest.mark.parametrize("steps_per_execution", [1, 4])
    @pytest.mark.parametrize("total_steps", [3, 17.3, 40])
    def test_not_one_execution_late(self, steps_per_execution, total_steps):
        model = linear_model(steps_per_execution=steps_per_execution)
        recorder = Recorder()
        fit(
            model,
            noisy(60),
            [recorder, StopAtScaleInvariantStep(total_steps)],
        )
        *before, last = recorder.progress
        assert last >= total_steps
        assert all(value < total_steps for value in before)
        assert iterations(model) == steps_per_execution * len(recorder.progress)

    def test_stops_under_replicas(self, strategy_of):
        with strategy_of(2).scope():
            model = linear_model()
        # Four samples a step, two pairs of opposites: the gain is 4.
        dataset = batches(OPPOSITE * 2, 10, size=4)
        fit(model, dataset, [StopAtScaleInvariantStep(9)])
        assert iterations(model) == 3

    def test_may_be_used_again(self):
        model, stop = linear_model(), StopAtScaleInvariantStep(4)
        fit(model, batches(EQUAL, 10), [stop])
        stop.total_steps = 6
        fit(model, batches(EQUAL, 10), [stop])
        assert iterations(model) == 6

    @pytest.mark.parametrize("total_steps", [0, -1, np.inf, np.nan])
    def test_refuses_a_total_that_is_none(self, total_steps):
        with pytest.raises(
            ValueError,
            match="The total of scale-invariant steps is out of range. "
            r"Expected a finite number > 0. Received: total_steps=",
        ):
            StopAtScaleInvariantStep(total_steps)


@pytest.mark.parametrize(
    "callback", [StopAtScaleInvariantStep(3), ScalingLog()]
)
def test_refuses_an_optimizer_without_a_gain(callback):
    model = linear_model()
    model.compile("sgd", mean_of_outputs)
    before = model.get_weights()[0].copy()
    with pytest.raises(
        ValueError,
        match=f"{type(callback).__name__} found an optimizer without a gain. "
        "Expected a model compiled with tf_adascale.AdaScale. "
        "Received: optimizer=<.*SGD",
    ):
        fit(model, batches(EQUAL, 1), [callback])
    np.testing.assert_array_equal(model.get_weights()[0], before)


class TestScalingLog:
    @pytest.fixture(params=[0.125, SCHEDULE], ids=["constant", "schedule"])
    def rate(self, request):
        return request.param

    def values(self, model):
        return {
            name: float(getattr(model.optimizer, attribute))
            for name, attribute in NAMES.items()
        }

    def test_history_ends_with_the_optimizers_values(self, rate):
        model = linear_model(rate)
        history = fit(model, noisy(4), [ScalingLog()], epochs=2).history
        assert set(history) == {"loss", *NAMES}
        for name, value in self.values(model).items():
            assert history[name][-1] == value
            assert len(history[name]) == 2

    def test_values_by_hand(self):
        model = linear_model(0.125)
        history = fit(model, batches(BETWEEN, 3), [ScalingLog()]).history
        # A = 3/2, T = 5/4, S = n = 2: variance = 2 (A - T) = 1/2,
        # sqnorm = T - (1/2)/2 = 1, noise scale = 1/2, three gains of 6/5.
        expected = {
            "gain": 1.2,
            "scale_invariant_step": 3.6,
            "learning_rate": 1.2 * 0.125,
            "gradient_variance": 0.5,
            "gradient_sqnorm": 1.0,
            "noise_scale": 0.5,
        }
        for name, value in expected.items():
            assert history[name] == pytest.approx([value], rel=1e-6)

    def test_learning_rate_follows_the_schedule(self):
        model = linear_model(SCHEDULE)
        history = fit(
            model, batches(EQUAL, 5), [ScalingLog()], epochs=2
        ).history
        # Gain 1; the rate shown is that of the step to come.
        assert history["learning_rate"] == pytest.approx([0.05, 0.025])

    def test_csv_logger(self, rate, tmp_path):
        path = tmp_path / "log.csv"
        model = linear_model(rate)
        callbacks = [ScalingLog(), keras.callbacks.CSVLogger(str(path))]
        fit(model, noisy(4), callbacks, epochs=2)
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2
        assert set(NAMES) <= set(rows[0])
        for name, value in self.values(model).items():
            assert float(rows[-1][name]) == pytest.approx(value, rel=1e-6)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_tensorboard(self, rate, tmp_path):
        model = linear_model(rate)
        shown = self.tensorboard(model, tmp_path)
        for name, value in self.values(model).items():
            for tag, count in ((f"epoch_{name}", 2), (f"batch_{name}", 8)):
                assert len(shown[tag]) == count
                if tag != "epoch_learning_rate":
                    assert shown[tag][-1] == pytest.approx(value, rel=1e-6)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_tensorboard_shows_the_effective_rate(self, rate, tmp_path):
        # TensorBoard puts the rate of the optimizer in place of the log's.
        model = linear_model(rate)
        shown = self.tensorboard(model, tmp_path)["epoch_learning_rate"]
        # In Keras 3.15 that is the inner one's; in 3.10 it is the wrapper's,
        # which reads as the base rate if it can be set.
        expected = [
            float(optimizer.learning_rate)
            for optimizer in (
                model.optimizer.inner_optimizer,
                model.optimizer,
            )
        ]
        assert expected[0] == float(model.optimizer.effective_learning_rate)
        if keras.version() >= "3.15":
            assert shown[-1] == pytest.approx(expected[0], rel=1e-6)
        else:
            assert shown[-1] == pytest.approx(expected[1], rel=1e-6)

    def tensorboard(self, model, path):
        """Fits, and returns the values of each tag that were written."""
        board = keras.callbacks.TensorBoard(
            str(path), update_freq="batch", write_graph=False
        )
        fit(model, noisy(4), [ScalingLog(), board], epochs=2)
        events = event_accumulator.EventAccumulator(
            str(path / "train"), size_guidance={"tensors": 0}
        )
        events.Reload()
        return {
            tag: [
                float(tf.make_ndarray(event.tensor_proto))
                for event in events.Tensors(tag)
            ]
            for tag in events.Tags()["tensors"]
            if tag.startswith(("epoch_", "batch_"))
        }

    @pytest.mark.parametrize("verbose", [1, 2])
    def test_progress_bar(self, verbose, capsys):
        model = linear_model()
        fit(model, batches(BETWEEN, 3), [ScalingLog()], verbose=verbose)
        shown = capsys.readouterr().out
        for name in NAMES:
            assert f"{name}: " in shown

    def test_steps_per_execution_and_replicas(self, strategy_of):
        with strategy_of(2).scope():
            model = linear_model(steps_per_execution=3)
        history = fit(model, noisy(4, size=4), [ScalingLog()]).history
        for name, value in self.values(model).items():
            assert history[name] == [value]


class TestKerasCallbacksBesideIt:
    def test_learning_rate_scheduler_sets_the_base_rate(self):
        model = linear_model(0.125)
        seen = []

        def halved(epoch, rate):
            seen.append(rate)
            return rate / 2

        callbacks = [keras.callbacks.LearningRateScheduler(halved)]
        fit(model, batches(BETWEEN, 2), callbacks, epochs=3)
        # It reads what it set, without the gain.
        assert seen == [0.125, 0.0625, 0.03125]
        rate = float(model.optimizer.effective_learning_rate)
        assert rate == pytest.approx(1.2 * 0.015625, rel=1e-6)

    def test_reduce_on_plateau_reduces_the_base_rate(self):
        model = linear_model(0.125)
        plateau = keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=1e9
        )
        fit(model, batches(BETWEEN, 2), [plateau], epochs=3)
        # The first epoch is the best; each of the other two is a plateau.
        rate = float(model.optimizer.effective_learning_rate)
        assert rate == pytest.approx(1.2 * 0.125 / 4, rel=1e-6)


# What a run may be of: everything must be saved, and go on to the bit.

ROWS = np.random.default_rng(1).normal(size=(6, 12, 4)).astype("float32")


class Listed(tf_adascale.Model):
    """Holds its layers in a list, and a layer that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.parts = [
            keras.layers.Dense(3),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
        self(keras.ops.zeros((1, 4)))

    def call(self, x, training=False):
        for part in self.parts:
            x = part(x, training=training)
        return x


def functional(cls=tf_adascale.Model):
    """A model with statistics, and a layer that draws random numbers."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.5)(x)
    return cls(inputs, keras.layers.Dense(1)(x))


def momentum(**arguments):
    return keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.5),
        momentum=0.9,
        **arguments,
    )


def adam(**arguments):
    return keras.optimizers.AdamW(0.01, weight_decay=0.1, **arguments)


def loss_scaled():
    # The scale doubles at steps 3 and 6.
    return keras.optimizers.LossScaleOptimizer(
        momentum(), initial_scale=2.0**8, dynamic_growth_steps=3
    )


def small():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


AdaScale = tf_adascale.AdaScale
RUNS = {
    "small": (small, lambda: keras.optimizers.SGD(0.01)),
    "keras": (lambda: functional(keras.Model), momentum),
    "keras_adam": (lambda: functional(keras.Model), adam),
    "keras_loss_scaled": (lambda: functional(keras.Model), loss_scaled),
    "moments": (functional, lambda: AdaScale(momentum())),
    "ratio": (functional, lambda: AdaScale(momentum(), estimator="ratio")),
    "differenced": (
        functional,
        lambda: AdaScale(momentum(), scale=2, estimator="differenced"),
    ),
    "adamscale": (
        functional,
        lambda: AdaScale(adam(), power=0.5, preconditioned=True),
    ),
    "ema": (
        functional,
        lambda: AdaScale(
            momentum(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)
        ),
    ),
    "loss_scaled": (functional, lambda: AdaScale(loss_scaled())),
    "adasum": (functional, lambda: tf_adascale.Adasum(momentum())),
    "listed": (Listed, lambda: AdaScale(momentum())),
}


def built(name="small", *, seed=0, microbatches=2, **compiled):
    """The model of a run, built; what is drawn depends on the seed."""
    keras.utils.set_random_seed(seed)
    make_model, make_optimizer = RUNS[name]
    model = make_model()
    if isinstance(model, tf_adascale.Model):
        compiled["microbatches"] = microbatches
    model.compile(make_optimizer(), "mse", **compiled)
    model.optimizer.build(model.trainable_variables)
    return model


def endless(start=0):
    """Batches of 12 that depend on their number only."""
    rows = tf.data.Dataset.from_tensor_slices(ROWS).repeat().skip(start)
    return rows.map(lambda x: (x, tf.reduce_sum(x, axis=1, keepdims=True)))


def digest(model):
    """All that a run has, to the bit."""
    return [
        np.array(variable.numpy()).tobytes()
        for variable in [*model.variables, *model.optimizer.variables]
    ]


class Digests(keras.callbacks.Callback):
    """Keeps the digest of the last epoch: after it Keras averages weights."""

    def on_epoch_end(self, epoch, logs=None):
        self.last = digest(self.model)


def go_on(model, checkpoint, *, epochs, callbacks=(), **arguments):
    """Trains as `Checkpoint` says; returns the digest of the last epoch."""
    digests = Digests()
    model.fit(
        endless(checkpoint.step),
        **{
            "steps_per_epoch": 2,
            "initial_epoch": checkpoint.epoch,
            "epochs": epochs,
            "callbacks": [digests, *callbacks, checkpoint],
            "shuffle": False,
            "verbose": 0,
            **arguments,
        },
    )
    return digests.last


class Raises(keras.callbacks.Callback):
    """Fails at the end of the first batch."""

    def on_train_batch_end(self, batch, logs=None):
        raise InterruptedError


class Sends(keras.callbacks.Callback):
    """Sends SIGTERM to this process, and keeps which events it sees."""

    def __init__(self, event, *, at=1):
        super().__init__()
        self.event = event
        self.at = at
        self.seen = []

    def _see(self, event):
        self.seen.append(event)
        if self.seen.count(event) == self.at and event == self.event:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_begin(self, logs=None):
        self._see("train begin")

    def on_epoch_begin(self, epoch, logs=None):
        self._see("epoch begin")

    def on_train_batch_end(self, batch, logs=None):
        self._see("batch end")

    def on_epoch_end(self, epoch, logs=None):
        self._see("epoch end")

    def on_train_end(self, logs=None):
        self._see("train end")


@pytest.fixture
def handled():
    """Counts the SIGTERMs that reach the handler set before `fit`."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    yield received
    signal.signal(signal.SIGTERM, before)


class TestCheckpoint:
    def test_counts(self, tmp_path):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        assert (checkpoint.epoch, checkpoint.step) == (0, 0)
        assert not any(tmp_path.iterdir())
        go_on(model, checkpoint, epochs=3)
        assert (checkpoint.epoch, checkpoint.step) == (3, 6)
        again = Checkpoint(tmp_path, model=built())
        assert (again.epoch, again.step) == (3, 6)
        assert again.directory == str(tmp_path)

    @pytest.mark.parametrize("name", RUNS)
    def test_goes_on_to_the_bit(self, name, tmp_path):
        model = built(name)
        whole = go_on(
            model, Checkpoint(tmp_path / "whole", model=model), epochs=4
        )
        assert len(set(whole)) >= 3
        model = built(name)
        checkpoint = Checkpoint(tmp_path / "parts", model=model)
        saved = go_on(model, checkpoint, epochs=2)
        model = built(name, seed=1)
        assert digest(model) != saved
        checkpoint = Checkpoint(tmp_path / "parts", model=model)
        assert digest(model) == saved
        assert go_on(model, checkpoint, epochs=4) == whole

    @pytest.mark.parametrize(
        "name, inside",
        [
            ("moments", False),
            ("moments", True),
            ("adamscale", True),
            ("adasum", False),
        ],
    )
    def test_other_replicas_go_on(self, name, inside, tmp_path, strategy_of):
        # Scale 4 throughout, by replicas or by micro-batches.
        saved = None
        for epochs, count in enumerate([1, 4, 2], start=1):
            strategy = strategy_of(count)
            with strategy.scope():
                model = built(name, seed=epochs, microbatches=4 // count)
            with strategy.scope() if inside else contextlib.nullcontext():
                checkpoint = Checkpoint(tmp_path, model=model)
            if saved is not None:
                assert digest(model) == saved
            assert checkpoint.step == 2 * (epochs - 1)
            saved = go_on(model, checkpoint, epochs=epochs)
            assert (checkpoint.epoch, checkpoint.step) == (epochs, 2 * epochs)
        assert iterations(model) == 6

    def test_saves_variables_of_ones_own(self, tmp_path):
        def own():
            return tf.Variable(0.0), [tf.Variable(""), tf.Variable(0)]

        model, (one, several) = built(), own()
        checkpoint = Checkpoint(tmp_path, model=model, one=one, several=several)
        one.assign(2.5)
        several[0].assign("text")
        several[1].assign(7)
        go_on(model, checkpoint, epochs=1)
        one, several = own()
        Checkpoint(tmp_path, model=built(), one=one, several=several)
        assert float(one) == 2.5
        assert several[0].numpy() == b"text"
        assert int(several[1]) == 7

    @pytest.mark.parametrize("name", ["optimizer", "epoch", "step"])
    def test_refuses_variables_named_like_its_own(self, name, tmp_path):
        with pytest.raises(TypeError, match=name):
            Checkpoint(tmp_path, model=built(), **{name: tf.Variable(1.0)})

    def test_may_be_used_again(self, tmp_path):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        go_on(model, checkpoint, epochs=1)
        go_on(model, checkpoint, epochs=3)
        assert (checkpoint.epoch, checkpoint.step) == (3, 6)
        assert Checkpoint(tmp_path, model=built()).step == 6

    def test_the_last_of_two_that_saved_counts(self, tmp_path):
        model = built()
        first, second = (Checkpoint(tmp_path, model=model) for _ in range(2))
        go_on(model, first, epochs=3)
        go_on(model, second, epochs=1)
        assert Checkpoint(tmp_path, model=built()).step == 2

    def test_steps_per_execution(self, tmp_path):
        model = built(steps_per_execution=3)
        checkpoint = Checkpoint(tmp_path, model=model)
        go_on(model, checkpoint, epochs=2, steps_per_epoch=6)
        assert checkpoint.step == 12
        assert iterations(model) == 12

    def test_a_finite_dataset_without_a_number_of_steps(self, tmp_path):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        model.fit(
            endless().take(5),
            epochs=2,
            callbacks=[checkpoint],
            shuffle=False,
            verbose=0,
        )
        assert (checkpoint.epoch, checkpoint.step) == (2, 10)

    def test_a_finished_run_takes_a_step_more(self, tmp_path):
        """`StopAtScaleInvariantStep` asks after a step."""
        steps = []
        for seed in range(3):
            model = built("moments", seed=seed)
            checkpoint = Checkpoint(tmp_path, model=model)
            stop = StopAtScaleInvariantStep(7)
            go_on(model, checkpoint, epochs=99, callbacks=[stop])
            steps.append(checkpoint.step)
            assert float(model.optimizer.scale_invariant_step) >= 7
        assert steps == [steps[0], steps[0] + 1, steps[0] + 2]
        assert steps[0] < 7

    def test_damage_is_passed_over(self, tmp_path):
        model = built()
        go_on(model, Checkpoint(tmp_path, model=model), epochs=1)
        first = digest(model)
        go_on(model, Checkpoint(tmp_path, model=model), epochs=2)
        *_, newest = sorted(tmp_path.glob("*.data*"))
        newest.write_bytes(b"")
        model = built(seed=1)
        with pytest.warns(RuntimeWarning, match="cannot be read"):
            checkpoint = Checkpoint(tmp_path, model=model)
        assert (checkpoint.epoch, checkpoint.step) == (1, 2)
        assert digest(model) == first

    def test_training_goes_on_where_it_cannot_save(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        model = built()
        checkpoint = Checkpoint(tmp_path / "file" / "run", model=model)
        with pytest.warns(RuntimeWarning, match="could not be saved"):
            go_on(model, checkpoint, epochs=3)
        assert checkpoint.epoch == 3
        assert iterations(model) == 6


class TestCheckpointOfAnother:
    OTHERS = (
        ("keras", "keras_adam"),
        ("keras", "keras_loss_scaled"),
        ("keras", "moments"),
        ("moments", "keras"),
        ("moments", "differenced"),
        ("moments", "adasum"),
        ("moments", "adamscale"),
        ("moments", "ema"),
        ("moments", "loss_scaled"),
        ("moments", "listed"),
    )

    @pytest.mark.parametrize("saved, name", OTHERS)
    def test_is_refused_and_changes_nothing(self, saved, name, tmp_path):
        Checkpoint(tmp_path, model=built(saved)).on_epoch_end(0)
        other = built(name, seed=1)
        before = digest(other)
        with pytest.raises(
            ValueError,
            match=r"(?s)is of another model or optimizer\. Expected .* "
            r"Received: path='.*ckpt-1'",
        ):
            Checkpoint(tmp_path, model=other)
        assert digest(other) == before

    def test_optimizer_with_the_same_variables_is_refused(self, tmp_path):
        # Lion's momenta are no SGD's.
        def model(optimizer):
            made = small()
            made.compile(optimizer, "mse")
            made.optimizer.build(made.trainable_variables)
            return made

        sgd = model(keras.optimizers.SGD(0.1, momentum=0.9))
        Checkpoint(tmp_path, model=sgd).on_epoch_end(0)
        with pytest.raises(ValueError, match=r"Expected Lion;.* with SGD"):
            Checkpoint(tmp_path, model=model(keras.optimizers.Lion(0.1)))

    @pytest.mark.parametrize("missing", ["model", "optimizer", "compile"])
    def test_refuses_what_is_not_built(self, missing, tmp_path):
        model = keras.Sequential([keras.layers.Dense(1)])
        if missing != "model":
            model.build((None, 4))
        if missing != "compile":
            model.compile("sgd", "mse")
        with pytest.raises(
            ValueError,
            match=r"nothing to restore yet\. Expected a model that is built "
            r"and compiled, and `model.optimizer.build\("
            r"model.trainable_variables\)`\. Received: model.built="
            rf"{missing != 'model'}, optimizer=",
        ):
            Checkpoint(tmp_path / "run", model=model)
        assert not (tmp_path / "run").exists()

    def test_refuses_what_only_all_workers_can_read(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(
            replicas,
            "only_all_workers_can_read",
            lambda strategy, variable: variable.shape == (1,),
        )
        with pytest.raises(
            ValueError,
            match=r"chief cannot save this variable alone\. Expected "
            r"synchronization other than ON_READ, or the aggregation "
            r"ONLY_FIRST_REPLICA\. Received: variable=<tf.Variable",
        ):
            Checkpoint(tmp_path / "run", model=built())
        assert not (tmp_path / "run").exists()

    def test_refuses_what_other_workers_did_not_restore(
        self, tmp_path, monkeypatch
    ):
        model = built()
        go_on(model, Checkpoint(tmp_path, model=model), epochs=1)
        asked = []

        def agree(strategy, number):
            asked.append((strategy, number))
            return False

        monkeypatch.setattr(replicas, "agree", agree)
        with pytest.raises(
            ValueError,
            match=r"workers restored different checkpoints\. Expected a "
            r"directory that all of them see\. Received: directory='.*', which "
            r"holds step 2 on this worker",
        ):
            Checkpoint(tmp_path, model=model)
        assert asked == [(model.distribute_strategy, 2)]

    def test_only_the_chief_saves(self, tmp_path, monkeypatch):
        monkeypatch.setattr(replicas, "is_chief", lambda strategy: False)
        model = built()
        checkpoint = Checkpoint(tmp_path / "run", model=model)
        go_on(model, checkpoint, epochs=2)
        assert checkpoint.epoch == 2
        assert not (tmp_path / "run").exists()


class TestSigterm:
    def test_ends_the_epoch_saves_and_exits(self, tmp_path, handled):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        sends = Sends("batch end", at=6)
        with pytest.raises(SystemExit) as exit:
            go_on(
                model,
                checkpoint,
                epochs=9,
                steps_per_epoch=4,
                callbacks=[sends],
            )
        assert exit.value.code == Checkpoint.EXIT_CODE == os.EX_TEMPFAIL == 75
        assert sends.seen == [
            *("train begin", "epoch begin"),
            *["batch end"] * 4,
            *("epoch end", "epoch begin"),
            *["batch end"] * 2,
            *("epoch end", "train end"),
        ]
        again = built(seed=1)
        checkpoint = Checkpoint(tmp_path, model=again)
        assert (checkpoint.epoch, checkpoint.step) == (2, 6)
        assert digest(again) == digest(model)
        # Whoever listened before listens again.
        assert not handled
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == [1]

    def test_goes_on_to_the_bit(self, tmp_path, handled):
        model = built("listed")
        checkpoint = Checkpoint(tmp_path / "whole", model=model)
        whole = go_on(model, checkpoint, epochs=4)
        model = built("listed")
        checkpoint = Checkpoint(tmp_path / "parts", model=model)
        with pytest.raises(SystemExit):
            go_on(model, checkpoint, epochs=4, callbacks=[Sends("batch end")])
        assert checkpoint.step == 1
        model = built("listed", seed=1)
        checkpoint = Checkpoint(tmp_path / "parts", model=model)
        # What is left of the epoch is not made up for: 1 + 2 + 2 + 2 steps.
        go_on(model, checkpoint, epochs=4)
        assert checkpoint.step == 7
        last = go_on(model, checkpoint, epochs=5, steps_per_epoch=1)
        assert last == whole

    @pytest.mark.parametrize(
        "event, at, epoch, step",
        [
            ("epoch begin", 1, 1, 1),
            ("epoch begin", 2, 2, 3),
            ("epoch end", 1, 2, 3),
            # Nothing is left to be done: the next process finds so.
            ("epoch end", 3, 3, 6),
            ("train end", 1, 3, 6),
        ],
    )
    def test_at_any_time(self, event, at, epoch, step, tmp_path, handled):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        with pytest.raises(SystemExit) as exit:
            go_on(model, checkpoint, epochs=3, callbacks=[Sends(event, at=at)])
        assert exit.value.code == 75
        checkpoint = Checkpoint(tmp_path, model=built())
        assert (checkpoint.epoch, checkpoint.step) == (epoch, step)
        assert not handled

    def test_saves_before_validation(self, tmp_path, handled):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        seen = []
        look = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append("step"),
        )
        look.on_test_begin = lambda logs=None: seen.append(os.listdir(tmp_path))
        with pytest.raises(SystemExit):
            go_on(
                model,
                checkpoint,
                epochs=3,
                callbacks=[Sends("batch end"), look],
                validation_data=endless(0).take(2),
            )
        step, files = seen
        assert step == "step"
        assert "ckpt-1.index" in files
        # Once is enough.
        assert sorted(os.listdir(tmp_path)) == sorted(files)

    def test_with_steps_per_execution(self, tmp_path, handled):
        model = built(steps_per_execution=3)
        checkpoint = Checkpoint(tmp_path, model=model)
        with pytest.raises(SystemExit):
            go_on(
                model,
                checkpoint,
                epochs=3,
                steps_per_epoch=9,
                callbacks=[Sends("batch end", at=2)],
            )
        assert checkpoint.step == 6
        assert iterations(model) == 6

    @pytest.mark.parametrize("seconds, passed_on", [(5.0, []), (-1.0, [1])])
    def test_a_later_one_is_for_who_listened_before(
        self, seconds, passed_on, tmp_path, handled, monkeypatch
    ):
        assert callbacks.SAME_NOTICE_SECONDS == 5.0
        monkeypatch.setattr(callbacks, "SAME_NOTICE_SECONDS", seconds)
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        with pytest.raises(SystemExit):
            go_on(
                model,
                checkpoint,
                epochs=3,
                callbacks=[Sends("batch end"), Sends("epoch end")],
            )
        assert handled == passed_on

    @pytest.mark.parametrize("failures", [1, 2])
    def test_is_not_lost_after_fit_failed(self, failures, tmp_path, handled):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        for _ in range(failures):
            with pytest.raises(InterruptedError):
                go_on(model, checkpoint, epochs=1, callbacks=[Raises()])
        go_on(model, checkpoint, epochs=1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == [1]

    def test_the_second_ends_a_process_whose_fit_failed(
        self, tmp_path, handled, monkeypatch
    ):
        monkeypatch.setattr(callbacks, "SAME_NOTICE_SECONDS", -1.0)
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        with pytest.raises(InterruptedError):
            go_on(model, checkpoint, epochs=1, callbacks=[Raises()])
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert handled == [1]

    def test_does_not_end_the_fit_after_it(self, tmp_path, handled):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        with pytest.raises(SystemExit):
            go_on(model, checkpoint, epochs=2, callbacks=[Sends("batch end")])
        go_on(model, checkpoint, epochs=3)
        assert (checkpoint.epoch, checkpoint.step) == (3, 5)

    def test_needs_no_main_thread(self, tmp_path, handled):
        """Only the main thread may set a handler."""
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        thread = threading.Thread(
            target=go_on, args=(model, checkpoint), kwargs={"epochs": 2}
        )
        thread.start()
        thread.join()
        assert (checkpoint.epoch, checkpoint.step) == (2, 4)
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == [1]
