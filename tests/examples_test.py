"""The trainers' loop, on a task of one layer; the digits and the demo."""

import csv
import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import flags as absl_flags
from absl.testing import flagsaver

from examples import (
    algorithms,
    data_flags,
    figures,
    flags,
    launch,
    model_directory,
    runs,
    strategies,
    training,
)
from examples.digits import data, demo, train
from tf_adascale import Adasum, Model

ROOT = pathlib.Path(__file__).parent.parent


def one_layer():
    """Digits by logistic regression: the loop's work without the waiting."""

    def model():
        inputs = keras.Input((8, 8, 1))
        return Model(
            inputs, keras.layers.Dense(10)(keras.layers.Flatten()(inputs))
        )

    return train.task()._replace(name="one_layer", total_steps=16, model=model)


def run(tmp_path, name="run", task=None, **settings):
    settings = training.Settings(**settings)._replace(
        model_dir=str(tmp_path / name)
    )
    return training.run(task or one_layer(), settings)


def rows(tmp_path, name="run"):
    with open(tmp_path / name / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def saved_values(tmp_path, name):
    """Returns the last checkpoint: weights, slots, averages, tau."""
    indices = (tmp_path / name / "checkpoint").glob("ckpt-*.index")
    newest = max(indices, key=lambda path: int(path.stem.partition("-")[2]))
    reader = tf.train.load_checkpoint(str(newest.with_suffix("")))
    return {
        key: reader.get_tensor(key)
        for key in reader.get_variable_to_shape_map()
        if key.endswith(".ATTRIBUTES/VARIABLE_VALUE")
    }


class TestSplitScale:
    @pytest.mark.parametrize(
        "given, expected",
        [
            ({"replicas": 1}, (1, 1)),
            ({"replicas": 4}, (4, 1)),
            ({"replicas": 1, "scale": 64}, (64, 64)),
            ({"replicas": 4, "scale": 64}, (64, 16)),
            ({"replicas": 4, "microbatches": 2}, (8, 2)),
            ({"replicas": 4, "scale": 8, "microbatches": 2}, (8, 2)),
        ],
    )
    def test_one_follows_from_the_others(self, given, expected):
        assert strategies.split_scale(**given) == expected

    @pytest.mark.parametrize(
        "given",
        [
            {"replicas": 4, "scale": 6},
            {"replicas": 4, "scale": 2},
            {"replicas": 2, "scale": 8, "microbatches": 2},
        ],
    )
    def test_what_cannot_be_made_is_refused(self, given):
        with pytest.raises(ValueError, match="do not make the scale") as error:
            strategies.split_scale(**given)
        assert "Expected scale = replicas * microbatches" in str(error.value)
        assert f"Received: scale={given['scale']}" in str(error.value)


class TestStrategy:
    def test_one_device_has_one_replica(self):
        with pytest.raises(ValueError, match="another number of replicas"):
            strategies.make("default", replicas=2)

    def test_unknown_is_refused(self):
        with pytest.raises(ValueError, match="Received: strategy='many'"):
            strategies.make("many")


class TestPlan:
    # lr(t) = 0.1 * 0.01^(t / 100), T_1 = 100, S = 4 and so T_S = 25.
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.01)

    def plan(self, algorithm, **kwargs):
        return algorithms.plan(
            algorithm,
            self.schedule,
            scales=((0, 4),),
            total_steps=100,
            make_optimizer=keras.optimizers.SGD,
            **kwargs,
        )

    @pytest.mark.parametrize(
        "algorithm, kwargs, iterations, first, last",
        [
            ("identity", {}, 100, 0.1, 0.001),
            ("average", {}, 25, 0.1, 0.001),
            ("adasum", {}, 25, 0.1, 0.001),
            ("linear", {}, 25, 0.4, 0.004),  # 4 lr
            ("sqrt", {}, 25, 0.2, 0.002),  # sqrt(4) lr
            ("lsw", {}, 25, 0.1, 0.004),  # warms up from lr(0) to 4 lr(0)
            ("lsw_plus", {"iterations": 40}, 40, 0.1, 0.004),
        ],
    )
    def test_fixed_rules(self, algorithm, kwargs, iterations, first, last):
        plan = self.plan(algorithm, **kwargs)
        assert plan.iterations == iterations
        plan.optimizer.build([keras.Variable(1.0)])
        rates = []
        for step in (0, iterations):
            plan.optimizer.iterations.assign(step)
            rates.append(float(plan.optimizer.learning_rate))
        np.testing.assert_allclose(rates, [first, last], rtol=1e-5)

    def test_adascale_keeps_the_schedule_and_stops_by_tau(self):
        plan = self.plan("adascale")
        assert plan.iterations == 100  # At most: the gain is at least 1.
        assert plan.callbacks(plan.phases[0])[-1].total_steps == 100
        assert float(plan.optimizer.learning_rate) == pytest.approx(0.1)

    def test_smoothing_is_adascales(self, tmp_path, monkeypatch):
        def adascale(optimizer, *, smoothing):
            raise RuntimeError(f"smoothing={smoothing}")

        monkeypatch.setattr(algorithms.tf_adascale, "AdaScale", adascale)
        with pytest.raises(RuntimeError, match=r"smoothing=0\.5"):
            run(tmp_path, algorithm="adascale", smoothing=0.5)

    def test_adamscale_is_adascale_for_adaptive_optimizers(self):
        optimizer = algorithms.plan(
            "adamscale",
            self.schedule,
            scales=((0, 4), (0.5, 8)),
            total_steps=100,
            make_optimizer=keras.optimizers.AdamW,
        ).optimizer
        assert (optimizer.power, optimizer.preconditioned) == (0.5, True)
        assert isinstance(optimizer.inner_optimizer, keras.optimizers.AdamW)
        assert not self.plan("adascale").optimizer.preconditioned

    def test_adasum_is_around_the_optimizer(self):
        plain = self.plan("average").optimizer
        adasum = self.plan("adasum").optimizer
        assert type(plain) is keras.optimizers.SGD
        assert isinstance(adasum, Adasum)
        assert type(adasum.inner_optimizer) is keras.optimizers.SGD

    def test_lsw_plus_needs_iterations(self):
        with pytest.raises(ValueError, match="it needs one") as error:
            self.plan("lsw_plus")
        assert "Received: algorithm='lsw_plus', iterations=None" in str(
            error.value
        )

    def test_others_refuse_iterations(self):
        with pytest.raises(ValueError, match="Only lsw_plus"):
            self.plan("lsw", iterations=40)

    def test_unknown_is_refused(self):
        with pytest.raises(ValueError, match="Received: algorithm='adam'"):
            self.plan("adam")


