"""Backgrounds: crops of two photos, which have no pixel in common."""

import numpy as np

from examples.common.data import photos


def test_validation_divides_the_training_photo():
    training, test = photos.photos()
    left, right = photos.photos(validation=True)
    np.testing.assert_array_equal(np.hstack([left, right]), training)
    assert not np.array_equal(training, test)
    assert left.shape == (427, 480, 3)


def test_crops_are_parts_of_the_photo():
    photo = np.arange(6 * 5 * 3, dtype="uint8").reshape(6, 5, 3)
    crops = photos.crops(photo, 4, count=50, generator=np.random.default_rng(0))
    assert crops.shape == (50, 4, 4, 3)
    parts = {
        photo[top : top + 4, left : left + 4].tobytes()
        for top in range(3)
        for left in range(2)
    }
    # All 6 places, corners included, and nothing else.
    assert {crop.tobytes() for crop in crops} == parts
