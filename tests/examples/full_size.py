"""Full-size models in little time, for tests of what does not need training."""

import contextlib
import unittest.mock

import keras
import numpy as np
import tensorflow as tf


@contextlib.contextmanager
def not_initialized():
    """Makes weights zeros that would be drawn at random."""

    def zeros(self, shape, dtype=None, **_):
        return keras.ops.zeros(shape, dtype)

    with contextlib.ExitStack() as stack:
        for name in ("VarianceScaling", "Orthogonal", "RandomNormal"):
            initializer = getattr(keras.initializers, name)
            patch = unittest.mock.patch.object(initializer, "__call__", zeros)
            stack.enter_context(patch)
        yield


def model_that_fits(task, batch_size):
    """Returns the model of a task, after one batch of its data.

    The batch must have a finite loss, and every weight a gradient. Calling a
    model once is much faster than tracing its training step.
    """
    x, y = next(iter(task.train_dataset(batch_size, seed=0)))
    with not_initialized():
        model = task.model()
    with tf.GradientTape() as tape:
        loss = task.loss()(y, model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    assert np.isfinite(loss)
    assert all(gradient is not None for gradient in gradients)
    return model