class TestFlags:
    def parsed(self, *arguments):
        with flagsaver.flagsaver():
            absl_flags.FLAGS(["train", *arguments])
            return flags.settings()

    def test_defaults_are_those_of_settings(self):
        assert self.parsed() == training.Settings()

    def test_each_setting_is_a_flag(self):
        settings = training.Settings(
            algorithm="lsw_plus",
            scale=8,
            replicas=2,
            microbatches=4,
            total_steps=100,
            iterations=30,
            smoothing=0.5,
            strategy="tpu",
            tpu="local",
            seed=3,
            model_dir="here",
            jit_compile=True,
            steps_per_execution=5,
            mixed_precision="mixed_bfloat16",
            smoke=True,
        )
        parsed = self.parsed(
            *(
                f"--{name}={value}"
                for name, value in settings._asdict().items()
                # Instead of a scale, and of a TPU.
                if name not in ("elastic", "cluster")
            )
        )
        assert parsed == settings
        several = self.parsed("--strategy=multiworker", "--cluster=slurm")
        assert several.cluster == "slurm"
        assert self.parsed("--elastic=0:4,0.5:8").elastic == "0:4,0.5:8"

    @pytest.mark.parametrize(
        "arguments, keywords",
        [([], {}), (["--learning_rate=0.5"], {"learning_rate": 0.5})],
    )
    def test_only_a_rate_that_was_given_overrides(self, arguments, keywords):
        with flagsaver.flagsaver():
            absl_flags.FLAGS(["train", *arguments])
            assert flags.overrides() == keywords

    def test_data_of_a_task(self):
        with flagsaver.flagsaver():
            absl_flags.FLAGS(["train", "--data=tfds", "--split=validation"])
            assert data_flags.values() == {
                "data": "tfds",
                "data_dir": None,
                "split": "validation",
            }
        with pytest.raises(absl_flags.IllegalFlagValueError, match="one of"):
            absl_flags.FLAGS(["train", "--data=mnist"])

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--algorithm=adam"], "should be one of"),
            (["--algorithm=lsw_plus"], "it needs one"),
            (["--iterations=3"], "Only lsw_plus"),
            (["--scale=0"], "positive integer"),
            (["--microbatches=0"], "positive integer"),
            (["--total_steps=-1"], "positive integer"),
            (["--seed=-1"], "non-negative integer"),
            (["--tpu=local"], 'strategy="tpu"'),
            (["--cluster=slurm"], 'strategy="multiworker"'),
            (["--strategy=multiworker", "--cluster=mesos"], "should be one of"),
            (
                ["--scale=6", "--replicas=2", "--microbatches=2"],
                "do not make the scale",
            ),
            (["--mixed_precision=float64"], "should be one of"),
            (["--elastic=0:4,0.5"], "not understood"),
            (["--elastic=0:4,0.5:8", "--scale=4"], "given twice"),
            (
                ["--elastic=0:4,0.5:8", "--algorithm=sqrt"],
                "no form for a scale that changes",
            ),
        ],
    )
    def test_contradictions_are_refused(self, arguments, message):
        with pytest.raises(absl_flags.IllegalFlagValueError, match=message):
            self.parsed(*arguments)


