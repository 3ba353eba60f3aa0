"""scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels.

The images are part of scikit-learn's wheel, so nothing is downloaded.
"""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

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
    """Returns the training and the test `Split`, the same at every call.

    Both splits have the same proportion of each digit.

    Args:
        validation: bool, whether to return two parts of the training split
            instead: one to train on, one to choose hyper-parameters on.

    Example:

    >>> train, test = splits()
    >>> train.images.shape, test.images.shape
    ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    digits = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    train, test = _hold_out(
        Split(images, digits.target.astype("int32")), TEST_SIZE
    )
    return _hold_out(train, VALIDATION_SIZE) if validation else (train, test)


def _hold_out(split, size):
    """Returns a split without `size` of its examples, and these examples."""
    images, held_out_images, labels, held_out_labels = train_test_split(
        split.images,
        split.labels,
        test_size=size,
        random_state=SPLIT_SEED,
        stratify=split.labels,
    )
    return Split(images, labels), Split(held_out_images, held_out_labels)
