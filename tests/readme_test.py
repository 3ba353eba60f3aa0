"""Tests that the README's example runs, on less data."""

import pathlib
import re

import keras
import tensorflow as tf

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_stops_by_progress(strategy_of):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    steps = 6
    code = code.replace("39_100", str(steps))
    code = code.replace("tf.distribute.MirroredStrategy()", "strategy_of(2)")
    code = code.replace(
        "with strategy.scope():", "with strategy.scope():\n    make_model()"
    )
    names = {"strategy_of": strategy_of}

    def make_model():
        inputs = keras.Input((3,))
        names.update(inputs=inputs, outputs=keras.layers.Dense(2)(inputs))

    x = tf.random.stateless_normal((16, 3), seed=(1, 2))
    y = tf.cast(x[:, 0] > 0, "int32")
    names.update(
        make_model=make_model,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        dataset=tf.data.Dataset.from_tensor_slices((x, y)).batch(8),
    )
    exec(compile(code, str(README), "exec"), names)
    optimizer = names["model"].optimizer
    # 2 replicas of 2 micro-batches: tau grows by 1 to 4 per step, and the
    # callback looks after each.
    assert optimizer.scale == 4
    tau = float(optimizer.scale_invariant_step)
    assert steps <= tau < steps + float(optimizer.gain)
    assert int(optimizer.iterations.numpy()) < steps
