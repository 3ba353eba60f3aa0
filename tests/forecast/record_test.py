"""Records: logs are read, and files that are not logs are refused."""

import math

import keras
import numpy as np
import pytest

import tf_adascale
from tests import harness
from tf_adascale import forecast

HEADER = "epoch,gain,gradient_sqnorm,gradient_variance,scale_invariant_step"


@pytest.mark.parametrize(
    "microbatches, estimator", [(2, "ratio"), (4, "moments")]
)
def test_a_recorded_run_took_as_many_steps_at_its_own_scale(
    microbatches, estimator, tmp_path
):
    path, steps = tmp_path / "log.csv", 20
    model = harness.dense_model(tf_adascale.Model)
    optimizer = tf_adascale.AdaScale(
        keras.optimizers.SGD(0.05), estimator=estimator
    )
    model.compile(optimizer, "mse", microbatches=microbatches)
    size = 8 * microbatches
    dataset = harness.batches(*harness.regression(size * steps), size)
    # One row of the log per step.
    history = harness.fit(
        model,
        dataset.repeat(),
        epochs=steps,
        steps_per_epoch=1,
        callbacks=[
            tf_adascale.callbacks.ScalingLog(),
            keras.callbacks.CSVLogger(str(path)),
        ],
    )
    # The gain changes, so a constant would not fit.
    assert np.ptp(history.history["gain"]) > 0.1
    record = forecast.read(history)
    # The gains are float32, and the log lacks the epsilon of "ratio", 1e-6.
    result = forecast.iterations(record, microbatches)
    assert result == pytest.approx(steps, rel=1e-6)
    for name, column in record._asdict().items():
        assert column.dtype == np.float64
        np.testing.assert_array_equal(column, history.history[name])
    for log in (history.history, path, str(path)):
        np.testing.assert_allclose(forecast.read(log), record, rtol=1e-12)


def written(tmp_path, *lines):
    path = tmp_path / "run.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


class TestFiles:
    def test_other_columns_may_hold_anything_in_any_order(self, tmp_path):
        path = written(
            tmp_path,
            "scale_invariant_step,noise_scale,gradient_variance,val_loss,"
            "gradient_sqnorm",
            "1.5,inf,3.0,NA,1.0",
            "3.0,nan,2.0,,0.5",
        )
        np.testing.assert_array_equal(
            forecast.read(path), [[1.5, 3.0], [3.0, 2.0], [1.0, 0.5]]
        )

    def test_rows_without_a_step_are_left_out(self, tmp_path):
        # Under mixed_float16 the first steps are often skipped.
        path = written(
            tmp_path,
            HEADER,
            "0,1,0,0,0",
            "1,1.5,1,3,1.5",
            "2,1.5,1,3,1.5",
            "3,1.5,1,3,3",
        )
        assert forecast.read(path).scale_invariant_step.tolist() == [1.5, 3]

    @pytest.mark.parametrize(
        "lines, received",
        [
            ([], "run.csv, line 1: columns=["),
            (["epoch,loss", "0,0.5"], "run.csv, line 1: columns=['epoch', "),
            ([HEADER], "run.csv', with 0 rows"),
            # One sample per step at S = 1: no moments.
            ([HEADER, "0,1,0,0,1", "1,1,0,0,2"], "run.csv', with 2 rows"),
            ([HEADER, "0,1.5,1,3,1.5", "1,1.5,1"], "line 3: fields=['1', "),
            ([HEADER, "0,1.5,1,3,1.5,7"], "run.csv, line 2: fields="),
            ([HEADER, "0,1.5,1,nan,1.5"], "line 2: gradient_variance='nan'"),
            (
                [HEADER, "0,1.5,1,3,1.5", "", "1,1.5,inf,3,3"],
                "run.csv, line 4: gradient_sqnorm='inf'",
            ),
            ([HEADER, "0,1.5,1,3,"], "line 2: scale_invariant_step=''"),
            ([HEADER, HEADER], "line 2: scale_invariant_step='scale_inv"),
            (
                [HEADER, "0,1.5,1,3,1.5", "1,1.5,1,3,1.25"],
                "run.csv, line 3: scale_invariant_step=1.25 after 1.5",
            ),
            (
                [HEADER, "0,1.5,1,3,-1.5"],
                "run.csv, line 2: scale_invariant_step=-1.5 after 0",
            ),
        ],
    )
    def test_bad_ones_are_refused(self, tmp_path, lines, received):
        with harness.refused("`log` must ") as raised:
            forecast.read(written(tmp_path, *lines))
        assert received in str(raised.value).split("Received: ")[1]

    def test_what_is_no_text_is_refused(self, tmp_path):
        path = tmp_path / "run.csv"
        path.write_bytes(bytes(range(256)))
        with harness.refused("`log` must have the columns"):
            forecast.read(path)

    def test_what_is_no_file_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            forecast.read(tmp_path / "run.csv")


@pytest.mark.parametrize(
    "changed, received",
    [
        ({"gradient_variance": [3.0, math.nan]}, "history, row 2: gradient_v"),
        ({"gradient_sqnorm": [1.0, None]}, "history, row 2: gradient_sqnorm"),
        ({"scale_invariant_step": [3.0, 1.5]}, "history, row 2: scale_inv"),
        ({"gradient_sqnorm": [1.5]}, "rows={'scale_invariant_step': 2, "),
        (
            {"gradient_variance": [0, 0], "gradient_sqnorm": [0, 0]},
            "log='history', with 2 rows",
        ),
    ],
)
def test_bad_histories_are_refused(changed, received):
    good = {
        "scale_invariant_step": [1.5, 3.0],
        "gradient_variance": [3.0, 2.0],
        "gradient_sqnorm": [1.0, 0.5],
    }
    assert len(forecast.read(good).gradient_sqnorm) == 2
    with harness.refused("`log` must ", received):
        forecast.read({**good, **changed})
    with harness.refused("`log` must ", "history: columns=['loss']"):
        forecast.read({"loss": [1.0]})
