"""`Checkpoint`: the next process resumes a run, and SIGTERM ends it."""

import contextlib
import os
import shutil
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness
from tf_adascale import AdamScale, AdaScale
from tf_adascale.callbacks import (
    Checkpoint,
    StopAtScaleInvariantStep,
    checkpoint,
)
from tf_adascale.distribute import workers

ROWS = np.random.default_rng(1).normal(size=(6, 12, 4)).astype("float32")


# Models and optimizers of runs. All of their state must be saved.


class Listed(tf_adascale.Model):
    """A subclass with a list of layers, one of which is random."""

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
    """Returns a model with moving statistics and a random layer."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.5)(x)
    return cls(inputs, keras.layers.Dense(1)(x))


def stock():
    return functional(keras.Model)


def small():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])


def momentum(**arguments):
    rate = keras.optimizers.schedules.ExponentialDecay(0.02, 3, 0.5)
    return keras.optimizers.SGD(rate, momentum=0.9, **arguments)


def average():
    return momentum(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)


def adam():
    return keras.optimizers.AdamW(0.01, weight_decay=0.1)


def loss_scaled():
    # The scale doubles at steps 3 and 6.
    return keras.optimizers.LossScaleOptimizer(
        momentum(), initial_scale=2.0**8, dynamic_growth_steps=3
    )


def differenced():
    return AdaScale(momentum(), scale=2, estimator="differenced")


RUNS = {
    "small": (small, momentum),
    "keras": (stock, momentum),
    "keras_adam": (stock, adam),
    "keras_loss_scaled": (stock, loss_scaled),
    "moments": (functional, lambda: AdaScale(momentum())),
    "differenced": (functional, differenced),
    "adamscale": (functional, lambda: AdamScale(adam())),
    "ema": (functional, lambda: AdaScale(average())),
    "loss_scaled": (functional, lambda: AdaScale(loss_scaled())),
    "adasum": (functional, lambda: tf_adascale.Adasum(momentum())),
    "listed": (Listed, lambda: AdaScale(momentum())),
}


def built(name="small", *, seed=0, microbatches=2, **compiled):
    """Returns the built model of a run. The seed sets its random numbers."""
    keras.utils.set_random_seed(seed)
    make_model, make_optimizer = RUNS[name]
    model = make_model()
    if isinstance(model, tf_adascale.Model):
        compiled["microbatches"] = microbatches
    model.compile(make_optimizer(), "mse", **compiled)
    model.optimizer.build(model.trainable_variables)
    return model


def endless(start=0):
    """Returns batches of 12 that depend on their number only."""
    rows = tf.data.Dataset.from_tensor_slices(ROWS).repeat().skip(start)
    return rows.map(lambda x: (x, tf.reduce_sum(x, axis=1, keepdims=True)))


def digest(model):
    """Returns the bytes of all state of a run."""
    return [
        np.array(variable.numpy()).tobytes()
        for variable in [*model.variables, *model.optimizer.variables]
    ]


def counts(checkpoint):
    return checkpoint.epoch, checkpoint.step


def go_on(model, checkpoint, *, epochs, callbacks=(), **arguments):
    """Trains as `Checkpoint` documents; returns the last epoch's digest."""
    digests = []  # At ends of epochs: Keras averages weights later.
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: digests.append(digest(model))
    )
    arguments = {
        "steps_per_epoch": 2,
        "initial_epoch": checkpoint.epoch,
        "epochs": epochs,
        "callbacks": [look, *callbacks, checkpoint],
        **arguments,
    }
    harness.fit(model, endless(checkpoint.step), **arguments)
    return digests[-1]


