"""scikit-learn's two photos, used as backgrounds of the miniatures.

The photos are part of scikit-learn's wheel, so nothing is downloaded.
"""

import numpy as np
from sklearn.datasets import load_sample_image

# Fraction of the training photo that `validation` trains on.
TRAINING_WIDTH = 0.75


def photos(*, validation=False):
    """Returns a photo to train on and a photo to test on.

    Args:
        validation: bool, whether to return the left and the right part of the
            training photo instead.

    Returns:
        Two arrays of uint8 and shape (height, width, 3).

    Example:

    >>> [photo.shape for photo in photos()]
    [(427, 640, 3), (427, 640, 3)]
    """
    training = load_sample_image("china.jpg")
    if not validation:
        return training, load_sample_image("flower.jpg")
    border = round(TRAINING_WIDTH * training.shape[1])
    return training[:, :border], training[:, border:]


def crops(photo, size, *, count, generator):
    """Returns square crops of a photo at random positions.

    Args:
        photo: uint8, shape (height, width, 3).
        size: int, pixels of a side.
        count: int, number of crops.
        generator: `np.random.Generator`.

    Returns:
        uint8, shape (count, size, size, 3).
    """
    height, width, _ = photo.shape
    tops = generator.integers(height - size + 1, size=count)
    lefts = generator.integers(width - size + 1, size=count)
    return np.stack(
        [
            photo[top : top + size, left : left + size]
            for top, left in zip(tops, lefts)
        ]
    )
