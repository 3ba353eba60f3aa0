"""The forecast: closed forms, real and simulated runs, bad logs, the command.

With sigma^2 = a mu^2 throughout, r_S = (a + 1) / (a / S + 1), so that
T(S) = T_SI (a / S + 1) / (a + 1).
"""

import csv
import math
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import tf_adascale
from examples import forecast_study, runs
from tf_adascale import forecast
from tf_adascale.forecast import __main__ as command

ROOT = pathlib.Path(__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"
HEADER = "epoch,gain,gradient_sqnorm,gradient_variance,scale_invariant_step"
SCALES = [1e-20, 0.5, 1, 1.5, 2, 3, 4, 8, 64, 1000, 2**20]


def gain_of(variance, sqnorm, scale):
    return (variance + sqnorm) / (variance / scale + sqnorm)


def constant(variance, sqnorm, *, total=90.0, rows=9):
    """The record of a run whose moments do not change."""
    tau = np.linspace(total / rows, total, rows)
    return forecast.Record(
        tau, *(np.full(rows, float(x)) for x in (variance, sqnorm))
    )


def simulated(scale, *, total, moments, rows_every=1):
    """Runs AdaScale, step by step, on moments that are functions of tau.

    Returns:
        Record, and the number of steps.
    """
    variance = sqnorm = tau = 0.0
    steps, rows = 0, []
    while tau < total:
        steps += 1
        weight = max(min(scale / 1000, 1), 1 / steps)
        new_variance, new_sqnorm = moments(tau / total)
        variance += weight * (new_variance - variance)
        sqnorm += weight * (new_sqnorm - sqnorm)
        gain = gain_of(variance, sqnorm, scale)
        tau += gain
        if steps % rows_every == 0 or tau >= total:
            rows.append((tau, variance, sqnorm))
    return forecast.Record(*np.array(rows).T), steps


def decaying(progress):
    """Moments of a training whose noise scale grows from 10 to 550."""
    return 5 * math.exp(-2 * progress), 0.5 * math.exp(-6 * progress)


class TestIterations:
    @pytest.mark.parametrize("scale", SCALES)
    def test_as_much_signal_as_noise(self, scale):
        # r_S = 2 / (1/S + 1) = 2 S / (S + 1).
        expected = 90 * (scale + 1) / (2 * scale)
        result = forecast.iterations(constant(1, 1), scale)
        assert result == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("scale", SCALES)
    def test_nothing_but_noise(self, scale):
        result = forecast.iterations(constant(3, 0), scale)
        assert result == pytest.approx(90 / scale, rel=1e-9)

    @pytest.mark.parametrize("scale", SCALES)
    def test_nothing_but_signal(self, scale):
        result = forecast.iterations(constant(0, 3), scale)
        assert result == pytest.approx(90, rel=1e-9)

    @pytest.mark.parametrize("total_steps", [0.5, 10, 15, 90, 1234.5])
    def test_total_steps_cut_or_prolong_the_record(self, total_steps):
        # r_4 = 2 / (1/4 + 1) = 8/5 everywhere.
        result = forecast.iterations(constant(1, 1), 4, total_steps=total_steps)
        assert result == pytest.approx(total_steps / 1.6, rel=1e-9)

    def test_total_steps_cut_where_the_gain_changes(self):
        record, _ = simulated(4, total=100, moments=decaying)
        tau = record.scale_invariant_step
        # Ten steps, and a third of the eleventh.
        total_steps = tau[9] + (tau[10] - tau[9]) / 3
        result = forecast.iterations(record, 4, total_steps=total_steps)
        assert result == pytest.approx(10 + 1 / 3, rel=1e-9)

    def test_beyond_the_record_the_last_gain_holds(self):
        record, _ = simulated(4, total=100, moments=decaying)
        until_now = forecast.iterations(record, 4)
        last = record.scale_invariant_step[-1]
        result = forecast.iterations(record, 4, total_steps=last + 30)
        gain = gain_of(*(average[-1] for average in record[1:]), 4)
        expected = until_now + 30 / gain
        assert result == pytest.approx(expected, rel=1e-9)

    def test_record_is_left_as_it_is(self):
        record = constant(1, 1)
        before = [column.copy() for column in record]
        forecast.iterations(record, 8, total_steps=50)
        np.testing.assert_array_equal(record, before)

    @pytest.mark.parametrize(
        "scale, rows_every, tolerance",
        # A row stands for the stretch that ends with it, so rows of several
        # steps are as coarse as the gain changes within them.
        [
            (2, 1, 1e-9),
            (4, 1, 1e-9),
            (400, 1, 1e-9),
            (2000, 1, 1e-9),
            (2, 7, 3e-3),
            (16, 7, 0.01),
        ],
    )
    def test_own_scale(self, scale, rows_every, tolerance):
        record, steps = simulated(
            scale, total=5000, moments=decaying, rows_every=rows_every
        )
        result = forecast.iterations(record, scale)
        assert result == pytest.approx(steps, rel=tolerance)

    def test_varying_moments(self):
        # r_4: 2 / (1/4 + 1) = 8/5, then 3 / (2/4 + 1) = 2, then 1.
        record = forecast.Record(
            *np.array([[8.0, 20.0, 25.0], [1, 2, 0], [1, 1, 1]])
        )
        # 8 / 1.6 + 12 / 2 + 5 / 1.
        assert forecast.iterations(record, 4) == pytest.approx(16, rel=1e-12)

    @pytest.mark.parametrize("scale", [2, 8, 64])
    def test_equals_the_integral_of_moments_that_change(self, scale):
        tau = np.linspace(0.1, 1500, 15000)
        record = forecast.Record(
            tau, *np.array([decaying(t / 1500) for t in tau]).T
        )
        middle = [decaying(t / 1500) for t in np.arange(0.05, 1500, 0.1)]
        expected = sum(0.1 / gain_of(*moments, scale) for moments in middle)
        result = forecast.iterations(record, scale)
        assert result == pytest.approx(expected, rel=1e-4)

    def test_negative_averages(self):
        # As estimator="ratio" has them; r_S = S where sigma^2/S + mu^2 < 0:
        # 5/16 - 2 < 0.
        record = constant(5, -2)
        assert forecast.iterations(record, 16) == pytest.approx(90 / 16)

    @pytest.mark.parametrize("scale", [0, -1, math.nan, math.inf, "4", None])
    def test_refuses_a_scale_that_is_none(self, scale):
        message = (
            "The scale is out of range. Expected a finite number > 0. "
            f"Received: scale={scale!r}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            forecast.iterations(constant(1, 1), scale)
        with pytest.raises(ValueError, match=re.escape(message)):
            forecast.rows(constant(1, 1), [1, scale])

    @pytest.mark.parametrize("total_steps", [0, -5, math.nan, "many"])
    def test_refuses_a_total_that_is_none(self, total_steps):
        with pytest.raises(
            ValueError,
            match="The total_steps is out of range",
        ):
            forecast.iterations(constant(1, 1), 4, total_steps=total_steps)


class TestProperties:
    scales = st.floats(1, 1e6)
    moments = st.floats(1e-6, 1e6)

    @given(st.floats(0.01, 1e6), st.floats(0.01, 1e6), moments, moments)
    def test_more_hardware_is_never_slower_nor_more_efficient(
        self, one, other, variance, sqnorm
    ):
        less, more = sorted([one, other])
        at_less, at_more = forecast.rows(
            constant(variance, sqnorm), [less, more]
        )
        rounding = 1 + 1e-9
        assert at_more.iterations <= at_less.iterations * rounding
        assert at_more.efficiency <= at_less.efficiency * rounding

    @given(
        st.lists(
            st.tuples(
                st.floats(0, 1e3),
                st.floats(-1e3, 1e3),
                st.floats(-1e3, 1e3),
            ),
            min_size=1,
            max_size=20,
        ),
        scales,
    )
    def test_gains_are_between_one_and_the_scale(self, steps, scale):
        # Whatever the averages are, also those that no run would have.
        record = forecast.Record(*np.array(steps).T)
        tau = np.cumsum(record.scale_invariant_step + 0.1)
        record = record._replace(scale_invariant_step=tau)
        result = forecast.iterations(record, scale)
        assert tau[-1] / scale * (1 - 1e-9) <= result
        assert result <= tau[-1] * (1 + 1e-9)

    @given(moments, moments, st.floats(1e-3, 0.999))
    def test_scale_at_efficiency_is_the_inverse(
        self, variance, sqnorm, efficiency
    ):
        # r / S = (a + 1) / (a + S) = e at S = (a + 1) / e - a.
        ratio = variance / sqnorm
        expected = (ratio + 1) / efficiency - ratio
        result = forecast.scale_at_efficiency(
            constant(variance, sqnorm), efficiency
        )
        # Bisected to 1e-9 in log2 S; (a + 1) / e - a cancels digits.
        rounding = 1e-9 * max(1, ratio)
        assert result == pytest.approx(expected, rel=1e-8, abs=rounding)


class TestRows:
    def test_speedup_and_efficiency(self):
        # T(4) = 90 * 5/8 = 56.25: speed-up 1.6, efficiency 0.4.
        (row,) = forecast.rows(constant(1, 1), [4])
        assert row == pytest.approx((4.0, 56.25, 1.6, 0.4), rel=1e-9)

    def test_speedup_is_over_one_whatever_the_scales(self):
        rows = forecast.rows(constant(1, 1), [8, 2], total_steps=900)
        assert [row.scale for row in rows] == [8.0, 2.0]
        # 900 * 9/16 and 900 * 3/4.
        steps = [row.iterations for row in rows]
        assert steps == pytest.approx([506.25, 675.0], rel=1e-9)
        speedups = [row.speedup for row in rows]
        assert speedups == pytest.approx([16 / 9, 4 / 3], rel=1e-9)

    def test_refuses_no_scale(self):
        with pytest.raises(
            ValueError,
            match="There is no scale to forecast. Expected one or more numbers "
            r"> 0. Received: scales=\[\]",
        ):
            forecast.rows(constant(1, 1), [])


class TestScaleAtEfficiency:
    def test_one_is_the_base_batch(self):
        assert forecast.scale_at_efficiency(constant(1, 1), 1) == pytest.approx(
            1, rel=1e-8
        )

    @pytest.mark.parametrize("efficiency", [1e-3, 0.5, 1])
    def test_nothing_but_noise_is_efficient_at_every_scale(self, efficiency):
        record = constant(3, 0)
        assert forecast.scale_at_efficiency(record, efficiency) == math.inf

    @pytest.mark.parametrize("efficiency", [0, -1, 1.1, math.nan, "half"])
    def test_refuses_what_is_no_efficiency(self, efficiency):
        with pytest.raises(
            ValueError,
            match=r"The efficiency is out of range. Expected a finite number > "
            "0 and <= 1. Received: efficiency=",
        ):
            forecast.scale_at_efficiency(constant(1, 1), efficiency)


def fitted(microbatches, steps, path=None, *, estimator="moments"):
    """Fits a tiny model, one row of the log per step; returns the History."""
    inputs = keras.Input((3,))
    model = tf_adascale.Model(inputs, keras.layers.Dense(1)(inputs))
    optimizer = tf_adascale.AdaScale(
        keras.optimizers.SGD(0.05), estimator=estimator
    )
    model.compile(optimizer, "mse", microbatches=microbatches)
    random = np.random.default_rng(0)
    x = random.normal(size=(8 * microbatches * steps, 3)).astype("float32")
    y = x.sum(1, keepdims=True) + random.normal(size=(len(x), 1))
    dataset = tf.data.Dataset.from_tensor_slices((x, y.astype("float32")))
    callbacks = [tf_adascale.callbacks.ScalingLog()]
    if path is not None:
        callbacks.append(keras.callbacks.CSVLogger(str(path)))
    return model.fit(
        dataset.batch(8 * microbatches).repeat(),
        epochs=steps,
        steps_per_epoch=1,
        callbacks=callbacks,
        shuffle=False,
        verbose=0,
    )


class TestRecordedRuns:
    @pytest.mark.parametrize("estimator", ["moments", "ratio"])
    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_steps_taken_at_the_own_scale(self, microbatches, estimator):
        history = fitted(microbatches, 30, estimator=estimator)
        record = forecast.read(history)
        # The gain changes: no constant would do.
        assert np.ptp(history.history["gain"]) > 0.1
        # The gains are float32; to "ratio", its epsilon of 1e-6 is not known.
        result = forecast.iterations(record, microbatches)
        assert result == pytest.approx(30, rel=1e-6)

    def test_csv_and_history_agree(self, tmp_path):
        path = tmp_path / "log.csv"
        history = fitted(2, 5, path)
        from_history = forecast.read(history)
        for log in (history.history, path, str(path)):
            np.testing.assert_allclose(
                forecast.read(log), from_history, rtol=1e-12
            )
        assert from_history.scale_invariant_step.shape == (5,)
        assert {column.dtype for column in from_history} == {np.dtype("f8")}
        for name in forecast.Record._fields:
            np.testing.assert_array_equal(
                getattr(from_history, name), history.history[name]
            )


def written(tmp_path, *lines):
    path = tmp_path / "run.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


def refused(log, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        forecast.read(log)
    assert re.search(r"\. Expected .*\. Received: ", str(raised.value))


class TestRead:
    def test_other_columns_may_hold_anything(self, tmp_path):
        path = written(
            tmp_path,
            f"{HEADER},noise_scale,val_loss",
            "0,1.5,1.0,3.0,1.5,inf,NA",
            "1,1.5,0.5,2.0,3.0,nan,",
        )
        record = forecast.read(path)
        np.testing.assert_array_equal(
            record, [[1.5, 3.0], [3.0, 2.0], [1.0, 0.5]]
        )

    def test_rows_without_a_step_are_left_out(self, tmp_path):
        # As under mixed_float16, whose first steps are often skipped.
        path = written(
            tmp_path,
            HEADER,
            "0,1,0,0,0",
            "1,1.5,1,3,1.5",
            "2,1.5,1,3,1.5",
            "3,1.5,1,3,3",
        )
        assert forecast.read(path).scale_invariant_step.tolist() == [1.5, 3]

    def test_order_of_the_columns_does_not_matter(self, tmp_path):
        path = written(
            tmp_path,
            "scale_invariant_step,gradient_variance,gain,gradient_sqnorm",
            "1.5,3.0,1.2,1.0",
        )
        assert [float(column[0]) for column in forecast.read(path)] == [
            1.5,
            3.0,
            1.0,
        ]

    @pytest.mark.parametrize(
        "lines, message",
        [
            ([], "The log lacks the columns"),
            (["epoch,loss", "0,0.5"], "run.csv, line 1: columns=['epoch', "),
            ([HEADER], "The log holds no measurement"),
            (
                [HEADER, "0,1.5,1,3,1.5", "1,1.5,1"],
                "A line is not whole. Expected 5 fields",
            ),
            ([HEADER, "0,1.5,1,3,1.5", "1,1.5,1"], "run.csv, line 3: fields="),
            ([HEADER, "0,1.5,1,3,1.5,7"], "run.csv, line 2: fields="),
            (
                [HEADER, "0,1.5,1,nan,1.5"],
                "run.csv, line 2: gradient_variance='nan'",
            ),
            (
                [HEADER, "0,1.5,1,3,1.5", "", "1,1.5,inf,3,3"],
                "run.csv, line 4: gradient_sqnorm='inf'",
            ),
            (
                [HEADER, "0,1.5,1,3,"],
                "run.csv, line 2: scale_invariant_step=''",
            ),
            ([HEADER, HEADER], "run.csv, line 2: scale_invariant_step='sca"),
            (
                [HEADER, "0,1.5,1,3,1.5", "1,1.5,1,3,1.25"],
                "run.csv, line 3: scale_invariant_step=1.25 after 1.5",
            ),
            (
                [HEADER, "0,1.5,1,3,-1.5"],
                "run.csv, line 2: scale_invariant_step=-1.5 after 0",
            ),
            # A run of one sample per step at S = 1 measures nothing.
            ([HEADER, "0,1,0,0,1", "1,1,0,0,2"], "holds no measurement"),
        ],
    )
    def test_bad_files(self, tmp_path, lines, message):
        refused(written(tmp_path, *lines), message)

    def test_empty_file(self, tmp_path):
        path = tmp_path / "run.csv"
        path.touch()
        refused(path, "run.csv, line 1: columns=[]")

    def test_what_is_no_text(self, tmp_path):
        path = tmp_path / "run.csv"
        path.write_bytes(PNG + bytes(range(256)))
        refused(path, "The log lacks the columns")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            forecast.read(tmp_path / "run.csv")

    @pytest.mark.parametrize(
        "changed, message",
        [
            (
                {"gradient_variance": [3.0, math.nan]},
                "history, row 2: gradient",
            ),
            ({"gradient_sqnorm": [1.0, None]}, "history, row 2: gradient_sqn"),
            ({"scale_invariant_step": [3.0, 1.5]}, "history, row 2: scale_"),
            (
                {"gradient_sqnorm": [1.5]},
                "Received: rows={'scale_invariant_step': 2, ",
            ),
            (
                {"gradient_variance": [0, 0], "gradient_sqnorm": [0, 0]},
                "no meas",
            ),
        ],
    )
    def test_bad_histories(self, changed, message):
        good = {
            "scale_invariant_step": [1.5, 3.0],
            "gradient_variance": [3.0, 2.0],
            "gradient_sqnorm": [1.0, 0.5],
        }
        assert len(forecast.read(good).gradient_sqnorm) == 2
        refused({**good, **changed}, message)

    def test_history_without_the_columns(self):
        refused({"loss": [1.0]}, "history: columns=['loss']")


ROWS = forecast.rows(constant(1, 1), [1, 2, 4, 1024])


class TestOutputs:
    def test_table(self):
        # 90 (S + 1) / (2 S); 2 / (S + 1).
        assert forecast.table(ROWS).splitlines() == [
            "   S  iterations  speed-up  efficiency",
            "   1        90.0      1.00     100.0 %",
            "   2        67.5      1.33      66.7 %",
            "   4        56.2      1.60      40.0 %",
            "1024        45.0      2.00       0.2 %",
        ]

    def test_csv_is_read_back(self, tmp_path):
        path = tmp_path / "forecast.csv"
        forecast.write_csv(ROWS, path)
        with path.open(newline="") as file:
            header, *lines = csv.reader(file)
        assert tuple(header) == forecast.Row._fields
        assert [tuple(map(float, line)) for line in lines] == ROWS

    @pytest.mark.parametrize("number", [1, 2, 50])
    def test_picture(self, tmp_path, number):
        path = tmp_path / "forecast.png"
        scales = np.geomspace(1, 1024, number)
        forecast.picture(forecast.rows(constant(9, 1), scales), path)
        content = path.read_bytes()
        assert content[:8] == PNG
        # Big-endian, in the first chunk: 7 by 5 inches at 150 dpi.
        size = [int.from_bytes(content[at : at + 4]) for at in (16, 20)]
        assert size == [1050, 750]
        assert 10_000 < len(content) < 200_000

    def test_order_of_the_rows_does_not_show(self, tmp_path):
        for name, rows in (("one", ROWS), ("other", ROWS[::-1])):
            forecast.picture(rows, tmp_path / name)
        one, other = sorted(tmp_path.iterdir())
        assert one.read_bytes() == other.read_bytes()

    def test_picture_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"tf_adascale\[plot\]"):
            forecast.picture(ROWS, tmp_path / "forecast.png")
        assert not list(tmp_path.iterdir())


class TestParsedScales:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("4", [4]),
            ("0.5, 3,1e3", [0.5, 3, 1000]),
            ("1,2,4,...,1024", [2**k for k in range(11)]),
            ("1,2,...,1024", [2**k for k in range(11)]),
            ("8,4,...,0.5", [8, 4, 2, 1, 0.5]),
            ("10,20,...,50", [10, 20, 30, 40, 50]),
            ("2,4,6,...,10", [2, 4, 6, 8, 10]),
            ("1,10,...,100,200,...,400", [1, 10, 100, 200, 400]),
            # Thirds are not exact; the end is as it was written.
            ("0.1,0.3,...,8.1", [0.1, 0.3, 0.9, 2.7, 8.1]),
            ("1,2,4,...,1000", None),
            ("1,...,8", None),
            ("...,8", None),
            ("1,2,...", None),
            ("1,1,...,8", None),
            ("1,2,...,2", None),
            ("1,2,...,-8", None),
            ("2,4,...,nan", None),
            ("0,1,...,3", None),
            ("1,1.0000001,...,1e6", None),
            ("1,two", None),
            ("", None),
            ("1,,2", None),
        ],
    )
    def test_ellipsis(self, text, expected):
        if expected is None:
            with pytest.raises(
                ValueError,
                match=r"The scales cannot be read. Expected numbers, and \.\.\."
                f".*Received: scales={re.escape(repr(text))}",
            ):
                command.parsed_scales(text)
        else:
            result = command.parsed_scales(text)
            assert result == pytest.approx(expected, rel=1e-12)
            assert result[-1] == expected[-1]


