"""A program that uses all of tf_adascale; typing_test.py checks its types."""

import keras
import tensorflow as tf

import tf_adascale
from tf_adascale.ops import gain as gain_ops

inputs = keras.Input((8,))
model = tf_adascale.Model(inputs, keras.layers.Dense(1)(inputs))
optimizer = tf_adascale.AdaScale(
    keras.optimizers.SGD(0.1, momentum=0.9), scale=4, estimator="moments"
)
model.compile(
    optimizer=optimizer,
    loss="mse",
    metrics=["mae"],
    steps_per_execution=10,
    jit_compile=True,
    microbatches=2,
)
model.fit(
    tf.data.Dataset.from_tensors((tf.ones((8, 8)), tf.ones((8, 1)))),
    callbacks=[
        tf_adascale.callbacks.StopAtScaleInvariantStep(100),
        tf_adascale.callbacks.ScalingLog(),
        keras.callbacks.CSVLogger("log.csv"),
        tf_adascale.callbacks.Checkpoint("checkpoints", model=model),
    ],
)
progress: float = float(optimizer.scale_invariant_step)
gain: tf.Tensor = optimizer.gain_at(16.0)

adam = keras.optimizers.Adam(tf_adascale.schedules.SqrtScaling(0.1, scale=4))
adamscale = tf_adascale.AdamScale(adam, smoothing=0.9, scale_ema=False)
adasum = tf_adascale.Adasum(adam, combine="gradients", group_size=2)

record: tf_adascale.forecast.Record = tf_adascale.forecast.read("log.csv")
for row in tf_adascale.forecast.rows(record, [1, 4, 16]):
    iterations: float = row.iterations
moments = gain_ops.Moments(tf.constant(1.0), tf.constant(1.0))
ratio: tf.Tensor = tf_adascale.ops.gain.ratio(moments, scale=8)
