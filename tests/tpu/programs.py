"""Train steps for TPUs, each a network and an optimizer, and their StableHLO.

A program and its baseline differ in the optimizer only.
"""

import functools

import keras
import tensorflow as tf

import tf_adascale
from tests.tpu import lowering, stub_strategy

BATCH = 8  # Per replica.
_CLASSES = 10
_IMAGE = (16, 16, 3)
_WORDS, _LENGTH = 50, 5


def image_model(optimizer, *, microbatches=1, policy="float32"):
    """Returns a compiled model with convolutions, statistics and dropout."""
    layer = functools.partial(keras.layers.Conv2D, padding="same", dtype=policy)
    x = inputs = keras.Input(_IMAGE)
    for filters in (16, 32):
        x = layer(filters, 3)(x)
        x = keras.layers.BatchNormalization(dtype=policy)(x)
        x = keras.layers.MaxPooling2D(dtype=policy)(keras.ops.relu(x))
    x = keras.layers.GlobalAveragePooling2D(dtype=policy)(x)
    x = keras.layers.Dropout(0.1, dtype=policy)(x)
    x = keras.layers.Dense(_CLASSES, dtype=policy)(x)
    outputs = keras.layers.Activation("linear", dtype="float32")(x)
    model = tf_adascale.Model(inputs, outputs)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        microbatches=microbatches,
    )
    optimizer.build(model.trainable_variables)
    return model


def image_batch():
    """Returns what a replica of an `image_model` gets per step."""
    return tf.TensorSpec((BATCH, *_IMAGE)), tf.TensorSpec((BATCH,), tf.int32)


def _fit(make_optimizer, **kwargs):
    """Returns the step of `Model.fit`, and its batch."""
    model = image_model(make_optimizer(), **kwargs)
    return lambda *batch: model.train_step(batch), image_batch()


def _loop(make_optimizer):
    """Returns the step of a custom training loop, on words, and its batch."""
    words = keras.Input((_LENGTH,), dtype="int32")
    x = keras.layers.Embedding(_WORDS, 8)(words)
    x = keras.layers.Dense(_CLASSES)(keras.layers.Flatten()(x))
    model = keras.Model(words, x)
    variables = model.trainable_variables
    optimizer = make_optimizer()
    optimizer.build(variables)
    loss_of_each = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="sum"
    )

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of_each(y, model(x, training=True))
            loss /= BATCH * stub_strategy.CORES
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables))
        return loss

    return step, (
        tf.TensorSpec((BATCH, _LENGTH), tf.int32),
        tf.TensorSpec((BATCH,), tf.int32),
    )


def sgd():
    """Returns SGD with momentum and a schedule."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.9)
    return keras.optimizers.SGD(schedule, momentum=0.9)


def adascale():
    """Returns AdaScale around `sgd()`."""
    return tf_adascale.AdaScale(sgd())


def _differenced():
    return tf_adascale.AdaScale(sgd(), estimator="differenced")


def _adamw():
    return keras.optimizers.AdamW(0.001)


def _adamscale():
    return tf_adascale.AdamScale(_adamw())


def _adasum(combine):
    return lambda: tf_adascale.Adasum(sgd(), combine=combine)


# Functions without arguments that return a step and a replica's batch. Call
# them in the scope of the strategy.
PROGRAMS = {
    "SGD": lambda: _fit(sgd),
    "AdaScale": lambda: _fit(adascale),
    "SGD, 4 micro-batches": lambda: _fit(sgd, microbatches=4),
    "AdaScale, 4 micro-batches": lambda: _fit(adascale, microbatches=4),
    "SGD, bfloat16": lambda: _fit(sgd, policy="mixed_bfloat16"),
    "AdaScale, bfloat16": lambda: _fit(adascale, policy="mixed_bfloat16"),
    "SGD, own loop": lambda: _loop(sgd),
    "AdaScale, own loop": lambda: _loop(adascale),
    "AdaScale, differenced": lambda: _fit(_differenced),
    "AdamW": lambda: _fit(_adamw),
    "AdamScale": lambda: _fit(_adamscale),
    "Adasum of updates": lambda: _fit(_adasum("updates")),
    "Adasum of gradients": lambda: _fit(_adasum("gradients")),
    "Adasum, 4 micro-batches": lambda: _fit(_adasum("updates"), microbatches=4),
}

# The baseline of each program.
BASELINES = {
    "AdaScale": "SGD",
    "AdaScale, 4 micro-batches": "SGD, 4 micro-batches",
    "AdaScale, bfloat16": "SGD, bfloat16",
    "AdaScale, own loop": "SGD, own loop",
    "AdaScale, differenced": "SGD",
    "AdamScale": "AdamW",
}


@functools.cache
def stablehlo(name):
    """Returns the StableHLO of a program of `PROGRAMS`."""
    strategy = stub_strategy.tpu_strategy()
    with strategy.scope():
        step, batch = PROGRAMS[name]()
    return lowering.lowered(strategy, step, *batch)
