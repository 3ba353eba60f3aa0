"""Batches of scikit-learn's digits, shifted at random by at most a pixel."""

import numpy as np
import tensorflow as tf

from examples.common.data import digits, streams


def train_dataset(
    batch_size, *, seed, start=0, share=streams.Share(), validation=False
):
    """Returns endless shuffled batches of the training split.

    Each image is shifted by at most one pixel in each direction.

    Args:
        batch_size: int >= 1, examples per batch of all workers.
        seed: int, of the order and the shifts.
        start: int >= 0, number of examples to skip.
        share: `streams.Share`, the part of each batch to read.
        validation: bool, see `digits.splits`.

    Returns:
        `tf.data.Dataset` of (images, labels), see `digits.Split`.
    """
    train, _ = digits.splits(validation=validation)
    size = len(train.labels)
    images = _shifted(train.images)
    shifts = len(images) // size

    def examples(indices, draws):
        shift = tf.cast(draws[:, 0] * shifts, tf.int64)
        return (
            tf.gather(images, indices + size * shift),
            tf.gather(train.labels, indices),
        )

    stream = streams.indices(size, seed=seed, start=start, share=share, draws=1)
    return (
        streams.batches(stream, batch_size, share=share)
        .map(examples)
        .prefetch(tf.data.AUTOTUNE)
    )


def test_dataset(batch_size, *, validation=False):  # noqa: PT028 (not a test)
    """Returns the test split, in order, in batches of at most `batch_size`.

    Args:
        batch_size: int >= 1.
        validation: bool, see `digits.splits`.
    """
    _, test = digits.splits(validation=validation)
    return tf.data.Dataset.from_tensor_slices(tuple(test)).batch(batch_size)


def _shifted(images):
    """Returns the images shifted by at most one pixel, in all 9 ways."""
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return np.concatenate(
        [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    )