class TestCheckpoint:
    def test_counts_epochs_and_steps(self, tmp_path):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        assert counts(checkpoint) == (0, 0)
        assert not any(tmp_path.iterdir())
        go_on(model, checkpoint, epochs=1)
        assert counts(checkpoint) == (1, 2)
        # The callback can be used again.
        go_on(model, checkpoint, epochs=3)
        assert counts(checkpoint) == (3, 6)
        again = Checkpoint(tmp_path, model=built())
        assert counts(again) == (3, 6)
        assert again.directory == str(tmp_path)

    @pytest.mark.parametrize(
        "name",
        [
            *("keras_loss_scaled", "differenced", "adamscale", "ema"),
            *("loss_scaled", "adasum", "listed"),
        ],
    )
    def test_goes_on_to_the_bit(self, name, tmp_path):
        model, saved = built(name), []

        def copy(epoch, logs=None):
            if epoch == 2:
                shutil.copytree(tmp_path / "whole", tmp_path / "parts")
                saved.extend(digest(model))

        checkpoint = Checkpoint(tmp_path / "whole", model=model)
        copies = keras.callbacks.LambdaCallback(on_epoch_begin=copy)
        whole = go_on(model, checkpoint, epochs=4, callbacks=[copies])
        assert len(set(whole)) >= 3
        model = built(name, seed=1)
        assert digest(model) != saved
        checkpoint = Checkpoint(tmp_path / "parts", model=model)
        assert digest(model) == saved
        assert go_on(model, checkpoint, epochs=4) == whole

    @pytest.mark.parametrize(
        "name, inside", [("moments", False), ("adasum", True)]
    )
    def test_goes_on_with_other_replicas(self, name, inside, tmp_path):
        # The scale stays 4: replicas times micro-batches.
        saved = None
        for epochs, count in enumerate([1, 4, 2], start=1):
            strategy = harness.strategy_of(count)
            with strategy.scope():
                model = built(name, seed=epochs, microbatches=4 // count)
            with strategy.scope() if inside else contextlib.nullcontext():
                checkpoint = Checkpoint(tmp_path, model=model)
            if saved is not None:
                assert digest(model) == saved
            saved = go_on(model, checkpoint, epochs=epochs)
            assert counts(checkpoint) == (epochs, 2 * epochs)
        assert harness.iterations(model) == 6

    def test_saves_variables_of_ones_own(self, tmp_path):
        def own():
            return tf.Variable(0.0), [tf.Variable(""), tf.Variable(0)]

        model, (one, several) = built(), own()
        checkpoint = Checkpoint(tmp_path, model=model, one=one, several=several)
        one.assign(2.5)
        several[0].assign("text")
        several[1].assign(7)
        checkpoint.on_epoch_end(0)
        one, several = own()
        Checkpoint(tmp_path, model=built(), one=one, several=several)
        assert float(one) == 2.5
        assert several[0].numpy() == b"text"
        assert int(several[1]) == 7

    @pytest.mark.parametrize("name", ["optimizer", "epoch", "step"])
    def test_refuses_variables_named_like_its_own(self, name, tmp_path):
        with pytest.raises(TypeError, match=name):
            Checkpoint(tmp_path, model=built(), **{name: tf.Variable(1.0)})

    def test_the_last_of_two_that_saved_counts(self, tmp_path):
        model = built()
        first, second = (Checkpoint(tmp_path, model=model) for _ in range(2))
        go_on(model, first, epochs=3)
        go_on(model, second, epochs=1)
        assert Checkpoint(tmp_path, model=built()).step == 2

    def test_counts_several_steps_per_execution(self, tmp_path):
        model = built(steps_per_execution=3)
        checkpoint = Checkpoint(tmp_path, model=model)
        go_on(model, checkpoint, epochs=2, steps_per_epoch=6)
        assert checkpoint.step == harness.iterations(model) == 12

    def test_counts_the_steps_of_a_finite_dataset(self, tmp_path):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        dataset = endless().take(5)
        harness.fit(model, dataset, epochs=2, callbacks=[checkpoint])
        assert counts(checkpoint) == (2, 10)

    def test_a_finished_run_takes_a_step_more(self, tmp_path):
        """`StopAtScaleInvariantStep` stops after a step, not before one."""
        steps = []
        for seed in range(2):
            model = built("moments", seed=seed)
            checkpoint = Checkpoint(tmp_path, model=model)
            stop = StopAtScaleInvariantStep(7)
            go_on(model, checkpoint, epochs=99, callbacks=[stop])
            steps.append(checkpoint.step)
            assert float(model.optimizer.scale_invariant_step) >= 7
        assert steps == [steps[0], steps[0] + 1]
        assert steps[0] < 7

    def test_skips_what_is_damaged(self, tmp_path):
        model = built()
        checkpoint = Checkpoint(tmp_path, model=model)
        first = go_on(model, checkpoint, epochs=1)
        go_on(model, checkpoint, epochs=2)
        *_, newest = sorted(tmp_path.glob("*.data*"))
        newest.write_bytes(b"")
        model = built(seed=1)
        with pytest.warns(RuntimeWarning, match="cannot be read"):
            checkpoint = Checkpoint(tmp_path, model=model)
        assert counts(checkpoint) == (1, 2)
        assert digest(model) == first

    def test_training_goes_on_where_it_cannot_save(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        model = built()
        checkpoint = Checkpoint(tmp_path / "file" / "run", model=model)
        with pytest.warns(RuntimeWarning, match="could not be saved"):
            go_on(model, checkpoint, epochs=3)
        assert checkpoint.epoch == 3
        assert harness.iterations(model) == 6


class TestRefused:
    @pytest.mark.parametrize(
        "saved, name",
        [
            ("keras", "keras_adam"),
            ("keras", "keras_loss_scaled"),
            ("keras", "moments"),
            ("moments", "keras"),
            *[
                ("moments", name)
                for name in ("differenced", "adasum", "ema", "loss_scaled")
            ],
            ("moments", "listed"),
        ],
    )
    def test_a_checkpoint_of_another_run(self, saved, name, tmp_path):
        Checkpoint(tmp_path, model=built(saved)).on_epoch_end(0)
        other = built(name, seed=1)
        with (
            harness.untouched(other),
            harness.refused("`directory` must hold checkpoints of this model"),
        ):
            Checkpoint(tmp_path, model=other)

    def test_a_checkpoint_of_an_optimizer_with_the_same_variables(
        self, tmp_path
    ):
        # The momenta of Lion and SGD differ in meaning.
        models = [small(), small()]
        models[0].compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        models[1].compile(keras.optimizers.Lion(0.1), "mse")
        for model in models:
            model.optimizer.build(model.trainable_variables)
        Checkpoint(tmp_path, model=models[0]).on_epoch_end(0)
        with pytest.raises(ValueError, match="'SGD' in place of 'Lion'"):
            Checkpoint(tmp_path, model=models[1])

    @pytest.mark.parametrize("missing", ["model", "optimizer", "compile"])
    def test_what_is_not_built(self, missing, tmp_path):
        model = keras.Sequential([keras.layers.Dense(1)])
        if missing != "model":
            model.build((None, 4))
        if missing != "compile":
            model.compile("sgd", "mse")
        with harness.refused(
            "`model` must be built and compiled", "model=<"
        ) as raised:
            Checkpoint(tmp_path / "run", model=model)
        assert f"built={missing != 'model'}, " in str(raised.value)
        with harness.refused(
            "`model` must be built and compiled", "model=3, built=False"
        ):
            Checkpoint(tmp_path / "run", model=3)
        assert not (tmp_path / "run").exists()

    def test_what_only_all_workers_can_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            workers,
            "only_all_workers_can_read",
            lambda strategy, variable: variable.shape == (1,),
        )
        with harness.refused(
            "`model` must hold only variables that the chief can read",
            "variable=<tf.Variable",
        ):
            Checkpoint(tmp_path / "run", model=built())
        assert not (tmp_path / "run").exists()

    def test_what_other_workers_did_not_restore(self, tmp_path, monkeypatch):
        model = built()
        go_on(model, Checkpoint(tmp_path, model=model), epochs=1)
        asked = []

        def agree(strategy, number):
            asked.append((strategy, number))
            return False

        monkeypatch.setattr(workers, "agree", agree)
        with harness.refused(
            "`directory` must be the same for all workers",
            f"directory={str(tmp_path)!r}, with step=2",
        ):
            Checkpoint(tmp_path, model=model)
        assert asked == [(model.distribute_strategy, 2)]


def test_only_the_chief_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "is_chief", lambda strategy: False)
    model = built()
    checkpoint = Checkpoint(tmp_path / "run", model=model)
    go_on(model, checkpoint, epochs=2)
    assert checkpoint.epoch == 2
    assert not (tmp_path / "run").exists()


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


