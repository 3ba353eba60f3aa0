"""The splits of scikit-learn's digits."""

import numpy as np
import pytest

from examples.common.data import digits


def images_of(split):
    return {image.tobytes() for image in split.images}


@pytest.mark.parametrize("validation", [False, True])
def test_splits_have_no_image_in_common(validation):
    first, second = digits.splits(validation=validation)
    assert not images_of(first) & images_of(second)


def test_splits_are_stratified():
    train, test = digits.splits()
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    for split in (train, test):
        assert split.images.min() == 0
        assert split.images.max() == 1
        shares = np.bincount(split.labels) / len(split.labels)
        np.testing.assert_allclose(shares, 0.1, atol=0.005)


def test_validation_is_part_of_the_training_split():
    train, _ = digits.splits()
    parts = digits.splits(validation=True)
    assert [len(part.labels) for part in parts] == [1150, 287]
    images = [image.tobytes() for part in parts for image in part.images]
    assert sorted(images) == sorted(image.tobytes() for image in train.images)
