"""Trainers that are stopped, killed, damaged and moved to other replicas."""

import csv
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from tests.processes import children
from tf_adascale import callbacks

EXIT_CODE = callbacks.Checkpoint.EXIT_CODE

TRAINER = (pathlib.Path(__file__).with_name("small_trainer.py"), "--scale=4")
# 180 steps in rows of two, so that a signal can come inside a row.
LONG = (*TRAINER, "--total_steps=600")
STEPS_PER_ROW = 2
# 65 steps in rows of one.
SHORT = (*TRAINER, "--total_steps=200")
SHORT_OF_TWO = (*SHORT, "--strategy=multiworker")
# Steps of the run `moved` on its first device.
FIRST_STEPS = 15

# Kills come at a random moment and during a save, alternately.
KILLS = 4


def started(directory, words):
    return children.started(*words, f"--model_dir={directory}")


def cluster(directory, *flags, **limits):
    words = (*SHORT_OF_TWO, *flags, f"--model_dir={directory}")
    return children.cluster(*words, **limits)


def trained(directory, words, **limits):
    """Trains to the end; returns what was written to stderr."""
    words = (*words, f"--model_dir={directory}")
    with children.started(*words, **limits) as child:
        assert child.finish() == 0, child.errors()
        return child.errors()


def names(directory):
    path = directory / "checkpoint"
    return sorted(os.listdir(path)) if path.is_dir() else []


def newest(directory):
    """Returns the number of the last complete checkpoint, or 0."""
    found = re.findall(r"ckpt-(\d+)\.index", " ".join(names(directory)))
    return max(map(int, found), default=0)


def is_writing(directory):
    """Returns whether a checkpoint is begun and not complete."""
    begun = re.findall(r"ckpt-(\d+)", " ".join(names(directory)))
    return max(map(int, begun), default=0) > newest(directory)


def wait_for_saves(child, directory, count):
    """Waits until a child has saved `count` more checkpoints."""
    last = newest(directory)
    child.wait_until(lambda: newest(directory) >= last + count)


def saved(directory):
    """Returns the last checkpoint's values by name."""
    path = directory / "checkpoint" / f"ckpt-{newest(directory)}"
    reader = tf.train.load_checkpoint(str(path))
    return {
        name.partition("/.")[0]: np.asarray(reader.get_tensor(name))
        for name in reader.get_variable_to_shape_map()
        if name.endswith("VARIABLE_VALUE")
    }


def log(directory):
    return (directory / "log.csv").read_text()


def column(directory, name):
    rows = csv.DictReader(log(directory).splitlines())
    return np.array([float(row[name]) for row in rows])


def result(directory):
    return json.loads((directory / "result.json").read_text())


def assert_same_values(found, wanted, *, tolerance=0.0):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        exact = tolerance == 0 or value.dtype.kind != "f"
        if exact:
            np.testing.assert_array_equal(value, wanted[name], err_msg=name)
        else:
            np.testing.assert_allclose(
                value, wanted[name], rtol=0, atol=tolerance, err_msg=name
            )