@pytest.fixture
def log(tmp_path):
    return written(tmp_path, HEADER, "0,1.6,1,1,40", "1,1.6,1,1,90")


class TestCommand:
    def test_prints_the_table(self, log, capsys):
        rows = command.main([f"--log={log}", "--scales=1,2,4,...,1024"])
        assert [row.scale for row in rows] == [2.0**k for k in range(11)]
        printed = capsys.readouterr().out
        # 2 / (S + 1) = 1/2 at S = 3.
        assert printed == (
            f"{forecast.table(rows)}\n\n"
            "The efficiency falls under 50 % at S = 3.0.\n"
        )
        assert rows[2].iterations == pytest.approx(56.25, rel=1e-9)

    def test_options(self, log, tmp_path, capsys):
        rows = command.main(
            [
                f"--log={log}",
                "--scales=4",
                "--total_steps=900",
                "--efficiency=0.25",
                f"--csv={tmp_path / 'out.csv'}",
                f"--picture={tmp_path / 'out.png'}",
            ]
        )
        assert rows[0].iterations == pytest.approx(562.5, rel=1e-9)
        # 2 / (S + 1) = 1/4 at S = 7.
        assert "under 25 % at S = 7.0." in capsys.readouterr().out
        assert (tmp_path / "out.csv").read_text().startswith("scale,iter")
        assert (tmp_path / "out.png").read_bytes()[:8] == PNG

    def test_efficient_at_every_scale(self, tmp_path, capsys):
        log = written(tmp_path, HEADER, "0,4,0,1,40")
        command.main([f"--log={log}"])
        printed = capsys.readouterr().out
        assert "The efficiency is 50 % or more at every scale." in printed

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "required: --log"),
            (["--scales=1,x"], "The scales cannot be read"),
            (["--scales=0"], "The scale is out of range"),
            (["--total_steps=-1"], "The total_steps is out of range"),
            (["--efficiency=2"], "The efficiency is out of range"),
            (["--log=missing.csv"], "No such file or directory: 'missing.csv'"),
            (["--log=."], "Is a directory: '.'"),
            (["--csv=missing/out.csv"], "No such file or directory"),
        ],
    )
    def test_bad_arguments(self, arguments, message, log, capsys):
        if arguments and not arguments[0].startswith("--log"):
            arguments = [f"--log={log}", *arguments]
        with pytest.raises(SystemExit) as raised:
            command.main(arguments)
        assert raised.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error

    def test_a_file_without_lines(self, tmp_path, capsys):
        path = tmp_path / "run.csv"
        path.write_text("x" * 200_000)  # More than a field of a CSV may have.
        with pytest.raises(SystemExit, match="2"):
            command.main([f"--log={path}"])
        assert "field larger than" in capsys.readouterr().err

    def test_a_process(self, log):
        done = self.process(f"--log={log}", "--scales=1,4")
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout.splitlines()[2] == "4        56.2      1.60      40.0 %"
        )
        # runpy warns of a module that its package has imported before.
        assert "Warning" not in done.stderr

    def test_a_process_with_a_bad_log(self, tmp_path):
        log = written(tmp_path, HEADER, "0,1.6,1,1,40", "1,1.6,nan,1,90")
        done = self.process(f"--log={log}")
        assert done.returncode == 2
        assert not done.stdout
        assert f"{log}, line 3: gradient_sqnorm='nan'" in done.stderr
        assert "Traceback" not in done.stderr

    def process(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "tf_adascale.forecast", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )


class TestStudy:
    @pytest.fixture
    def trained(self, monkeypatch):
        """Makes runs up; returns the list of those asked for."""
        asked = []

        def train(benchmark, model_dir, *arguments):
            asked.append((benchmark, *arguments))
            flags = dict(
                flag.removeprefix("--").split("=") for flag in arguments
            )
            scale = int(flags["scale"])
            log = constant(1, 1)._asdict()
            # Five more than T(S) = 90 (S + 1) / (2 S).
            steps = round(45 * (scale + 1) / scale) + 5
            return runs.Run({"iterations": steps}, log)

        monkeypatch.setattr(runs, "train", train)
        return asked

    def test_forecasts_and_compares(self, tmp_path, trained, capsys):
        rows = forecast_study.main([f"--out={tmp_path}", "--seeds=0,1"])
        assert [row[:3] for row in rows] == [
            (benchmark, scale, seed)
            for benchmark in ("digits", "transformer")
            for seed in (0, 1)
            for scale in (8, 16, 32)
        ]
        # 45 * 9/8 = 50.625 beside 51 + 5.
        assert rows[0].forecast == pytest.approx(50.625, rel=1e-9)
        assert rows[0].iterations == 56
        assert rows[0].error == pytest.approx(50.625 / 56 - 1, rel=1e-9)
        assert forecast_study.table(rows) in capsys.readouterr().out
        # Averages as at S = sqrt(8 * 32) = 16.
        recorded = ("digits", "--algorithm=adascale", "--scale=4", "--seed=1")
        assert (*recorded, "--smoothing=0.984") in trained
        assert len(trained) == 2 * 2 * 4

    def test_goes_on_where_it_was_stopped(self, tmp_path, trained, monkeypatch):
        done = tmp_path / "digits" / "S4-seed0-smoothing=0.984"
        done.mkdir(parents=True)
        (done / "result.json").touch()
        run = runs.Run({"iterations": 56}, constant(9, 1)._asdict())
        monkeypatch.setattr(
            runs, "read", lambda path: {str(done): run}[str(path)]
        )
        rows = forecast_study.main(
            ["digits", f"--out={tmp_path}", "--scales=16"]
        )
        assert [asked[2] for asked in trained] == ["--scale=16"]
        # 90 (9/16 + 1) / (9 + 1), by what was read.
        assert rows[0].forecast == pytest.approx(14.0625, rel=1e-9)

    def test_unknown_benchmarks_are_refused(self, trained, capsys):
        with pytest.raises(SystemExit):
            forecast_study.main(["cifar11"])
        assert "no such benchmark: cifar11" in capsys.readouterr().err
        assert not trained
