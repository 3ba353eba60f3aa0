"""Trainers that are killed, stopped, damaged and moved: real processes."""

import contextlib
import csv
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from tf_adascale import callbacks

ROOT = pathlib.Path(__file__).parent.parent

# A process starts in some 8 seconds; a machine may be busy.
TIMEOUT_SECONDS = 240

KILLS = 10

# Rows of two steps, in which training can be stopped between two rows.
TRAINER = ("examples.digits.train", "--scale=4", "--total_steps=600")
STEPS_PER_ROW = 2
# Rows of one step.
SHORT_TRAINER = ("examples.digits.train", "--scale=4", "--total_steps=200")

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="looks for workers in /proc"
)

# Runs a module whose files must not be larger than so many bytes, if it is
# not the chief of several workers.
LIMITED = """
import json, os, resource, runpy, sys
limit, module = sys.argv[1:3]
sys.argv[1:3] = []
config = json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 1}}'))
if config["task"]["index"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def started(directory, words, *flags):
    """Yields a `Run` of a module or a script; ends it with the block."""
    words = words if words[0].endswith(".py") else ("-m", *words)
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
    ):
        process = subprocess.Popen(
            [sys.executable, *words, f"--model_dir={directory}", *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        try:
            yield Run(directory, process, output, errors)
        finally:
            process.kill()
            process.wait()


class Run:
    """A process that trains in a directory."""

    def __init__(self, directory, process, *files):
        self.directory = directory
        self.pid = process.pid
        self._process = process
        self._files = files

    def output(self):
        return self._text(0)

    def errors(self):
        return self._text(1)

    def finish(self):
        """Returns the exit code."""
        return self._process.wait(TIMEOUT_SECONDS)

    def send(self, number):
        self._process.send_signal(number)

    def wait_until(self, condition, *, seconds=0.01):
        """Waits while the process runs, which it must until then."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self._process.poll() is None, self.errors()
            assert time.monotonic() < end, self.errors()
            time.sleep(seconds)

    def wait_for_saves(self, count):
        """Waits until `count` checkpoints were saved since it was called."""
        last = newest(self.directory)
        self.wait_until(lambda: newest(self.directory) >= last + count)

    def _text(self, number):
        self._files[number].seek(0)
        return self._files[number].read()


def trained(directory, words=TRAINER, *flags):
    """Trains to the end; returns what was printed on stderr."""
    with started(directory, words, *flags) as run:
        assert run.finish() == 0, run.errors()
        return run.errors()


def names(directory):
    path = directory / "checkpoint"
    return os.listdir(path) if path.is_dir() else []


def newest(directory):
    """Returns the number of the last complete checkpoint, 0 if none is."""
    found = re.findall(r"ckpt-(\d+)\.index", " ".join(names(directory)))
    return max(map(int, found), default=0)


def is_writing(directory):
    """Returns whether a checkpoint is begun and has no index yet."""
    found = names(directory)
    begun = set(re.findall(r"ckpt-\d+", " ".join(found)))
    return not {f"{name}.index" for name in begun} <= set(found)


def saved(directory):
    """Returns the last checkpoint's values by name."""
    path = directory / "checkpoint" / f"ckpt-{newest(directory)}"
    reader = tf.train.load_checkpoint(str(path))
    return {
        name.partition("/.")[0]: np.asarray(reader.get_tensor(name))
        for name in reader.get_variable_to_shape_map()
        if name.endswith("VARIABLE_VALUE")
    }


def step(directory):
    return int(saved(directory)["step"])


def result(directory):
    return json.loads((directory / "result.json").read_text())


