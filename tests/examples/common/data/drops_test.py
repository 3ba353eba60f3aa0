"""Unusable records are dropped, counted and logged."""

import numpy as np
import pytest
import tensorflow as tf

from examples.common.data import drops


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_filtered_counts_and_logs(caplog):
    # Of 0 ... 11, the multiples of 3 are dropped.
    kept = drops.filtered(
        tf.data.Dataset.range(12), lambda x: x % 3 != 0, "threes"
    )
    assert [int(x) for x in kept] == [1, 2, 4, 5, 7, 8, 10, 11]
    # 0, 3 and 9 are the 1st, 2nd and 4th, logged with the next good one.
    assert messages(caplog) == [
        "1 of 2 records dropped so far: threes",
        "2 of 5 records dropped so far: threes",
        "4 of 11 records dropped so far: threes",
    ]


def test_filtered_takes_tuples_and_nested_elements():
    dataset = tf.data.Dataset.from_tensor_slices(
        ({"a": [1, 2, 3]}, [10, 20, 30])
    )
    kept = drops.filtered(dataset, lambda x, y: x["a"] + y != 22, "22")
    assert [int(y) for _, y in kept] == [10, 30]


def test_mapped_drops_images_that_do_not_decode(caplog):
    image = np.arange(12, dtype="uint8").reshape(2, 2, 3)
    good = tf.io.encode_png(image).numpy()
    dataset = tf.data.Dataset.from_tensor_slices(
        ([good, good[:-20], b"", good, b"no image", good], range(6))
    )
    decoded = list(
        drops.mapped(
            dataset,
            lambda png, label: (tf.io.decode_png(png), label),
            "image does not decode",
        )
    )
    assert [int(label) for _, label in decoded] == [0, 3, 5]
    for pixels, _ in decoded:
        np.testing.assert_array_equal(pixels, image)
    assert messages(caplog) == [
        "2 of 4 records dropped so far: image does not decode"
    ]


def test_the_length_is_unknown():
    dataset = tf.data.Dataset.range(12)
    kept = drops.mapped(dataset, tf.identity, "none")
    assert kept.cardinality() == tf.data.UNKNOWN_CARDINALITY


def test_nothing_dropped_nothing_logged(caplog):
    kept = drops.filtered(tf.data.Dataset.range(5), lambda x: x >= 0, "none")
    assert len(list(kept)) == 5
    assert not messages(caplog)


def test_a_dataset_of_bad_records_is_an_error():
    kept = drops.filtered(
        tf.data.Dataset.range(1000), lambda x: x % 3 == 0, "thirds"
    )
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        list(kept)
    assert "`dropped` must be at most half of `seen`" in str(error.value)
    assert "reason='thirds'" in str(error.value)


def test_each_pass_counts_anew():
    kept = drops.filtered(tf.data.Dataset.range(300), lambda x: x % 2 == 0, "")
    # 150 of 300 records are not more than half, in every pass.
    for _ in range(3):
        assert len(list(kept)) == 150


def test_counted_adds_up_what_each_element_lost(caplog):
    # 1, 0 and 2 of 2, 3 and 4 boxes are dropped.
    dataset = tf.data.Dataset.from_tensor_slices(
        (["a", "b", "c"], np.array([1, 0, 2]), np.array([2, 3, 4]))
    )
    kept = drops.counted(dataset, "no area")
    assert [value.numpy() for value in kept] == [b"a", b"b", b"c"]
    assert messages(caplog) == [
        "1 of 2 records dropped so far: no area",
        "3 of 9 records dropped so far: no area",
    ]
