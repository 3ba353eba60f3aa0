"""One worker of `order_test`: takes steps by Adasum, and prints a JSON object.

TF_CONFIG=... python order_worker.py
"""

import json

import keras
import numpy as np
import tensorflow as tf

import tf_adascale

COUNT = 12

# A tensor of few entries, which Adasum combines from all rows, and larger ones.
SHAPES = ((3,), (7, 11), (50,))

CASES = [
    {"combine": combine, "group_size": size}
    for combine in ("updates", "gradients")
    for size in (1, 3)
]


def gradients():
    """Returns a gradient of each worker for each of `SHAPES`."""
    random = np.random.default_rng(0)
    return [
        random.normal(size=(COUNT, *shape)).astype("float32")
        for shape in SHAPES
    ]


def next_values():
    """Returns each worker's next value of a variable to be overwritten."""
    return np.random.default_rng(1).normal(size=(COUNT, 4)).astype("float32")


def combined(strategy, **arguments):
    """Returns the Adasum of the gradients, and the overwritten variable."""
    with strategy.scope():
        weights = [keras.Variable(np.zeros(shape)) for shape in SHAPES]
        overwritten = keras.Variable(np.zeros(4))
        overwritten.overwrite_with_gradient = True
        # At rate 1 the update is the gradient.
        optimizer = tf_adascale.Adasum(keras.optimizers.SGD(1.0), **arguments)
        optimizer.build([*weights, overwritten])

    @tf.function
    def step():
        def replica():
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            # Keras divides the loss by the number of replicas.
            own = [tf.constant(g)[index] / COUNT for g in gradients()]
            optimizer.apply([*own, tf.constant(next_values())[index]])

        strategy.run(replica)

    step()
    return {
        "combined": [(-weight.numpy()).tolist() for weight in weights],
        "overwritten": overwritten.numpy().tolist(),
    }


def main():
    """Runs one worker."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    results = [combined(strategy, **arguments) for arguments in CASES]
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
