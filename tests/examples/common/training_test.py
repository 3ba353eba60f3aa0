"""The training loop, on a task of one layer."""

import csv
import errno
import functools
import json
import os
import signal
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.common import model_directory, training
from examples.digits import train
from tests import harness
from tf_adascale import Model

ADASCALE = {"algorithm": "adascale", "scale": 2}
IDENTITY = {"algorithm": "identity"}
ELASTIC = {"elastic": "0:2,0.25:4,0.5:2"}


def one_layer(total_steps=16):
    """Digits by logistic regression: the loop's work in little time."""

    def model():
        inputs = keras.Input((8, 8, 1))
        return Model(
            inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs))
        )

    return train.task()._replace(
        name="one_layer", total_steps=total_steps, model=model
    )


def run(model_dir, task=None, **settings):
    settings = training.Settings(**settings, model_dir=str(model_dir))
    return training.run(task or one_layer(), settings)


def rows(model_dir):
    with open(model_dir / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def saved_values(model_dir):
    """Returns the last checkpoint: weights, slots, averages, tau."""
    indices = (model_dir / "checkpoint").glob("ckpt-*.index")
    newest = max(indices, key=lambda path: int(path.stem.partition("-")[2]))
    reader = tf.train.load_checkpoint(str(newest.with_suffix("")))
    return {
        key: reader.get_tensor(key)
        for key in reader.get_variable_to_shape_map()
        if key.endswith(".ATTRIBUTES/VARIABLE_VALUE")
    }


def assert_same_state(actual, expected, *, except_epoch=False):
    actual, expected = saved_values(actual), saved_values(expected)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if not (except_epoch and key.startswith("epoch")):
            np.testing.assert_array_equal(actual[key], value, err_msg=key)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Makes the log short: a row saves a checkpoint."""
    assert training.LOG_ROWS == 100
    monkeypatch.setattr(training, "LOG_ROWS", 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Function of settings: directory and result of a run without a stop."""

    @functools.cache
    def trained(settings, log_rows):
        model_dir = tmp_path_factory.mktemp("whole") / "run"
        return model_dir, run(model_dir, **dict(settings))

    return lambda **settings: trained(
        tuple(settings.items()), training.LOG_ROWS
    )


class TestRun:
    @pytest.mark.parametrize(
        "algorithm, iterations",
        [
            ("lsw_plus", 3),
            ("adamscale", None),
            ("adasum", 2),  # 4 / 2
        ],
    )
    def test_smoke(self, tmp_path, algorithm, iterations):
        given = {"iterations": 3} if algorithm == "lsw_plus" else {}
        task = one_layer()
        if algorithm == "adamscale":  # SGD has no second moment.
            task = task._replace(optimizer=keras.optimizers.AdamW)
        result = run(
            tmp_path, task, algorithm=algorithm, scale=2, smoke=True, **given
        )
        if iterations is None:
            assert 2 <= result.iterations <= 4  # A gain is within [1, 2].
            assert 1 <= result.mean_gain <= 2
        else:
            assert result.iterations == iterations
            assert result.mean_gain is None
        assert result.examples == result.iterations * 2 * 16
        assert 0 <= result.value <= 1
        with open(tmp_path / "result.json") as file:
            assert training.Result(**json.load(file)) == result
        log = rows(tmp_path)
        assert len(log) == result.iterations
        names = {"loss", "accuracy", "effective_learning_rate"}
        assert names <= set(log[0])
        if iterations is None:
            assert {"gain", "scale_invariant_step"} <= set(log[0])
        assert os.listdir(tmp_path / "tensorboard" / "train")

    def test_a_run_has_few_rows(self, whole):
        model_dir, result = whole(**IDENTITY)
        assert result.iterations == 16
        # ceil(16 / 3) = 6 steps per row, and a shorter last row.
        assert [row["step"] for row in rows(model_dir)] == ["6", "12", "16"]

    def test_adascale_at_scale_1_is_plain_sgd(self, whole, tmp_path):
        plain_dir, plain = whole(**IDENTITY)
        adascale = run(tmp_path, algorithm="adascale")
        assert adascale.mean_gain == 1
        assert adascale.iterations == plain.iterations
        loss = [row["loss"] for row in rows(plain_dir)]
        assert loss == [row["loss"] for row in rows(tmp_path)]

    def test_steps_per_execution_takes_the_same_steps(self, whole, tmp_path):
        model_dir, result = whole(**IDENTITY)
        assert run(tmp_path, **IDENTITY, steps_per_execution=2) == result
        assert rows(tmp_path) == rows(model_dir)

    def test_adascale_changes_its_scale_by_tau(self, whole, monkeypatch):
        monkeypatch.setattr(training, "LOG_ROWS", 100)  # A row per step.
        model_dir, _ = whole(**ELASTIC)
        log = rows(model_dir)
        tau = [float(row["scale_invariant_step"]) for row in log]
        scales = [int(row["scale"]) for row in log]
        # T_SI = 16: S = 4 from the first step that begins at tau >= 4, and 2
        # again from the first at tau >= 8.
        begins = [0.0, *tau[:-1]]
        assert scales == [4 if 4 <= begin < 8 else 2 for begin in begins]
        assert set(scales) == {2, 4}
        assert begins[-1] < 16 <= tau[-1]
        # No step is lost or repeated when the scale changes: a gain is within
        # [1, S], and each base batch is seen once.
        gains = np.diff([0.0, *tau])
        assert all(1 <= gain <= s for gain, s in zip(gains, scales))
        np.testing.assert_array_equal(
            [int(row["base_batches"]) for row in log], np.cumsum(scales)
        )

    def test_lsw_changes_its_scale_by_base_steps(self, tmp_path, monkeypatch):
        # Rows are dropped when a process begins, not when a phase does, and a
        # full disk ends no run.
        write = model_directory.write_text

        def refuse_log(path, text):
            if path.endswith("log.csv"):
                raise OSError(errno.ENOSPC, "full")
            write(path, text)

        monkeypatch.setattr(model_directory, "write_text", refuse_log)
        result = run(tmp_path, algorithm="lsw", elastic="0:2,0.5:4")
        # 16 base steps: 8 / 2 and 8 / 4 iterations, 2 per row.
        assert result.iterations == 4 + 2
        assert result.examples == 16 * 16
        assert [row["scale"] for row in rows(tmp_path)] == ["2", "2", "4"]
        assert result.scale == "0:2,0.5:4"

    def test_missing_test_data_fail_before_training(self, tmp_path):
        def test_dataset(batch_size):
            raise ValueError("not prepared")

        with pytest.raises(ValueError, match="not prepared"):
            run(tmp_path, one_layer()._replace(test_dataset=test_dataset))
        assert os.listdir(tmp_path) == ["run.json"]

    def test_default_directory_and_own_metric(self, tmp_path, monkeypatch):
        def evaluate(model, dataset):
            sizes = [len(labels) for _, labels in dataset]
            return {"accuracy": 0.5, "batches": len(sizes)}

        monkeypatch.chdir(tmp_path)
        result = training.run(
            one_layer()._replace(evaluate=evaluate, metric="batches"),
            training.Settings(scale=2, smoke=True),
        )
        assert (result.metric, result.value) == ("batches", 2)
        model_dir = tmp_path / "out" / "one_layer" / "adascale-S2-seed0"
        assert len(rows(model_dir)) == result.iterations

    @pytest.mark.parametrize(
        "changed, had",
        [({"seed": 1}, "'seed': 0"), ({"smoothing": 0.5}, "'smoothing': None")],
    )
    def test_directory_of_another_run_is_refused(self, whole, changed, had):
        model_dir, _ = whole(**ADASCALE)
        before = rows(model_dir)
        with harness.refused("`model_dir` must be new", "{") as error:
            run(model_dir, **ADASCALE, **changed)
        assert had in str(error.value)
        assert rows(model_dir) == before

    @pytest.mark.parametrize(
        "settings, rule, received",
        [
            (
                {"mixed_precision": "float64"},
                "`mixed_precision` must be one of",
                "mixed_precision='float64'",
            ),
            (
                {"tpu": "local"},
                '`tpu` must only be given with strategy="tpu".',
                "tpu='local', strategy='default'",
            ),
            (
                {"cluster": "slurm", "strategy": "mirrored"},
                '`cluster` must only be given with strategy="multiworker".',
                "cluster='slurm', strategy='mirrored'",
            ),
            (
                {"replicas": 2},
                "`replicas` must be the number of replicas of the strategy",
                "replicas=2, strategy='default'",
            ),
            (
                {"scale": 4, "microbatches": 2},
                "`scale` must be replicas * microbatches",
                "scale=4, replicas=1, microbatches=2",
            ),
            (
                {"elastic": "0:4,1:8"},
                "`elastic` must be pairs fraction:scale",
                "elastic='0:4,1:8'",
            ),
            (
                {"elastic": "0:4", "microbatches": 2},
                "`elastic` must not be combined with",
                "elastic='0:4', scale=None, microbatches=2",
            ),
        ],
    )
    def test_refused_settings_leave_nothing(
        self, tmp_path, settings, rule, received
    ):
        with harness.refused(rule, received):
            run(tmp_path, **settings)
        assert not os.listdir(tmp_path)

    def test_settings_reach_the_algorithm(self, tmp_path, monkeypatch):
        def plan(algorithm, schedule, **kwargs):
            raise RuntimeError(f"{algorithm}, {kwargs['smoothing']}")

        monkeypatch.setattr(training.algorithms, "plan", plan)
        with pytest.raises(RuntimeError, match=r"adamscale, 0\.5"):
            run(tmp_path, algorithm="adamscale", smoothing=0.5)

    def test_scales_must_be_multiples_of_the_replicas(self):
        settings = training.Settings(elastic="0:2,0.5:3")
        with harness.refused("`scale` must be replicas", "scale=3, replicas=2"):
            training._scales(settings, 2)


class TestResume:
    @pytest.mark.parametrize(
        "settings, hook, epoch",
        [
            # The row is in the log already, but the checkpoint is not saved.
            (ADASCALE, "on_epoch_end", 2),
            (ELASTIC, "on_epoch_begin", 4),
        ],
        ids=str,
    )
    def test_interrupted_run_resumes_exactly(
        self, tmp_path, monkeypatch, whole, settings, hook, epoch
    ):
        if "elastic" in settings:
            monkeypatch.setattr(training, "LOG_ROWS", 100)  # A row per step.
        original = getattr(training.Progress, hook)

        def interrupted(self, number, logs=None):
            if number == epoch:
                raise KeyboardInterrupt
            original(self, number, logs)

        with monkeypatch.context() as patch:
            patch.setattr(training.Progress, hook, interrupted)
            with pytest.raises(SystemExit, match="same command resumes"):
                run(tmp_path, **settings)
        assert not (tmp_path / "result.json").exists()
        if "elastic" in settings:
            assert {row["scale"] for row in rows(tmp_path)} == {"2", "4"}
        expected, result = whole(**settings)
        assert run(tmp_path, **settings) == result
        assert rows(tmp_path) == rows(expected)
        assert_same_state(tmp_path, expected)

    def terminated(self, monkeypatch, step):
        """Makes a run get SIGTERM after a step: it saves after the next one."""
        original = training.Progress.on_train_batch_end

        def on_train_batch_end(self, batch, logs=None):
            original(self, batch, logs)
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(
            training.Progress, "on_train_batch_end", on_train_batch_end
        )

    def test_terminated_run_resumes_exactly(self, tmp_path, monkeypatch, whole):
        with monkeypatch.context() as patch:
            self.terminated(patch, 1)
            with pytest.raises(SystemExit) as exit:
                run(tmp_path, **IDENTITY)
        assert exit.value.code == training.STOPPED == 75
        assert not (tmp_path / "result.json").exists()
        expected, result = whole(**IDENTITY)
        assert run(tmp_path, **IDENTITY) == result
        # The row that was cut short after step 2 is an epoch more.
        assert_same_state(tmp_path, expected, except_epoch=True)
        steps = [row["step"] for row in rows(tmp_path)]
        assert steps == ["2", "6", "12", "16"]

    def test_adascale_resumes_at_another_scale(self, tmp_path, monkeypatch):
        monkeypatch.setattr(training, "LOG_ROWS", 100)  # A row per step.
        for scale, step in ((2, 2), (4, 4)):
            with monkeypatch.context() as patch:
                self.terminated(patch, step - 1)
                with pytest.raises(SystemExit):
                    run(tmp_path, scale=scale)
            with open(tmp_path / "run.json") as file:
                assert json.load(file)["scale"] == scale
        result = run(tmp_path, scale=2)
        # 2 steps at scale 2, 2 at 4, the others at 2.
        assert result.scale == "2-4-2"
        log = rows(tmp_path)
        assert [row["scale"] for row in log[:5]] == [*"22442"]
        assert [row["base_batches"] for row in log[:5]] == [
            *("2", "4", "8", "12", "14")
        ]
        tau = [float(row["scale_invariant_step"]) for row in log]
        gains = [float(row["gain"]) for row in log]
        np.testing.assert_allclose(np.cumsum(gains), tau, rtol=1e-6)
        assert tau[-1] >= 16 > tau[-2]
        assert result.examples == int(log[-1]["base_batches"]) * 16

    def test_finished_run_trains_no_more(self, whole):
        model_dir, result = whole(**ADASCALE)
        log = rows(model_dir)
        assert run(model_dir, **ADASCALE) == result
        assert rows(model_dir) == log

    def test_layers_in_lists_are_saved(self, tmp_path):
        class Listed(Model):
            def __init__(self):
                super().__init__()
                self.parts = [keras.layers.Flatten(), keras.layers.Dense(10)]
                self(keras.ops.zeros((1, 8, 8, 1)))

            def call(self, x):
                for part in self.parts:
                    x = part(x)
                return x

        task = one_layer(total_steps=1)._replace(model=Listed)
        run(tmp_path, task, **IDENTITY)
        assert any(
            value.shape == (64, 10)
            for key, value in saved_values(tmp_path).items()
            if key.startswith("model/")
        )


class TestLostWorker:
    @pytest.fixture(autouse=True)
    def lost(self, monkeypatch):
        def run(task, settings):
            raise tf.errors.UnavailableError(None, None, "Another was lost.")

        monkeypatch.setattr(training, "_run", run)

    def test_stops_with_a_message(self, capsys):
        with pytest.raises(SystemExit) as exit:
            training.run(one_layer(), training.Settings(strategy="multiworker"))
        assert exit.value.code == training.STOPPED
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            "one_layer: stopped because another worker was lost. Run the same "
            "command on all workers to resume. Another was lost."
        )

    def test_one_process_has_no_other_worker(self):
        with pytest.raises(tf.errors.UnavailableError):
            training.run(one_layer(), training.Settings())