def assert_same(directory, expected, *, tolerance=0.0, stops=0):
    """Asserts equal results of two runs, one of which was stopped."""
    found, wanted = saved(directory), saved(expected)
    assert wanted["epoch"] <= found.pop("epoch") <= wanted.pop("epoch") + stops
    assert_same_values(found, wanted, tolerance=tolerance)
    for name, value in result(expected).items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=tolerance, abs=0)
        assert result(directory)[name] == value
    steps, wanted = (column(path, "step") for path in (directory, expected))
    assert np.all(np.diff(steps) > 0)
    assert set(steps) >= set(wanted)
    assert len(steps) <= len(wanted) + stops


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an uninterrupted run."""

    def make(directory):
        assert "Warning" not in trained(directory, LONG)

    return children.once(tmp_path_factory, "whole", make)[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, whole):
    """The directory of a run that SIGTERM stops inside a row of the log."""

    def make(directory):
        # Stops half-way, then again until a stop is inside a row.
        for saves in [newest(whole) // 2, *[1] * 9]:
            with started(directory, LONG) as child:
                wait_for_saves(child, directory, saves)
                child.send(signal.SIGTERM)
                assert child.finish() == EXIT_CODE, child.errors()
            if saved(directory)["step"] % STEPS_PER_ROW:
                return
        raise AssertionError("It never stops amid a row.")

    return children.once(tmp_path_factory, "stopped", make)[0]


@pytest.fixture
def copy(tmp_path, stopped):
    """A copy of `stopped`, to resume."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_killed_at_random_moments(tmp_path, whole):
    moments = random.Random(0)
    directory = tmp_path / "run"
    unfinished = False
    for number in range(3 * KILLS):
        with started(directory, LONG) as child:
            child.wait_until(directory.exists)
            if number:
                wait_for_saves(child, directory, moments.randint(1, 6))
            if number % 2:
                child.wait_until(lambda: is_writing(directory))
            else:
                time.sleep(moments.uniform(0, 0.1))
            child.send(signal.SIGKILL)
            assert child.finish() == -signal.SIGKILL
        unfinished |= is_writing(directory)
        if unfinished and number + 1 >= KILLS:
            break
    assert unfinished, "No kill came while a checkpoint was being written."
    trained(directory, LONG)
    assert_same(directory, whole)
    assert log(directory) == log(whole)
    # A kill inside the write of an index damages it, and spends its number.
    assert len(names(directory)) == len(names(whole))


def test_sigterm_saves_amid_a_row(stopped):
    assert column(stopped, "step")[-1] == saved(stopped)["step"]
    assert not (stopped / "result.json").exists()


def test_disk_full_while_saving(copy, whole):
    values, files = saved(copy), names(copy)
    # A checkpoint has 160,000 bytes, the log and TensorBoard's at most 80,000.
    errors = trained(copy, LONG, max_file_bytes=120_000)
    assert "RuntimeWarning: The checkpoint" in errors
    assert "File too large" in errors
    assert result(copy) == result(whole)
    assert names(copy) == files
    assert_same_values(saved(copy), values)
    # With room on the disk the run resumes from where SIGTERM stopped it.
    (copy / "result.json").unlink()
    assert "Warning" not in trained(copy, LONG)
    assert_same(copy, whole, stops=1)


def damage(directory, *, truncate, last):
    """Damages the checkpoint `last` before the newest; returns its path."""
    path = directory / "checkpoint" / f"ckpt-{newest(directory) - last}"
    data_path = path.with_name(f"{path.name}.data-00000-of-00001")
    data = bytearray(data_path.read_bytes())
    if truncate:
        del data[-1:]
    else:
        data[len(data) // 2] ^= 1
    data_path.write_bytes(data)
    return path


def test_damaged_checkpoint_is_passed_over(copy, whole):
    path = damage(copy, truncate=False, last=0)
    errors = trained(copy, LONG)
    assert f"RuntimeWarning: The checkpoint {path} cannot be read" in errors
    # The damaged checkpoint is the one that SIGTERM saved.
    assert_same(copy, whole)
    assert log(copy) == log(whole)


def test_only_damaged_checkpoints_are_an_error(copy):
    damage(copy, truncate=True, last=0)
    damage(copy, truncate=False, last=1)
    with started(copy, LONG) as child:
        assert child.finish() == 1
        assert (
            "ValueError: `directory` must hold a checkpoint" in child.errors()
        )


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """The directory of an uninterrupted run of two workers."""

    def make(directory):
        # The last worker can write only as much as a lock needs.
        with cluster(directory, last_max_file_bytes=64) as (chief, last):
            assert chief.finish() == last.finish() == 0, last.errors()
            assert "digits: Result(" in chief.output()
            assert last.output() == ""
            for errors in (chief.errors(), last.errors()):
                assert "could not be saved" not in errors
                assert "could not write" not in errors

    return children.once(tmp_path_factory, "whole_of_two", make)[0]


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The directory of a run on one device, then two workers, two replicas."""

    def make(directory):
        with started(directory, SHORT) as child:
            wait_for_saves(child, directory, FIRST_STEPS)
            child.send(signal.SIGTERM)
            assert child.finish() == EXIT_CODE, child.errors()
        with cluster(directory, "--scale=8") as (chief, last):
            wait_for_saves(chief, directory, 5)
            # SIGTERM to one worker stops both.
            last.send(signal.SIGTERM)
            assert chief.finish() == last.finish() == EXIT_CODE, chief.errors()
        trained(directory, (*SHORT, "--strategy=mirrored", "--replicas=2"))

    return children.once(tmp_path_factory, "moved", make)[0]


def worker(launcher, index):
    """Returns the process id of a launcher's worker."""
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "status").read_text()
            variables = (path / "environ").read_text().split("\0")
        except OSError:  # Another user's process, or an ended one.
            continue
        if f"PPid:\t{launcher.pid}\n" in status:
            (config,) = (v for v in variables if v.startswith("TF_CONFIG="))
            if json.loads(config.partition("=")[2])["task"]["index"] == index:
                return int(path.name)
    raise AssertionError(f"There is no worker {index}.")


