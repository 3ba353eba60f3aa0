"""Tests that the README's examples run, on less data."""

import pathlib
import re

import keras
import tensorflow as tf

import tf_adascale
from tf_adascale import forecast

README = pathlib.Path(__file__).parents[1] / "README.md"
TRAINING, RECORDING, SURVIVING = re.findall(
    r"```python\n(.*?)```", README.read_text(), re.DOTALL
)


def _dataset():
    x = tf.random.stateless_normal((16, 3), seed=(1, 2))
    y = tf.cast(x[:, 0] > 0, "int32")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)


def _loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def test_the_example_runs_and_stops_by_progress(strategy_of):
    steps = 6
    code = TRAINING.replace("39_100", str(steps))
    code = code.replace("tf.distribute.MirroredStrategy()", "strategy_of(2)")
    code = code.replace(
        "with strategy.scope():", "with strategy.scope():\n    make_model()"
    )
    names = {"strategy_of": strategy_of}

    def make_model():
        inputs = keras.Input((3,))
        names.update(inputs=inputs, outputs=keras.layers.Dense(2)(inputs))

    names.update(make_model=make_model, loss=_loss(), dataset=_dataset())
    exec(compile(code, str(README), "exec"), names)
    optimizer = names["model"].optimizer
    # 2 replicas of 2 micro-batches: tau grows by 1 to 4 per step, and the
    # callback looks after each.
    assert optimizer.scale == 4
    tau = float(optimizer.scale_invariant_step)
    assert steps <= tau < steps + float(optimizer.gain)
    assert int(optimizer.iterations.numpy()) < steps


def test_the_recorded_run_is_forecast_from(tmp_path):
    path = tmp_path / "run.csv"
    inputs = keras.Input((3,))
    names = {
        "keras": keras,
        "tf_adascale": tf_adascale,
        "sgd": keras.optimizers.SGD(0.1),
        "loss": _loss(),
        "model": tf_adascale.Model(inputs, keras.layers.Dense(2)(inputs)),
        "dataset": _dataset().repeat(),
        "stop": tf_adascale.callbacks.StopAtScaleInvariantStep(20),
    }
    # A row per step.
    code = RECORDING.replace("epochs=1000", "epochs=1000, steps_per_epoch=1")
    code = code.replace('"run.csv"', repr(str(path)))
    exec(compile(code, str(README), "exec"), names)
    optimizer = names["optimizer"]
    assert optimizer.get_config()["smoothing"] == 1 - 16 / 1000
    record = forecast.read(path)
    steps = forecast.iterations(record, 4)
    # The gains are float32.
    assert abs(steps - int(optimizer.iterations.numpy())) < 1e-4


def test_the_run_goes_on_in_the_next_process(tmp_path):
    code = SURVIVING.replace('"run"', repr(str(tmp_path)))
    code = code.replace("steps_per_epoch=100", "steps_per_epoch=3")
    steps = 0
    for total_steps in (8, 16):
        inputs = keras.Input((3,))
        model = tf_adascale.Model(inputs, keras.layers.Dense(2)(inputs))
        sgd = keras.optimizers.SGD(0.1)
        optimizer = tf_adascale.AdaScale(sgd)
        model.compile(optimizer, loss=_loss(), microbatches=2)
        names = {
            "tf_adascale": tf_adascale,
            "model": model,
            "dataset": _dataset(),
            "stop": tf_adascale.callbacks.StopAtScaleInvariantStep(total_steps),
        }
        exec(compile(code, str(README), "exec"), names)
        tau = float(optimizer.scale_invariant_step)
        assert total_steps <= tau < total_steps + 2
        assert names["checkpoint"].step > steps
        steps = names["checkpoint"].step
        assert int(optimizer.iterations.numpy()) == steps
