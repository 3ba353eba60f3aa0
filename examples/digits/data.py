"""scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels.

They come inside scikit-learn's wheel, so nothing is downloaded.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SIZE = 360
SPLIT_SEED = 0


class Split(NamedTuple):
    """Images and labels of one split.

    Attributes:
        images: float32, shape (size, 8, 8, 1), in [0, 1].
        labels: int32, shape (size,), in [0, 10).
    """

    images: np.ndarray
    labels: np.ndarray


def splits():
    """Returns the training and the test `Split`: the same at every call.

    Both hold every digit in the same proportion.

    Example:

    >>> train, test = splits()
    >>> train.images.shape, test.images.shape
    ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    labels = digits.target.astype("int32")
    train_images, test_images, train_labels, test_labels = train_test_split(
        images,
        labels,
        test_size=TEST_SIZE,
        random_state=SPLIT_SEED,
        stratify=labels,
    )
    return Split(train_images, train_labels), Split(test_images, test_labels)


def train_dataset(batch_size, *, seed, start_step=0):
    """Returns endless shuffled batches of the training split.

    Every image is shifted by at most one pixel each way. Order and shifts of a
    pass are drawn from (seed, number of the pass), and batches run on from one
    pass into the next. So batch t depends on nothing but the arguments and t, a
    run can go on from any step, and S batches of size B hold the same examples
    as one batch of size S B.

    Args:
        batch_size: int >= 1, examples per batch.
        seed: int, of order and shifts.
        start_step: int >= 0, number of batches to leave out.

    Returns:
        `tf.data.Dataset` of (images, labels), see `Split`.
    """
    train, _ = splits()
    size = len(train.labels)
    images = _shifted(train.images)
    labels = np.tile(train.labels, len(images) // size)
    first_pass, first_example = divmod(start_step * batch_size, size)

    def indices(number):
        """Returns one pass: every image once, shifted one way or another."""
        seeds = tf.stack([tf.constant(seed, tf.int64), number])
        order = tf.random.experimental.stateless_shuffle(tf.range(size), seeds)
        shifts = tf.random.stateless_uniform(
            [size], seeds, maxval=len(images) // size, dtype=tf.int32
        )
        return tf.data.Dataset.from_tensor_slices(order + size * shifts)

    def examples(indices):
        return tf.gather(images, indices), tf.gather(labels, indices)

    return (
        tf.data.Dataset.range(first_pass, tf.int64.max)
        .flat_map(indices)
        .skip(first_example)
        .batch(batch_size, drop_remainder=True)
        .map(examples)
        .prefetch(tf.data.AUTOTUNE)
    )


def test_dataset(batch_size):
    """Returns the test split, in order, in batches of at most `batch_size`."""
    _, test = splits()
    return tf.data.Dataset.from_tensor_slices(tuple(test)).batch(batch_size)


def _shifted(images):
    """Returns the images shifted by at most one pixel, all 9 ways."""
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return np.concatenate(
        [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    )