@pytest.mark.multiworker
class TestTwoWorkers:
    def test_only_the_chief_writes(self, whole_of_two):
        assert sorted(path.name for path in whole_of_two.iterdir()) == [
            "checkpoint",
            "log.csv",
            "result.json",
            "run.json",
            "tensorboard",
        ]
        assert len(list(whole_of_two.rglob("*tfevents*"))) == 1

    def test_they_train_as_one_device(self, whole_of_two, moved):
        # `moved` begins at the same scale.
        for name in ("loss", "gain", "scale_invariant_step"):
            np.testing.assert_allclose(
                column(whole_of_two, name)[:FIRST_STEPS],
                column(moved, name)[:FIRST_STEPS],
                rtol=1e-5,
            )

    @pytest.mark.skipif(
        sys.platform != "linux", reason="looks for workers in /proc"
    )
    def test_one_is_lost_then_the_chief_then_all_are_stopped(
        self, tmp_path, whole_of_two
    ):
        directory = tmp_path / "run"
        # A lost worker ends the other. Both can be started again.
        with cluster(directory) as (chief, last):
            wait_for_saves(chief, directory, 3)
            last.send(signal.SIGKILL)
            assert chief.finish() == EXIT_CODE, chief.errors()
            for said in ("digits: stopped", "worker of the cluster was lost"):
                assert said in chief.errors()
        flags = ("examples.launch", "--max_restarts=2", "--", *SHORT_OF_TWO)
        with started(directory, flags) as launcher:
            # After the chief is lost, the launcher restarts both.
            wait_for_saves(launcher, directory, 3)
            os.kill(worker(launcher, 0), signal.SIGKILL)
            wait_for_saves(launcher, directory, 3)
            assert "restarting all, 1 of 2" in launcher.errors()
            # After SIGTERM to both there is no restart, although one is left.
            launcher.send(signal.SIGTERM)
            assert launcher.finish() == EXIT_CODE, launcher.errors()
            assert launcher.errors().count("restarting all") == 1
        with cluster(directory) as workers:
            for child in workers:
                assert child.finish() == 0, child.errors()
        assert_same(directory, whole_of_two, tolerance=1e-6)


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

    def test_averages_continue(self, moved):
        scales, gains = column(moved, "scale"), column(moved, "gain")
        variance, sqnorm = (
            column(moved, f"gradient_{name}") for name in ("variance", "sqnorm")
        )
        np.testing.assert_allclose(
            gains,
            (variance + sqnorm) / (variance / scales + sqnorm),
            rtol=1e-5,
        )
        # The k-th step moves an average by 1/k of the way to a new, noisy
        # sample. Averages that restarted with the scale would jump there.
        for average in (variance, sqnorm):
            changes = np.abs(np.diff(average)) / average[1:]
            assert changes[np.argmax(np.diff(scales) > 0) :].max() < 0.1
        assert changes[:3].max() > 0.3
