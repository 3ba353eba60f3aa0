"""One worker of `multiworker_test.py`: trains and prints what came out.

    TF_CONFIG=... python multiworker_worker.py

The last line of its output is a JSON object.
"""

import hashlib
import json
import os
import types

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf

import tf_adascale
from examples.common import training
from examples.common.data import streams

BATCH = 16
STEPS = 25
EPOCHS = 2
STEPS_PER_EXECUTION = 4
# Examples of a pass, their base batch, and the scale.
EXAMPLES, BASE_BATCH, SCALE = 96, 4, 4


def data():
    """Returns inputs and targets of `STEPS` batches."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCH * STEPS, 3)).astype("float32")
    y = generator.normal(size=(BATCH * STEPS, 1)).astype("float32")
    return x, x.sum(axis=1, keepdims=True) + y


def dataset(x, y):
    """Returns batches; of each, every one of two workers takes one half."""
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


def compiled(model_class, optimizer, **arguments):
    """Returns a model with the same weights in every process."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    model = model_class(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer, "mse", metrics=["mae"], **arguments)
    return model


def adascale():
    """Returns the optimizer that both sides of the comparison use."""
    return tf_adascale.AdaScale(keras.optimizers.SGD(0.05, momentum=0.9))


def train(strategy, x, y):
    """Returns a model fitted under a strategy, and what there is to compare."""
    with strategy.scope():
        model = compiled(
            tf_adascale.Model,
            adascale(),
            steps_per_execution=STEPS_PER_EXECUTION,
        )
    batches = dataset(x, y)
    history = model.fit(
        batches,
        epochs=EPOCHS,
        validation_data=batches,
        verbose=0,
        shuffle=False,
    )
    return model, {
        "history": history.history,
        "evaluated": model.evaluate(batches, verbose=0, return_dict=True),
        "weights": [weight.ravel().tolist() for weight in model.get_weights()],
        "iterations": int(tf.convert_to_tensor(model.optimizer.iterations)),
        "gain": float(model.optimizer.gain),
        "scale_invariant_step": float(model.optimizer.scale_invariant_step),
    }


def adasum(strategy, x, y, combine):
    """Returns the weights after all steps by Adasum, and their digest."""
    with strategy.scope():
        inner = keras.optimizers.SGD(0.05, momentum=0.9)
        model = compiled(
            tf_adascale.Model, tf_adascale.Adasum(inner, combine=combine)
        )
    model.fit(dataset(x, y), epochs=EPOCHS, verbose=0, shuffle=False)
    weights = [weight.tolist() for weight in model.get_weights()]
    return {"weights": weights, "digest": digest(model)}


def stock_error(strategy, x, y):
    """Returns the error of stock Keras's `fit`, or None if there is none."""
    with strategy.scope():
        model = compiled(keras.Model, "sgd")
    try:
        model.fit(dataset(x, y), verbose=0, shuffle=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def counted_dataset(batch_size, *, seed, start, share):
    """Returns batches of the numbers of examples."""
    stream = streams.indices(EXAMPLES, seed=seed, start=start, share=share)
    return streams.batches(stream, batch_size, share=share).map(
        lambda index, draws: (index, index)
    )


def examples_of_a_pass(strategy):
    """Returns what this worker's replicas see in one pass, step by step."""
    name = types.SimpleNamespace
    distributed = training._distributed(
        name(base_batch=BASE_BATCH, train_dataset=counted_dataset),
        name(base_batches=0, phase=name(scale=SCALE)),
        training.Settings(),
        name(distribute_strategy=strategy),
    )
    iterator = iter(distributed)
    return [
        [
            part.numpy().tolist()
            for part in strategy.experimental_local_results(next(iterator)[0])
        ]
        for _ in range(EXAMPLES // (SCALE * BASE_BATCH))
    ]


def digest(model):
    """Returns a hash of the weights, to the bit."""
    sha = hashlib.sha256()
    for weight in model.get_weights():
        sha.update(weight.tobytes())
    return sha.hexdigest()


def main():
    """Runs one worker."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    x, y = data()
    stock = stock_error(strategy, x, y)
    model, result = train(strategy, x, y)
    result = {**result, "stock": stock, "digest": digest(model)}
    predicted = model.predict(dataset(x, y), verbose=0)
    result["predicted"] = predicted.ravel().tolist()
    result["examples"] = examples_of_a_pass(strategy)
    result["adasum"] = {
        combine: adasum(strategy, x, y, combine)
        for combine in ("updates", "gradients")
    }
    # One infinite input, which only the first worker sees.
    x[0] = np.inf
    model.fit(dataset(x[:BATCH], y[:BATCH]), verbose=0, shuffle=False)
    result["skipped"] = int(model.optimizer.skipped_steps)
    result["digest_after_skipping"] = digest(model)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