@pytest.mark.parametrize(
    "step, interval, last, execution, expected",
    [
        (0, 5, 12, 1, (5, 3)),  # 5 + 5 + 2
        (5, 5, 12, 1, (5, 2)),
        (10, 5, 12, 1, (5, 1)),
        (0, 5, 10, 1, (5, 2)),
        # In the middle of a row: to its end.
        (3, 5, 12, 1, (2, 1)),
        (9, 5, 12, 1, (1, 1)),
        (11, 5, 12, 1, (4, 1)),
        # A multiple of the steps per execution: 2 rather than 1.
        (3, 4, 12, 2, (2, 1)),
        (1, 6, 12, 3, (6, 1)),
        (2, 4, 12, 2, (2, 1)),
    ],
)
def test_rows_left(step, interval, last, execution, expected):
    progress = types.SimpleNamespace(
        step=step,
        interval=interval,
        phase=types.SimpleNamespace(last_iteration=last),
    )
    settings = training.Settings(steps_per_execution=execution)
    assert training._rows_left(progress, settings) == expected


@pytest.mark.parametrize(
    "chief, terminal, expected",
    [
        (True, True, 1),
        (True, False, 2),
        (False, True, 0),
        (False, False, 0),
    ],
)
def test_only_the_chief_shows_progress(chief, terminal, expected, monkeypatch):
    output = types.SimpleNamespace(isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdout", output)
    assert training._verbosity(chief) == expected


class TestClaim:
    SETTINGS = training.Settings(scale=2, total_steps=16)

    def claim(self, tmp_path, *, interval=1, write=True, **changed):
        settings = self.SETTINGS._replace(
            model_dir=str(tmp_path / "run"), **changed
        )
        training._claim(settings, one_layer(), interval, write=write)

    def content(self, tmp_path):
        return (tmp_path / "run" / "run.json").read_text()

    @pytest.mark.parametrize(
        "changed",
        [
            {},
            {"scale": 4},
            {"interval": 3},
            {"scale": 1, "interval": 2},
            {"replicas": 2, "microbatches": 4},
            {"strategy": "mirrored", "steps_per_execution": 5},
        ],
        ids=str,
    )
    def test_adascale_may_change_its_scale(self, tmp_path, changed):
        self.claim(tmp_path)
        self.claim(tmp_path, **changed)
        claimed = json.loads(self.content(tmp_path))
        assert claimed["scale"] == changed.get("scale", 2)
        assert claimed["steps_per_row"] == changed.get("interval", 1)
        assert os.listdir(tmp_path / "run") == ["run.json"]

    @pytest.mark.parametrize(
        "given, changed",
        [
            *(
                ({}, changed)
                for changed in (
                    {"seed": 1},
                    {"total_steps": 17},
                    {"algorithm": "adamscale"},
                    {"algorithm": "average"},
                    {"scale": None, "elastic": "0:2,0.5:4"},
                )
            ),
            # Other algorithms cannot change their scale when they resume.
            ({"algorithm": "average"}, {"scale": 4}),
            ({"algorithm": "lsw"}, {"interval": 2}),
            ({"scale": None, "elastic": "0:2,0.5:4"}, {"interval": 2}),
            ({"scale": None, "elastic": "0:2,0.5:4"}, {"elastic": "0:2"}),
        ],
        ids=str,
    )
    def test_another_run_is_refused(self, tmp_path, given, changed):
        self.claim(tmp_path, **given)
        before = self.content(tmp_path)
        with pytest.raises(
            ValueError,
            match=r"^`model_dir` must be new or belong to the same run\. Use "
            r"\{.*\} to resume the one that it belongs to, or another "
            r"directory\. Received: \{.*\}, model_dir='",
        ):
            self.claim(tmp_path, **{**given, **changed})
        assert self.content(tmp_path) == before

    def test_the_error_names_what_differs(self, tmp_path):
        self.claim(tmp_path, smoothing=0.5, seed=1)
        with harness.refused("`model_dir` must", "{'smoothing': None}, model"):
            self.claim(tmp_path, seed=1)

    def test_what_a_finished_run_was_made_with_stays(self, tmp_path):
        self.claim(tmp_path)
        (tmp_path / "run" / "result.json").write_text("{}")
        self.claim(tmp_path, scale=8)
        assert json.loads(self.content(tmp_path))["scale"] == 2

    def test_only_the_chief_writes(self, tmp_path):
        self.claim(tmp_path, write=False)
        assert not (tmp_path / "run").exists()
        self.claim(tmp_path)
        before = self.content(tmp_path)
        self.claim(tmp_path, scale=8, write=False)
        assert self.content(tmp_path) == before
        with harness.refused("`model_dir` must be new or belong to the same"):
            self.claim(tmp_path, seed=1, write=False)