class TestRun:
    @pytest.mark.parametrize(
        "algorithm, iterations",
        [
            ("identity", 4),
            ("linear", 2),  # 4 / 2
            ("sqrt", 2),
            ("lsw", 2),
            ("lsw_plus", 3),
            ("adascale", None),
            ("adamscale", None),
            ("average", 2),
            ("adasum", 2),
        ],
    )
    def test_smoke(self, tmp_path, algorithm, iterations):
        given = {"iterations": 3} if algorithm == "lsw_plus" else {}
        task = one_layer()
        if algorithm == "adamscale":  # SGD has no second moment.
            task = task._replace(optimizer=keras.optimizers.AdamW)
        result = run(
            tmp_path,
            task=task,
            algorithm=algorithm,
            scale=2,
            smoke=True,
            **given,
        )
        if iterations is None:
            assert 2 <= result.iterations <= 4  # A gain is within [1, 2].
            assert 1 <= result.mean_gain <= 2
        else:
            assert result.iterations == iterations
            assert result.mean_gain is None
        assert result.examples == result.iterations * 2 * 16
        assert 0 <= result.value <= 1
        with open(tmp_path / "run" / "result.json") as file:
            assert training.Result(**json.load(file)) == result
        log = rows(tmp_path)
        assert len(log) == result.iterations
        assert {"loss", "accuracy", "learning_rate"} <= set(log[0])
        if iterations is None:
            assert {"gain", "scale_invariant_step"} <= set(log[0])
        assert os.listdir(tmp_path / "run" / "tensorboard" / "train")

    def test_adascale_at_scale_1_is_plain_sgd(self, tmp_path):
        plain = run(tmp_path, "plain", algorithm="identity")
        adascale = run(tmp_path, "adascale", algorithm="adascale")
        assert adascale.mean_gain == 1
        assert adascale.iterations == plain.iterations == 16
        loss = [row["loss"] for row in rows(tmp_path, "plain")]
        assert loss == [row["loss"] for row in rows(tmp_path, "adascale")]

    def test_long_runs_have_about_a_hundred_rows(self, tmp_path):
        # 250 steps, 3 to a row, and a last row of 1.
        result = run(tmp_path, algorithm="identity", total_steps=250)
        assert result.iterations == 250
        assert len(rows(tmp_path)) == 84

    def test_steps_per_execution_takes_the_same_steps(self, tmp_path):
        one = run(tmp_path, "one", algorithm="lsw", scale=2)
        two = run(
            tmp_path, "two", algorithm="lsw", scale=2, steps_per_execution=2
        )
        assert two == one
        assert len(rows(tmp_path, "two")) == 4  # 8 steps, 2 to a row.

    def test_adascale_changes_its_scale_by_tau(self, tmp_path):
        run(tmp_path, elastic="0:2,0.25:4,0.5:2")
        log = rows(tmp_path)
        tau = [float(row["scale_invariant_step"]) for row in log]
        scales = [int(row["scale"]) for row in log]
        # T_SI = 16: S = 4 from the first step that begins at tau >= 4, and 2
        # again from the first at tau >= 8.
        begins = [0.0, *tau[:-1]]
        assert scales == [4 if 4 <= begin < 8 else 2 for begin in begins]
        assert set(scales) == {2, 4}
        assert begins[-1] < 16 <= tau[-1]
        # No step is lost or done twice where the scale changes: a gain is
        # within [1, S], and each base batch is seen once.
        gains = np.diff([0.0, *tau])
        assert all(1 <= gain <= s for gain, s in zip(gains, scales))
        np.testing.assert_array_equal(
            [int(row["base_batches"]) for row in log], np.cumsum(scales)
        )

    def test_lsw_changes_its_scale_by_base_steps(self, tmp_path):
        result = run(tmp_path, algorithm="lsw", elastic="0:2,0.25:4,0.5:2")
        # 16 base steps: 4 / 2, 4 / 4 and 8 / 2 iterations.
        assert result.iterations == 2 + 1 + 4
        assert result.examples == 16 * 16
        assert [int(row["scale"]) for row in rows(tmp_path)] == (
            [2] * 2 + [4] + [2] * 4
        )
        assert result.scale == "0:2,0.25:4,0.5:2"

    def test_scales_that_replicas_cannot_make_are_refused(self, strategy_of):
        settings = training.Settings(elastic="0:2,0.5:3")
        with pytest.raises(ValueError, match="do not make the scale"):
            training._scales(settings, 2)

    def test_test_data_that_are_not_there_are_told_of_first(self, tmp_path):
        def test_dataset(batch_size):
            raise ValueError("not prepared")

        with pytest.raises(ValueError, match="not prepared"):
            run(tmp_path, task=one_layer()._replace(test_dataset=test_dataset))
        assert os.listdir(tmp_path / "run") == ["run.json"]

    def test_a_metric_of_ones_own(self, tmp_path):
        def evaluate(model, dataset):
            sizes = [len(labels) for _, labels in dataset]
            return {"accuracy": 0.5, "batches": len(sizes)}

        task = one_layer()._replace(evaluate=evaluate, metric="batches")
        result = run(tmp_path, task=task, smoke=True)
        assert (result.metric, result.value) == ("batches", 2)

    def test_default_directory_names_the_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        training.run(one_layer(), training.Settings(scale=2, smoke=True))
        assert (
            tmp_path / "out" / "one_layer" / "adascale-S2-seed0" / "log.csv"
        ).exists()

    def test_directory_of_another_run_is_refused(self, tmp_path):
        run(tmp_path, scale=2, smoke=True)
        before = rows(tmp_path)
        with pytest.raises(ValueError, match="holds another run") as error:
            run(tmp_path, scale=2, smoke=True, seed=1)
        assert "'seed': 0" in str(error.value)
        assert "Received: {" in str(error.value)
        assert rows(tmp_path) == before

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"mixed_precision": "float64"}, "precision is not known"),
            ({"tpu": "local"}, "TPU was named"),
            (
                {"cluster": "slurm", "strategy": "mirrored"},
                r"cluster was named that would not be used\. Expected "
                r'strategy="multiworker" with it\. Received: '
                r"cluster='slurm', strategy='mirrored'",
            ),
            ({"replicas": 2}, "another number of replicas"),
            ({"scale": 4, "microbatches": 2}, "do not make the scale"),
            ({"elastic": "0:4,1:8"}, "not understood"),
        ],
    )
    def test_refused_settings_leave_nothing(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **settings)
        assert not os.listdir(tmp_path)