class Sends(keras.callbacks.Callback):
    """Sends SIGTERM to this process, and records the events it sees."""

    def __init__(self, event, *, at=1):
        super().__init__()
        self.event = event
        self.at = at
        self.seen = []

    def _see(self, event):
        self.seen.append(event)
        if self.seen.count(event) == self.at and event == self.event:
            sigterm()

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


class Raises(keras.callbacks.Callback):
    """Raises at the end of the first batch."""

    def on_train_batch_end(self, batch, logs=None):
        raise InterruptedError


class TestSigterm:
    @pytest.fixture(autouse=True)
    def handled(self):
        """Counts the SIGTERMs that reach the handler set before `fit`."""
        received = []
        before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
        yield received
        signal.signal(signal.SIGTERM, before)

    @pytest.fixture
    def run(self, tmp_path):
        """Returns a model and its checkpoint."""
        model = built()
        return model, Checkpoint(tmp_path, model=model)

    def ends(self, run, *callbacks, epochs=3, **arguments):
        """Trains until SIGTERM ends it."""
        with pytest.raises(SystemExit) as exit:
            go_on(*run, epochs=epochs, callbacks=callbacks, **arguments)
        assert exit.value.code == Checkpoint.EXIT_CODE == os.EX_TEMPFAIL == 75

    def test_ends_the_epoch_saves_and_exits(self, run, tmp_path, handled):
        sends = Sends("batch end", at=6)
        self.ends(run, sends, epochs=9, steps_per_epoch=4)
        assert sends.seen == [
            *("train begin", "epoch begin"),
            *["batch end"] * 4,
            *("epoch end", "epoch begin"),
            *["batch end"] * 2,
            *("epoch end", "train end"),
        ]
        again = built(seed=1)
        assert counts(Checkpoint(tmp_path, model=again)) == (2, 6)
        assert digest(again) == digest(run[0])
        # The handler from before `fit` is back.
        assert not handled
        sigterm()
        assert handled == [1]

    def test_the_next_process_goes_on_to_the_bit(self, run, tmp_path):
        whole = go_on(*run, epochs=4)
        model = built()
        checkpoint = Checkpoint(tmp_path / "parts", model=model)
        self.ends((model, checkpoint), Sends("batch end"))
        assert checkpoint.step == 1
        model = built(seed=1)
        checkpoint = Checkpoint(tmp_path / "parts", model=model)
        # The rest of the interrupted epoch is skipped: 1 + 2 + 2 + 2.
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
            # Training is complete; the next process finds that.
            ("epoch end", 3, 3, 6),
            ("train end", 1, 3, 6),
        ],
    )
    def test_may_come_at_any_time(
        self, event, at, epoch, step, run, tmp_path, handled
    ):
        self.ends(run, Sends(event, at=at))
        again = Checkpoint(tmp_path, model=built())
        assert counts(again) == (epoch, step)
        assert not handled

    def test_saves_before_validation(self, run, tmp_path):
        seen = []
        look = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append("step"),
        )
        look.on_test_begin = lambda logs=None: seen.append(os.listdir(tmp_path))
        validation = endless(0).take(2)
        self.ends(run, Sends("batch end"), look, validation_data=validation)
        step, files = seen
        assert step == "step"
        assert "ckpt-1.index" in files
        # One save is enough.
        assert sorted(os.listdir(tmp_path)) == sorted(files)

    def test_ends_after_an_execution_of_several_steps(self, tmp_path):
        model = built(steps_per_execution=3)
        checkpoint = Checkpoint(tmp_path, model=model)
        sends = Sends("batch end", at=2)
        self.ends((model, checkpoint), sends, steps_per_epoch=9)
        assert checkpoint.step == harness.iterations(model) == 6

    @pytest.mark.parametrize("seconds, passed_on", [(5.0, []), (-1.0, [1])])
    def test_a_later_one_is_for_who_listened_before(
        self, seconds, passed_on, run, handled, monkeypatch
    ):
        assert checkpoint.SAME_NOTICE_SECONDS == 5.0
        monkeypatch.setattr(checkpoint, "SAME_NOTICE_SECONDS", seconds)
        self.ends(run, Sends("batch end"), Sends("epoch end"))
        assert handled == passed_on

    @pytest.mark.parametrize("failures", [1, 2])
    def test_is_not_lost_after_fit_failed(self, failures, run, handled):
        for _ in range(failures):
            with pytest.raises(InterruptedError):
                go_on(*run, epochs=1, callbacks=[Raises()])
        go_on(*run, epochs=1)
        sigterm()
        assert handled == [1]

    def test_the_second_ends_a_process_whose_fit_failed(
        self, run, handled, monkeypatch
    ):
        monkeypatch.setattr(checkpoint, "SAME_NOTICE_SECONDS", -1.0)
        with pytest.raises(InterruptedError):
            go_on(*run, epochs=1, callbacks=[Raises()])
        sigterm()
        sigterm()
        assert handled == [1]

    def test_does_not_end_the_fit_after_it(self, run):
        self.ends(run, Sends("batch end"))
        go_on(*run, epochs=3)
        assert counts(run[1]) == (3, 5)

    def test_needs_no_main_thread(self, run, handled):
        """Only the main thread can set a handler."""
        thread = threading.Thread(target=go_on, args=run, kwargs={"epochs": 2})
        thread.start()
        thread.join()
        assert counts(run[1]) == (2, 4)
        sigterm()
        assert handled == [1]