def rows(directory):
    with open(directory / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(directory, name):
    return np.array([float(row[name]) for row in rows(directory)])


def assert_same(directory, expected, *, tolerance=0.0, stops=0):
    """Compares what two runs ended with; one was stopped so many times."""
    found, wanted = saved(directory), saved(expected)
    assert found.keys() == wanted.keys()
    assert wanted["epoch"] <= found.pop("epoch") <= wanted.pop("epoch") + stops
    for name, value in found.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(
                value, wanted[name], rtol=0, atol=tolerance, err_msg=name
            )
        else:
            np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    for name, value in result(expected).items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=tolerance, abs=0)
        assert result(directory)[name] == value
    steps = column(directory, "step")
    assert np.all(np.diff(steps) > 0)
    assert set(steps) >= set(column(expected, "step"))
    assert len(steps) <= len(rows(expected)) + stops


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert "Warning" not in trained(directory)
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, whole):
    """The directory of a run that SIGTERM stopped amid a row, near its end."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    # The signal may come with the last step of a row: then again.
    for saves in range(newest(whole) - 8, newest(whole)):
        with started(directory, TRAINER) as run:
            run.wait_for_saves(saves - newest(directory))
            run.send(signal.SIGTERM)
            assert run.finish() == callbacks.Checkpoint.EXIT_CODE, run.errors()
        if step(directory) % STEPS_PER_ROW:
            return directory
    raise AssertionError("Never stopped amid a row.")


@pytest.fixture
def copy(tmp_path, stopped):
    """A copy of `stopped`, to go on with."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_killed_at_ten_random_moments(tmp_path, whole):
    moments = random.Random(0)
    directory = tmp_path / "run"
    for number in range(KILLS):
        with started(directory, TRAINER) as run:
            if number:
                run.wait_for_saves(moments.randint(1, 6))
            if number % 2:
                run.wait_until(lambda: not is_writing(directory))
                run.wait_until(lambda: is_writing(directory), seconds=1e-4)
            else:
                run.wait_until(directory.exists)
                time.sleep(moments.uniform(0, 0.2))
            run.send(signal.SIGKILL)
            assert run.finish() == -signal.SIGKILL
    trained(directory)
    assert_same(directory, whole)
    log = "log.csv"
    assert (directory / log).read_text() == (whole / log).read_text()
    assert not is_writing(directory)


class TestStoppedBySigterm:
    def test_saves_amid_a_row(self, stopped):
        assert float(rows(stopped)[-1]["step"]) == step(stopped)
        assert not (stopped / "result.json").exists()

    def test_goes_on_as_if_it_never_was(self, copy, whole):
        assert "Warning" not in trained(copy)
        assert_same(copy, whole, stops=1)


class TestDamagedCheckpoints:
    def damage(self, directory, kind, *, last):
        number = newest(directory) - last
        name = f"ckpt-{number}.data-00000-of-00001"
        path = directory / "checkpoint" / name
        data = bytearray(path.read_bytes())
        if kind == "truncated":
            del data[-1:]
        else:
            data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return str(path).partition(".data")[0]

    def test_the_one_before_is_gone_on_from(self, copy, whole):
        path = self.damage(copy, "flipped", last=0)
        errors = trained(copy)
        assert f"RuntimeWarning: The checkpoint {path} cannot be read" in errors
        # The stop was in the one that was damaged.
        assert_same(copy, whole)
        text = (whole / "log.csv").read_text()
        assert (copy / "log.csv").read_text() == text

    def test_without_a_whole_one_it_is_an_error(self, copy):
        for last, kind in enumerate(["truncated", "flipped"]):
            self.damage(copy, kind, last=last)
        with started(copy, TRAINER) as run:
            assert run.finish() == 1
            assert "ValueError: No checkpoint can be read" in run.errors()


@pytest.fixture
def limited(tmp_path):
    """A script: a module whose files have at most so many bytes."""
    path = tmp_path / "limited.py"
    path.write_text(LIMITED)
    return str(path)


def test_disk_full_while_saving(copy, whole, limited):
    before, names_before = saved(copy), sorted(names(copy))
    # A checkpoint has 630,000 bytes, the log 30,000.
    errors = trained(copy, (limited, "200000", *TRAINER))
    assert "RuntimeWarning: The checkpoint" in errors
    assert "File too large" in errors
    assert result(copy) == result(whole)
    assert sorted(names(copy)) == names_before
    for name, value in saved(copy).items():
        np.testing.assert_array_equal(value, before[name])
    (copy / "result.json").unlink()
    assert "Warning" not in trained(copy)
    assert_same(copy, whole, stops=1)