class TestGoingOn:
    @pytest.mark.parametrize("algorithm", ["identity", "adascale"])
    @pytest.mark.parametrize("hook", ["on_epoch_begin", "on_epoch_end"])
    def test_stopped_and_gone_on_is_as_never_stopped(
        self, tmp_path, monkeypatch, algorithm, hook
    ):
        given = {"algorithm": algorithm, "scale": 2}
        whole = run(tmp_path, "whole", **given)

        original = getattr(training.Progress, hook)

        def interrupted(self, epoch, logs=None):
            if epoch == 4:
                # At an epoch's end its row is in the log, but no checkpoint is.
                raise KeyboardInterrupt
            original(self, epoch, logs)

        with monkeypatch.context() as patch:
            patch.setattr(training.Progress, hook, interrupted)
            with pytest.raises(SystemExit, match="same command goes on"):
                run(tmp_path, "stopped", **given)
        assert not (tmp_path / "stopped" / "result.json").exists()
        assert run(tmp_path, "stopped", **given) == whole

        assert rows(tmp_path, "stopped") == rows(tmp_path, "whole")
        expected = saved_values(tmp_path, "whole")
        actual = saved_values(tmp_path, "stopped")
        assert actual.keys() == expected.keys()
        assert any("adascale" in key or "optimizer" in key for key in actual)
        for key, value in expected.items():
            np.testing.assert_array_equal(actual[key], value, err_msg=key)

    def test_a_run_of_a_changing_scale_goes_on_in_its_phase(
        self, tmp_path, monkeypatch
    ):
        given = {"algorithm": "adascale", "elastic": "0:2,0.25:4,0.5:2"}
        whole = run(tmp_path, "whole", **given)
        original = training.Progress.on_epoch_begin

        def interrupted(self, epoch, logs=None):
            if epoch == 4:
                raise KeyboardInterrupt
            original(self, epoch, logs)

        with monkeypatch.context() as patch:
            patch.setattr(training.Progress, "on_epoch_begin", interrupted)
            with pytest.raises(SystemExit, match="same command goes on"):
                run(tmp_path, "stopped", **given)
        assert {row["scale"] for row in rows(tmp_path, "stopped")} == {"2", "4"}
        assert run(tmp_path, "stopped", **given) == whole
        assert rows(tmp_path, "stopped") == rows(tmp_path, "whole")
        expected = saved_values(tmp_path, "whole")
        actual = saved_values(tmp_path, "stopped")
        for key, value in expected.items():
            np.testing.assert_array_equal(actual[key], value, err_msg=key)

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

        task = one_layer()._replace(model=Listed)
        first = run(tmp_path, task=task, scale=2, smoke=True)
        # Goes on with what was saved, which is the end.
        assert run(tmp_path, task=task, scale=2, smoke=True) == first
        assert any(
            value.shape == (64, 10)
            for key, value in saved_values(tmp_path, "run").items()
            if key.startswith("model/")
        )

    def test_finished_runs_train_no_more(self, tmp_path):
        first = run(tmp_path, scale=2, smoke=True)
        log = rows(tmp_path)
        assert run(tmp_path, scale=2, smoke=True) == first
        assert rows(tmp_path) == log

    def terminated(self, monkeypatch, step):
        """Makes a run get SIGTERM after a step."""
        original = training.Progress.on_train_batch_end

        def on_train_batch_end(self, batch, logs=None):
            original(self, batch, logs)
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(
            training.Progress, "on_train_batch_end", on_train_batch_end
        )

    @pytest.mark.parametrize(
        "given",
        [
            {"algorithm": "identity", "total_steps": 250},
            {"algorithm": "adascale", "scale": 2},
            {"algorithm": "adascale", "elastic": "0:2,0.5:4"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("step", [1, 4])
    def test_terminated_and_gone_on_is_as_never_stopped(
        self, tmp_path, monkeypatch, given, step
    ):
        whole = run(tmp_path, "whole", **given)
        with monkeypatch.context() as patch:
            self.terminated(patch, step)
            with pytest.raises(SystemExit) as exit:
                run(tmp_path, "stopped", **given)
        assert exit.value.code == training.STOPPED == 75
        assert not (tmp_path / "stopped" / "result.json").exists()
        assert run(tmp_path, "stopped", **given) == whole
        expected = saved_values(tmp_path, "whole")
        actual = saved_values(tmp_path, "stopped")
        # An epoch more is one that was cut short.
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            if not key.startswith("epoch"):
                np.testing.assert_array_equal(actual[key], value, err_msg=key)
        # The rows are those of the run that was not stopped, and the one that
        # it was stopped in.
        logs = rows(tmp_path, "stopped"), rows(tmp_path, "whole")
        stopped, uninterrupted = ([int(row["step"]) for row in r] for r in logs)
        assert sorted({*uninterrupted, step + 1}) == sorted(
            {*stopped, step + 1}
        )
        assert stopped == sorted(set(stopped))

    def test_another_scale_goes_on(self, tmp_path, monkeypatch):
        for scale, step in ((2, 2), (4, 4), (4, 6)):
            with monkeypatch.context() as patch:
                self.terminated(patch, step - 1)
                with pytest.raises(SystemExit):
                    run(tmp_path, scale=scale, total_steps=40)
            with open(tmp_path / "run" / "run.json") as file:
                assert json.load(file)["scale"] == scale
        result = run(tmp_path, scale=2, total_steps=40)
        # 2 steps at scale 2, 4 at 4, the others at 2.
        assert result.scale == "2-4-2"
        log = rows(tmp_path)
        assert [row["scale"] for row in log[:7]] == [*"2244442"]
        assert [row["base_batches"] for row in log[:5]] == [
            *("2", "4", "8", "12", "16")
        ]
        tau = [float(row["scale_invariant_step"]) for row in log]
        gains = [float(row["gain"]) for row in log]
        np.testing.assert_allclose(np.cumsum(gains), tau, rtol=1e-6)
        assert tau[-1] >= 40 > tau[-2]
        assert result.examples == int(log[-1]["base_batches"]) * 16

    def test_a_full_disk_ends_no_run(self, tmp_path, monkeypatch):
        # Rows are dropped when a process begins, not when a phase does.
        whole = run(tmp_path, "whole", elastic="0:2,0.5:4")
        write = model_directory.write_text

        def refuse_log(path, text):
            if path.endswith("log.csv"):
                raise OSError(errno.ENOSPC, "full")
            write(path, text)

        monkeypatch.setattr(model_directory, "write_text", refuse_log)
        assert run(tmp_path, "full", elastic="0:2,0.5:4") == whole

    def test_other_algorithms_do_not_go_on_at_another_scale(self, tmp_path):
        run(tmp_path, "run", scale=2, algorithm="linear")
        with pytest.raises(ValueError, match="holds another run"):
            run(tmp_path, "run", scale=4, algorithm="linear")


class TestLostWorker:
    def lost(self, monkeypatch):
        def run(task, settings):
            raise tf.errors.UnavailableError(None, None, "Another was lost.")

        monkeypatch.setattr(training, "_run", run)

    def test_stops_and_says_so(self, monkeypatch, capsys):
        self.lost(monkeypatch)
        with pytest.raises(SystemExit) as exit:
            training.run(one_layer(), training.Settings(strategy="multiworker"))
        assert exit.value.code == training.STOPPED
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("one_layer: stopped, for another worker")
        assert "The same command, given to all workers, goes on." in line
        assert line.endswith("Another was lost.")

    def test_is_none_of_one_process(self, monkeypatch):
        self.lost(monkeypatch)
        with pytest.raises(tf.errors.UnavailableError):
            training.run(one_layer(), training.Settings())


class TestRowsLeft:
    @pytest.mark.parametrize(
        "step, interval, last, execution, expected",
        [
            (0, 5, 12, 1, (5, 3)),  # 5 + 5 + 2
            (5, 5, 12, 1, (5, 2)),
            (10, 5, 12, 1, (5, 1)),
            (0, 5, 10, 1, (5, 2)),
            # Amid a row: to its end.
            (3, 5, 12, 1, (2, 1)),
            (9, 5, 12, 1, (1, 1)),
            (11, 5, 12, 1, (4, 1)),
            # A multiple of the steps per execution: 2 rather than 1.
            (3, 4, 12, 2, (2, 1)),
            (1, 6, 12, 3, (6, 1)),
            (2, 4, 12, 2, (2, 1)),
        ],
    )
    def test_by_hand(self, step, interval, last, execution, expected):
        progress = types.SimpleNamespace(
            step=step,
            interval=interval,
            phase=types.SimpleNamespace(last_iteration=last),
        )
        settings = training.Settings(steps_per_execution=execution)
        assert training._rows_left(progress, settings) == expected


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
    def test_adascale_goes_on_at_another_scale(self, tmp_path, changed):
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
            # Others cannot change their scale on the way.
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
            match=r"holds another run\. Expected the flags of that run, \{.*\},"
            r" to go on with it, or another model_dir\. Received: \{.*\}, "
            "model_dir='",
        ):
            self.claim(tmp_path, **{**given, **changed})
        assert self.content(tmp_path) == before

    def test_only_the_chief_writes(self, tmp_path):
        self.claim(tmp_path, write=False)
        assert not (tmp_path / "run").exists()
        self.claim(tmp_path)
        before = self.content(tmp_path)
        self.claim(tmp_path, scale=8, write=False)
        assert self.content(tmp_path) == before
        with pytest.raises(ValueError, match="holds another run"):
            self.claim(tmp_path, seed=1, write=False)


class TestLog:
    WHOLE = "epoch,loss\r\n0,4.5\r\n1,3.5\r\n2,2.5\r\n"

    @pytest.mark.parametrize(
        "log, first_epoch, expected",
        [
            (WHOLE, 3, WHOLE),
            (WHOLE, 2, "epoch,loss\r\n0,4.5\r\n1,3.5\r\n"),
            (WHOLE, 0, ""),
            # The last row was cut off.
            (WHOLE + "3", 3, WHOLE),
            (WHOLE + "3", 4, WHOLE),
            (WHOLE + "3,1.5", 3, WHOLE),
            # So was one amid them: the disk was full for a while.
            ("epoch,loss\r\n0,4.51,3.5\r\n1,3.5\r\n", 2,
             "epoch,loss\r\n1,3.5\r\n"),
            # Even the header was: Keras writes it anew.
            ("epoch,lo", 1, ""),
            ("epoch,loss\r\n", 1, ""),
            ("", 1, ""),
        ],
    )  # fmt: skip
    def test_rows_without_a_checkpoint_are_dropped(
        self, log, first_epoch, expected, tmp_path
    ):
        path = tmp_path / "log.csv"
        path.write_bytes(log.encode())
        model_directory.drop_rows(str(path), first_epoch=first_epoch)
        assert path.read_bytes().decode() == expected
        assert os.listdir(tmp_path) == ["log.csv"]

    def test_none_is_none(self, tmp_path):
        model_directory.drop_rows(str(tmp_path / "log.csv"), first_epoch=0)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize(
        "chief, terminal, expected",
        [
            (True, True, 1),
            (True, False, 2),
            (False, True, 0),
            (False, False, 0),
        ],
    )
    def test_only_the_chief_shows_progress(
        self, chief, terminal, expected, monkeypatch
    ):
        output = types.SimpleNamespace(isatty=lambda: terminal)
        monkeypatch.setattr(sys, "stdout", output)
        assert training._verbosity(chief) == expected


class TestWrite:
    def test_replaces_the_whole(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old and long")
        model_directory.write_text(str(path), "new\r\n")
        assert path.read_bytes() == b"new\r\n"
        assert os.listdir(tmp_path) == ["file"]

    def test_leaves_the_old_file_when_interrupted(self, tmp_path, monkeypatch):
        path = tmp_path / "file"
        path.write_text("old")

        def replace(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(model_directory.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            model_directory.write_text(str(path), "new")
        assert path.read_text() == "old"

    def test_leaves_the_old_file_where_there_is_no_text(self, tmp_path):
        path = tmp_path / "file.json"
        path.write_text("old")
        with pytest.raises(TypeError, match="JSON"):
            model_directory.write_json(str(path), {"value": object()})
        assert path.read_text() == "old"

    def test_leaves_the_old_file_where_the_disk_is_full(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                model_directory.write_text(str(path), "new and longer")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_text() == "old"


class TestCommand:
    def test_tasks_leave_the_devices_to_the_strategy(self, tmp_path):
        # Logical devices cannot be made once anything has run on a device.
        code = """
import importlib, sys
from examples import strategies, study
for benchmark in study.SCALES:
    train = importlib.import_module(f"examples.{benchmark}.train")
    train.task()
    train.task(data="tfds", data_dir=sys.argv[1])
print(strategies.make("mirrored", replicas=2).num_replicas_in_sync)
"""
        process = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.stdout.strip() == "2", process.stderr

    def test_two_devices_and_micro_batches(self, tmp_path):
        process = subprocess.run(
            [
                sys.executable,
                "-m",
                "examples.digits.train",
                "--strategy=mirrored",
                "--replicas=2",
                "--scale=4",
                "--smoke",
                f"--model_dir={tmp_path}",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        # Keras's progress bar, with gain and tau.
        assert "gain: " in process.stdout
        assert "scale_invariant_step: " in process.stdout
        with open(tmp_path / "result.json") as file:
            result = json.load(file)
        assert result["scale"] == 4
        assert 1 <= result["mean_gain"] <= 4

    @pytest.mark.multiworker
    def test_two_workers_see_the_examples_of_one(self, tmp_path):
        addresses = [f"127.0.0.1:{port}" for port in launch.free_ports(2)]
        processes = []
        for index in range(2):
            task = {"type": "worker", "index": index}
            config = {"cluster": {"worker": addresses}, "task": task}
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "examples.digits.train",
                        "--strategy=multiworker",
                        "--scale=4",
                        "--smoke",
                        f"--model_dir={tmp_path / 'two'}",
                    ],
                    cwd=ROOT,
                    env={**os.environ, "TF_CONFIG": json.dumps(config)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
        task = train.task()._replace(name="one")
        run(tmp_path, "one", task=task, scale=4, smoke=True)
        # Each sample of the gradient is the same, so are loss and gain.
        for column in ("loss", "gain", "scale_invariant_step"):
            one, two = (
                [float(row[column]) for row in rows(tmp_path, name)]
                for name in ("one", "two")
            )
            # float32, and other kernels for other numbers of threads.
            np.testing.assert_allclose(two, one, rtol=1e-4, err_msg=column)


class TestDigits:
    def test_splits_are_real_apart_and_stratified(self):
        training_split, test = data.splits()
        assert training_split.images.shape == (1437, 8, 8, 1)
        assert test.images.shape == (360, 8, 8, 1)
        for split in (training_split, test):
            assert split.images.min() == 0
            assert split.images.max() == 1
            shares = np.bincount(split.labels) / len(split.labels)
            np.testing.assert_allclose(shares, 0.1, atol=0.005)
        seen = {image.tobytes() for image in training_split.images}
        assert not any(image.tobytes() in seen for image in test.images)

    def batches(self, count, *args, **kwargs):
        dataset = data.train_dataset(*args, **kwargs)
        return list(dataset.take(count).as_numpy_iterator())

    def test_validation_is_a_part_of_the_training_split(self):
        training_split, _ = data.splits()
        parts = data.splits(validation=True)
        assert [len(part.labels) for part in parts] == [1150, 287]
        images = [image.tobytes() for part in parts for image in part.images]
        assert sorted(images) == sorted(
            image.tobytes() for image in training_split.images
        )

    def test_a_step_holds_the_same_whenever_the_run_began(self):
        # 100 batches of 16 pass the 1437 images once and begin again.
        whole = self.batches(100, 16, seed=1)
        for start in (3, 95):
            part = self.batches(2, 16, seed=1, start=16 * start)
            for expected, actual in zip(whole[start:], part):
                np.testing.assert_array_equal(expected[0], actual[0])
                np.testing.assert_array_equal(expected[1], actual[1])

    def test_a_large_batch_is_as_many_small_ones(self):
        small = self.batches(4, 16, seed=1)
        ((images, labels),) = self.batches(1, 64, seed=1)
        np.testing.assert_array_equal(
            images, np.concatenate([batch[0] for batch in small])
        )
        np.testing.assert_array_equal(
            labels, np.concatenate([batch[1] for batch in small])
        )

    def test_seeds_and_passes_differ(self):
        ((first, _), (second, _)) = self.batches(2, 1437, seed=1)
        ((other, _),) = self.batches(1, 1437, seed=2)
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, other)

    def test_a_pass_has_every_image_once_shifted_at_most_a_pixel(self):
        training_split, _ = data.splits()
        ((images, labels),) = self.batches(1, 1437, seed=1)
        assert (
            np.bincount(labels).tolist()
            == np.bincount(training_split.labels).tolist()
        )
        padded = np.pad(training_split.images, [(0, 0), (1, 1), (1, 1), (0, 0)])
        shifted = {
            padded[i, y : y + 8, x : x + 8].tobytes()
            for i in range(len(padded))
            for y in range(3)
            for x in range(3)
        }
        assert all(image.tobytes() in shifted for image in images)

    def test_model_has_77_thousand_parameters(self):
        model = train.task().model()
        assert 76_000 < model.count_params() < 79_000
        assert model.output_shape == (None, 10)

    def test_only_kernels_decay(self):
        model = train.task().model()
        optimizer = train.task().optimizer(0.1)
        optimizer.build(model.trainable_variables)
        decaying = [
            optimizer._use_weight_decay(v) for v in model.trainable_variables
        ]
        kernels = [v.name == "kernel" for v in model.trainable_variables]
        assert decaying == kernels


class TestDemo:
    def fake(self, monkeypatch):
        """Makes the demo train `one_layer` here; returns its commands."""
        commands = []

        def train_here(command, *, check, env):
            assert check
            assert command[1:3] == ["-m", "examples.digits.train"]
            commands.append(command[3:])
            with flagsaver.flagsaver():
                absl_flags.FLAGS(["train", *command[3:]])
                training.run(one_layer(), flags.settings())

        monkeypatch.setattr(runs.subprocess, "run", train_here)
        return commands

    def test_table_and_picture_of_tiny_runs(
        self, tmp_path, monkeypatch, capsys
    ):
        commands = self.fake(monkeypatch)
        results = demo.main(
            [f"--out={tmp_path}", "--scale=4", "--total_steps=20"]
        )
        assert [run.label for run in results] == [
            "SGD, S = 1",
            "AdaScale, S = 4",
            "LSW, S = 4",
            "LSW+, S = 4",
        ]
        # LSW+ takes as many iterations as AdaScale did, LSW ceil(20 / 4).
        plain, adascale, lsw, lsw_plus = (run.result for run in results)
        assert plain["iterations"] == 20
        assert lsw["iterations"] == 5
        assert lsw_plus["iterations"] == adascale["iterations"]
        assert f"--iterations={adascale['iterations']}" in commands[-1]
        printed = capsys.readouterr().out
        assert runs.table(results) in printed
        with open(tmp_path / "figure1.png", "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"

    def test_a_run_that_fails_ends_the_demo(self, tmp_path):
        # No such scale: the process refuses its flags.
        with pytest.raises(subprocess.CalledProcessError):
            runs.train("digits", str(tmp_path), "--scale=0")

    def test_all_algorithms_have_a_title_and_a_color(self):
        assert runs.TITLES.keys() == set(algorithms.ALGORITHMS)
        assert figures.COLORS.keys() == set(algorithms.ALGORITHMS)

    def test_loss_is_averaged_over_as_many_examples_as_a_large_step(self):
        # Two steps a row at S = 1: at S = 4 a step has the examples of 2 rows.
        run = runs.Run({}, {"base_batches": [2, 4, 6], "loss": [4.0, 2.0, 1.0]})
        assert figures.smoothed_loss(run, 4) == [4.0, 3.0, 1.5]
        assert figures.smoothed_loss(run, 1) == [4.0, 2.0, 1.0]
