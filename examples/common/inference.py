"""Inference on one device, for metrics that Keras lacks."""

import tensorflow as tf


def predictions(model, dataset):
    """Yields each batch of a dataset with the model's outputs for it.

    `Model.predict` distributes a batch over the replicas. This runs on one
    device, and every worker gets all batches: use it for metrics that cannot be
    computed in parts.

    Args:
        model: Keras model.
        dataset: finite `tf.data.Dataset` of tuples whose first entry is the
            model's input.
    """
    call = tf.function(
        lambda x: model(x, training=False),
        autograph=False,
        reduce_retracing=True,
    )
    for batch in dataset:
        yield batch, call(batch[0])
