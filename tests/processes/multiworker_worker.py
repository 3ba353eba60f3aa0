"""One worker of `multiworker_test`: trains, and prints a JSON object.

TF_CONFIG=... python multiworker_worker.py
"""

import hashlib
import json
import types

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
    """Returns batches. Every worker takes one half of each."""
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


def compiled(optimizer, *, model_class=tf_adascale.Model, **arguments):
    """Returns a model with the same weights in every process."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    model = model_class(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer, "mse", metrics=["mae"], **arguments)
    return model


def sgd():
    """Returns the inner optimizer."""
    return keras.optimizers.SGD(0.05, momentum=0.9)


def train(strategy):
    """Returns a model fitted by AdaScale, and values to compare."""
    with strategy.scope():
        model = compiled(
            tf_adascale.AdaScale(sgd()),
            steps_per_execution=STEPS_PER_EXECUTION,
        )
    batches = dataset(*data())
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
        "weights": weights(model),
        "iterations": int(tf.convert_to_tensor(model.optimizer.iterations)),
        "gain": float(model.optimizer.gain),
        "scale_invariant_step": float(model.optimizer.scale_invariant_step),
    }


def adasum(strategy, combine):
    """Returns weights and digest of a model fitted by Adasum."""
    with strategy.scope():
        model = compiled(tf_adascale.Adasum(sgd(), combine=combine))
    model.fit(dataset(*data()), epochs=EPOCHS, verbose=0, shuffle=False)
    return {"weights": weights(model), "digest": digest(model)}


def stock_error(strategy):
    """Returns the error of stock Keras's `fit`, or None if there is none."""
    with strategy.scope():
        model = compiled("sgd", model_class=keras.Model)
    try:
        model.fit(dataset(*data()), verbose=0, shuffle=False)
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
    """Returns the numbers of the examples that this worker sees in one pass."""
    name = types.SimpleNamespace
    distributed = training._distributed(
        name(base_batch=BASE_BATCH, train_dataset=counted_dataset),
        name(base_batches=0, phase=name(scale=SCALE)),
        training.Settings(),
        name(distribute_strategy=strategy),
    )
    iterator = iter(distributed)
    steps = [next(iterator)[0] for _ in range(EXAMPLES // (SCALE * BASE_BATCH))]
    return [
        int(number)
        for step in steps
        for part in strategy.experimental_local_results(step)
        for number in part
    ]


def weights(model):
    """Returns the weights as lists."""
    return [weight.tolist() for weight in model.get_weights()]


def digest(model):
    """Returns a hash of the weights, to the bit."""
    return hashlib.sha256(
        b"".join(weight.tobytes() for weight in model.get_weights())
    ).hexdigest()


def main():
    """Runs one worker."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    stock = stock_error(strategy)
    model, result = train(strategy)
    x, y = data()
    result |= {
        "stock": stock,
        "digest": digest(model),
        "predicted": model.predict(dataset(x, y), verbose=0).tolist(),
        "examples": examples_of_a_pass(strategy),
        "adasum": {
            combine: adasum(strategy, combine)
            for combine in ("updates", "gradients")
        },
    }
    # One infinite input, for the first worker only.
    x[0] = np.inf
    model.fit(dataset(x[:BATCH], y[:BATCH]), verbose=0, shuffle=False)
    result["skipped"] = int(model.optimizer.skipped_steps)
    result["digest_after_skipping"] = digest(model)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