def worker(launcher, index):
    """Returns the process id of a launcher's worker."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (path / "status").read_text()
            variables = (path / "environ").read_text().split("\0")
            if f"PPid:\t{launcher.pid}\n" in status:
                (config,) = (v for v in variables if v.startswith("TF_CONFIG="))
                task = json.loads(config.partition("=")[2])["task"]
                if task["index"] == index:
                    return int(path.name)
    raise AssertionError(f"There is no worker {index}.")


def launch(directory, *flags, words=SHORT_TRAINER):
    """Returns what `started` does, of two workers."""
    flags = ("examples.launch", *flags, "--", *words)
    return started(directory, flags, "--strategy=multiworker")


class Ended(NamedTuple):
    """How a launcher ended."""

    code: int
    output: str
    errors: str
    seconds: float


def ended(run, send):
    """Lets two workers save three checkpoints, sends a signal, and waits."""
    run.wait_for_saves(3)
    send()
    begin = time.monotonic()
    code = run.finish()
    seconds = time.monotonic() - begin
    return Ended(code, run.output(), run.errors(), seconds)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """The directory of two workers that nothing happens to, and their `Ended`.

    The second cannot write: its files may have 64 bytes: as a lock needs.
    """
    directory = tmp_path_factory.mktemp("two")
    script = directory / "limited.py"
    script.write_text(LIMITED)
    words = (str(script), "64", *SHORT_TRAINER)
    with launch(directory / "run", words=words) as run:
        code = run.finish()
        end = Ended(code, run.output(), run.errors(), 0.0)
    return directory / "run", end


@pytest.fixture(scope="module")
def hunted(tmp_path_factory):
    """The directory of two workers to whom all happens, and each `Ended`."""
    directory = tmp_path_factory.mktemp("hunted") / "run"
    ends = {}
    with launch(directory) as run:
        ends["one is stopped"] = ended(
            run, lambda: os.kill(worker(run, 1), signal.SIGTERM)
        )
    with launch(directory, "--max_restarts=1") as run:
        ends["both are stopped"] = ended(run, lambda: run.send(signal.SIGTERM))
    with launch(directory) as run:
        ends["one is killed"] = ended(
            run, lambda: os.kill(worker(run, 1), signal.SIGKILL)
        )
    with launch(directory, "--max_restarts=1") as run:
        ends["chief is killed"] = ended(
            run, lambda: os.kill(worker(run, 0), signal.SIGKILL)
        )
    return directory, ends


@linux
@pytest.mark.multiworker
class TestTwoWorkers:
    def test_the_chief_writes_and_prints(self, whole_of_two):
        directory, end = whole_of_two
        assert end.code == 0, end.errors
        assert "could not be saved" not in end.errors
        assert "could not write" not in end.errors
        assert "[0] digits: Result(" in end.output
        assert "[1]" not in end.output
        files = sorted(path.name for path in directory.iterdir())
        assert files == [
            "checkpoint",
            "log.csv",
            "result.json",
            "run.json",
            "tensorboard",
        ]
        assert len(list(directory.rglob("*tfevents*"))) == 1

    def test_sigterm_to_one_stops_both(self, hunted):
        _, ends = hunted
        assert ends["one is stopped"].code == callbacks.Checkpoint.EXIT_CODE

    def test_sigterm_to_the_launcher_is_final(self, hunted):
        _, ends = hunted
        assert ends["both are stopped"].code == callbacks.Checkpoint.EXIT_CODE
        assert "start again" not in ends["both are stopped"].errors

    def test_a_lost_worker_ends_the_others_in_time(self, hunted):
        _, ends = hunted
        end = ends["one is killed"]
        assert end.code == 128 + signal.SIGKILL
        assert "[0] digits: stopped, for another worker was lost." in end.errors
        assert "Expected all workers of the cluster to train" in end.errors
        assert end.seconds < 60

    def test_restarted_all_go_on(self, hunted, whole_of_two):
        directory, ends = hunted
        assert ends["chief is killed"].code == 0, ends["chief is killed"].errors
        assert "all start again, 1 of 1" in ends["chief is killed"].errors
        expected, _ = whole_of_two
        assert_same(directory, expected, tolerance=1e-6)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The directory of a run on one device, then on two, then two workers."""
    directory = tmp_path_factory.mktemp("moved") / "run"
    with started(directory, SHORT_TRAINER) as run:
        run.wait_for_saves(15)
        run.send(signal.SIGTERM)
        assert run.finish() == callbacks.Checkpoint.EXIT_CODE, run.errors()
    mirrored = ("--scale=8", "--strategy=mirrored", "--replicas=2")
    with started(directory, SHORT_TRAINER, *mirrored) as run:
        run.wait_for_saves(5)
        run.send(signal.SIGTERM)
        assert run.finish() == callbacks.Checkpoint.EXIT_CODE, run.errors()
    with launch(directory) as run:
        assert run.finish() == 0, run.errors()
    return directory


