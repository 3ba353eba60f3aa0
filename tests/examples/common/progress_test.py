"""Progress: the counts of a run, its phases, and how it resumes."""

import errno
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.common.elastic import Phase
from examples.common.progress import Forgiving, Progress
from tf_adascale import Model

# 4 iterations at scale 2, then 3 at scale 4.
PHASES = (Phase(2, 8, 4), Phase(4, 20, 7))


@pytest.fixture(autouse=True)
def handler():
    """Restores the handler of SIGTERM, and fails if a test did not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.signal(signal.SIGTERM, before) == before


def make(directory, *, phases=PHASES, interval=2, steps_per_execution=1):
    """Returns a model of one weight and its progress, like a new process."""
    inputs = keras.Input((1,))
    model = Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    model.compile(
        keras.optimizers.SGD(0.01),
        "mse",
        steps_per_execution=steps_per_execution,
    )
    model.optimizer.build(model.trainable_variables)
    progress = Progress(
        directory, model=model, phases=phases, interval=interval
    )
    return model, progress


def fit(model, progress, *before, epochs=99):
    """Trains to the end of the phase, with an interval per epoch."""
    ones = tf.data.Dataset.from_tensors((tf.ones((2, 1)), tf.ones((2, 1))))
    return model.fit(
        ones.repeat(),
        initial_epoch=progress.epoch,
        epochs=progress.epoch + epochs,
        steps_per_epoch=progress.interval,
        callbacks=[
            *before,
            keras.callbacks.LambdaCallback(on_epoch_end=progress.add),
            progress,
        ],
        shuffle=False,
        verbose=0,
    ).history


def places(progress):
    return progress.step, progress.base_batches, progress.epoch, progress.scales


class At(keras.callbacks.Callback):
    """Calls a function at the end of a step of `fit`, counted from 1."""

    def __init__(self, step, action):
        super().__init__()
        self.left = step
        self.action = action

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            self.action(self.model)


def terminate(model):
    os.kill(os.getpid(), signal.SIGTERM)


def end(model):
    model.stop_training = True


class TestPhases:
    def test_end_with_their_last_iteration(self, tmp_path):
        model, progress = make(tmp_path)
        assert progress.interval == 2
        assert places(progress) == (0, 0, 0, ())
        assert progress.phase == PHASES[0]
        history = fit(model, progress)
        # 4 steps of scale 2, in two epochs.
        assert places(progress) == (4, 8, 2, (2,))
        assert history["step"] == [2, 4]
        assert history["base_batches"] == [4, 8]
        assert history["scale"] == [2, 2]
        assert progress.phase == PHASES[1]
        assert not progress.finished
        history = fit(model, progress)
        # 3 steps of scale 4; the second epoch is cut short.
        assert places(progress) == (7, 20, 4, (2, 4))
        assert history["step"] == [6, 7]
        assert history["base_batches"] == [16, 20]
        assert history["scale"] == [4, 4]
        assert progress.finished
        assert int(tf.convert_to_tensor(model.optimizer.iterations)) == 7

    def test_are_found_again_by_the_next_process(self, tmp_path):
        for expected in (
            (4, 8, 2, (2,)),
            (7, 20, 4, (2, 4)),
        ):
            model, progress = make(tmp_path)
            assert not progress.finished
            fit(model, progress)
            assert places(progress) == expected
        _, progress = make(tmp_path)
        assert progress.finished
        assert places(progress) == (7, 20, 4, (2, 4))

    def test_end_where_a_callback_before_ends_them(self, tmp_path):
        model, progress = make(tmp_path)
        fit(model, progress, At(3, end))
        assert places(progress) == (3, 6, 2, (2,))
        assert progress.phase == PHASES[1]
        # The next phase begins in the middle of a row.
        assert progress.step % progress.interval == 1

    def test_count_all_steps_of_an_execution(self, tmp_path):
        model, progress = make(tmp_path, interval=3, steps_per_execution=3)
        fit(model, progress)
        # The last iteration is the 4th, but executions end at multiples of 3.
        assert places(progress) == (6, 12, 2, (2,))
        assert progress.phase == PHASES[1]


class TestSigterm:
    @pytest.mark.parametrize(
        "step, phase",
        # The 4th step is the last of the first phase.
        [(1, 0), (2, 0), (3, 0), (4, 1)],
    )
    def test_ends_a_phase_at_its_end_only(self, step, phase, tmp_path):
        model, progress = make(tmp_path)
        with pytest.raises(SystemExit) as exit:
            fit(model, progress, At(step, terminate))
        assert exit.value.code == 75
        _, progress = make(tmp_path)
        epochs = -(-step // 2)
        assert places(progress) == (step, 2 * step, epochs, (2,))
        assert progress.phase == PHASES[phase]

    @pytest.mark.parametrize("order", [1, -1])
    def test_with_the_step_that_another_callback_ends(self, order, tmp_path):
        model, progress = make(tmp_path)
        callbacks = [At(3, end), At(3, terminate)][::order]
        with pytest.raises(SystemExit):
            fit(model, progress, *callbacks)
        _, progress = make(tmp_path)
        assert places(progress) == (3, 6, 2, (2,))
        assert progress.phase == PHASES[1]

    def test_at_the_very_end(self, tmp_path):
        model, progress = make(tmp_path)
        fit(model, progress)
        with pytest.raises(SystemExit):
            fit(model, progress, At(3, terminate))
        _, progress = make(tmp_path)
        assert progress.finished
        assert places(progress) == (7, 20, 4, (2, 4))

    def test_loses_no_step(self, tmp_path):
        results = []
        for number, stops in enumerate([(), (1, 1, 1), (2, 2)]):
            keras.utils.set_random_seed(0)
            for step in stops:
                model, progress = make(tmp_path / str(number))
                with pytest.raises(SystemExit):
                    fit(model, progress, At(step, terminate))
            model, progress = make(tmp_path / str(number))
            while not progress.finished:
                fit(model, progress)
            assert (progress.step, progress.base_batches) == (7, 20)
            results.append(model.get_weights()[0].tobytes())
        assert results == [results[0]] * 3


class TestScales:
    def test_of_processes_one_after_another(self, tmp_path):
        seen = []
        # Scales 4, 8, 8 and 4 of AdaScale, whose phases have the same end.
        for scale in (4, 8, 8, 4):
            phases = (Phase(scale, 100, 100),)
            model, progress = make(tmp_path, phases=phases)
            assert progress.phase.scale == scale
            fit(model, progress, epochs=1)
            seen.append((progress.scales, progress.base_batches))
        assert seen == [
            ((4,), 8),
            ((4, 8), 24),
            ((4, 8), 40),
            ((4, 8, 4), 48),
        ]

    def test_a_scale_without_a_step_does_not_count(self, tmp_path):
        model, progress = make(tmp_path)
        fit(model, progress, epochs=1)
        make(tmp_path, phases=(Phase(16, 100, 100),))
        _, progress = make(tmp_path)
        assert progress.scales == (2,)

    def test_resumes_with_another_interval(self, tmp_path):
        model, progress = make(tmp_path, interval=3)
        fit(model, progress, epochs=1)
        model, progress = make(tmp_path, interval=2)
        assert progress.interval == 2
        assert places(progress) == (3, 6, 1, (2,))
        fit(model, progress)
        assert places(progress) == (4, 8, 2, (2,))


class Logger(Forgiving, keras.callbacks.CSVLogger):
    """A CSVLogger whose errors are forgiven."""


class TestForgiving:
    def fit(self, callback):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x = np.ones((2, 1))
        callbacks = [callback]
        history = model.fit(
            x, x, epochs=3, verbose=0, callbacks=callbacks
        ).history
        return len(history["loss"])

    def test_writes_if_possible(self, tmp_path, capsys):
        path = tmp_path / "log.csv"
        assert self.fit(Logger(path)) == 3
        lines = path.read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["epoch", *"012"]
        assert not capsys.readouterr().err

    def test_trains_without_a_file(self, tmp_path, capsys):
        path = tmp_path / "missing" / "log.csv"
        assert self.fit(Logger(path)) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("Logger could not write: [Errno 2]")

    def test_may_end_before_it_begins(self, tmp_path):
        # Training can be interrupted while it waits for data.
        Logger(tmp_path / "log.csv").on_train_end()
        assert not os.listdir(tmp_path)

    @pytest.mark.skipif(
        not os.path.exists("/dev/full"), reason="Linux has a full device"
    )
    def test_trains_if_the_disk_is_full(self, capsys):
        assert self.fit(Logger("/dev/full")) == 3
        lines = capsys.readouterr().err.splitlines()
        # An error after each epoch, and one when the file is closed.
        assert len(lines) == 4
        reason = os.strerror(errno.ENOSPC)
        for line in lines:
            assert line.startswith("Logger could not write: ")
            assert reason in line

    @pytest.mark.parametrize(
        "error",
        [
            OSError("gone"),
            tf.errors.ResourceExhaustedError(None, None, "gone"),
        ],
    )
    @pytest.mark.parametrize("method", ["on_epoch_end", "on_train_end"])
    def test_passes_arguments_on(self, method, error, capsys):
        received = []

        class Writer(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                received.append((epoch, logs))
                if method == "on_epoch_end":
                    raise error

            def on_train_end(self, logs=None):
                received.append(logs)
                if method == "on_train_end":
                    raise error

        class Forgiven(Forgiving, Writer):
            pass

        callback = Forgiven()
        callback.on_train_begin()
        callback.on_epoch_end(3, {"loss": 1.0})
        callback.on_train_end({"loss": 2.0})
        assert received == [(3, {"loss": 1.0}), {"loss": 2.0}]
        shown = capsys.readouterr().err
        assert shown == "Forgiven could not write: gone\n"

    def test_does_not_forgive_other_errors(self):
        class Wrong(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                raise ValueError("wrong")

        class Forgiven(Forgiving, Wrong):
            pass

        callback = Forgiven()
        callback.on_train_begin()
        with pytest.raises(ValueError, match="wrong"):
            callback.on_epoch_end(0, {})
