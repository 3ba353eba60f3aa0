"""scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels.

They come inside scikit-learn's wheel, so nothing is downloaded.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples import streams

TEST_SIZE = 360
VALIDATION_SIZE = 287
SPLIT_SEED = 0


class Split(NamedTuple):
    """Images and labels of one split.

    Attributes:
        images: float32, shape (size, 8, 8, 1), in [0, 1].
        labels: int32, shape (size,), in [0, 10).
    """

    images: np.ndarray
    labels: np.ndarray


def splits(*, validation=False):
    """Returns the training and the test `Split`: the same at every call.

    Both hold every digit in the same proportion.

    Args:
        validation: bool, whether to return two parts of the training split
            instead: to train on, and to choose hyper-parameters by.

    Example:

    >>> train, test = splits()
    >>> train.images.shape, test.images.shape
    ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    train, test = _halves(
        Split(images, digits.target.astype("int32")), TEST_SIZE
    )
    return _halves(train, VALIDATION_SIZE) if validation else (train, test)


def train_dataset(
    batch_size, *, seed, start=0, share=streams.Share(), validation=False
):
    """Returns endless shuffled batches of the training split.

    Every image is shifted by at most one pixel each way.

    Args:
        batch_size: int >= 1, examples per batch.
        seed: int, of order and shifts.
        start: int >= 0, number of examples to leave out.
        share: `streams.Share`, the part of each batch to return.
        validation: bool, see `splits`.

    Returns:
        `tf.data.Dataset` of (images, labels), see `Split`.
    """
    train, _ = splits(validation=validation)
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


def test_dataset(batch_size, *, validation=False):  # noqa: PT028 (no test)
    """Returns the test split, in order, in batches of at most `batch_size`.

    Args:
        batch_size: int >= 1.
        validation: bool, see `splits`.
    """
    _, test = splits(validation=validation)
    return tf.data.Dataset.from_tensor_slices(tuple(test)).batch(batch_size)


def _shifted(images):
    """Returns the images shifted by at most one pixel, all 9 ways."""
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return np.concatenate(
        [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    )


def _halves(split, size):
    """Returns a split without `size` of its examples, and these."""
    images, held_out_images, labels, held_out_labels = train_test_split(
        split.images,
        split.labels,
        test_size=size,
        random_state=SPLIT_SEED,
        stratify=split.labels,
    )
    return Split(images, labels), Split(held_out_images, held_out_labels)