@pytest.mark.multiworker
class TestElastic:
    def test_each_process_counts_at_its_scale(self, moved):
        assert result(moved)["scale"] == "4-8-4"
        scales = column(moved, "scale")
        changes = np.diff(scales)
        assert changes[changes != 0].tolist() == [4, -4]
        assert column(moved, "step").tolist() == list(range(1, len(scales) + 1))
        counts = column(moved, "base_batches")
        np.testing.assert_array_equal(counts, np.cumsum(scales))

    def test_progress_is_the_sum_of_all_gains(self, moved):
        steps = column(moved, "scale_invariant_step")
        gains = column(moved, "gain")
        np.testing.assert_allclose(steps, np.cumsum(gains), rtol=1e-6)
        # The last step is worth 8 at most.
        assert 200 <= steps[-1] < 208

    def test_averages_go_on(self, moved):
        scales, gains = column(moved, "scale"), column(moved, "gain")
        variance, sqnorm = (
            column(moved, f"gradient_{name}") for name in ("variance", "sqnorm")
        )
        np.testing.assert_allclose(
            gains,
            (variance + sqnorm) / (variance / scales + sqnorm),
            rtol=1e-5,
        )
        # The k-th step of an average changes it by 1/k of what is new. Some
        # fifteen steps precede the first stop; averages that began anew would
        # change as in the first steps, by a fifth.
        for average in (variance, sqnorm):
            changes = np.abs(np.diff(np.log(average)))
            assert changes[:3].max() > 0.05
            assert changes[14:].max() < 0.05


OWN = """
import sys
import keras, numpy as np, tensorflow as tf
import tf_adascale

directory = sys.argv[1].removeprefix("--model_dir=")
keras.utils.set_random_seed(0)
inputs = keras.Input((4,))
x = keras.layers.Dense(8, activation="tanh")(inputs)
x = keras.layers.BatchNormalization()(x)
x = keras.layers.Dropout(0.2)(x)
model = tf_adascale.Model(inputs, keras.layers.Dense(1)(x))
sgd = keras.optimizers.SGD(
    keras.optimizers.schedules.CosineDecay(0.005, 1000), momentum=0.9
)
model.compile(tf_adascale.AdaScale(sgd), "mse", microbatches=2)
model.optimizer.build(model.trainable_variables)

x = np.random.default_rng(0).normal(size=(96, 5)).astype("float32")
data = tf.data.Dataset.from_tensor_slices((x[:, :4], x.sum(1, keepdims=True)))
batches = data.shuffle(96, seed=1).batch(8)
checkpoint = tf_adascale.callbacks.Checkpoint(
    f"{directory}/checkpoint", model=model
)
model.fit(
    batches.repeat().skip(checkpoint.step),
    steps_per_epoch=10,
    initial_epoch=checkpoint.epoch,
    epochs=1000,
    callbacks=[
        tf_adascale.callbacks.ScalingLog(),
        tf_adascale.callbacks.StopAtScaleInvariantStep(1000),
        checkpoint,
    ],
    shuffle=False,
    verbose=0,
)
"""


def test_a_model_of_ones_own(tmp_path):
    script = tmp_path / "own.py"
    script.write_text(OWN)
    words = (str(script),)
    trained(tmp_path / "whole", words)
    directory = tmp_path / "run"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        with started(directory, words) as run:
            run.wait_for_saves(5)
            run.send(number)
            stopped = number == signal.SIGTERM
            expected = callbacks.Checkpoint.EXIT_CODE if stopped else -number
            assert run.finish() == expected, run.errors()
    trained(directory, words)
    found, wanted = saved(directory), saved(tmp_path / "whole")
    # The epoch that was stopped is not made up for.
    assert wanted.pop("epoch") <= found.pop("epoch") <= 101
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
