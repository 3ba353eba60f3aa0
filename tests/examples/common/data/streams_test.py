"""Endless streams of examples, which depend only on the position."""

import numpy as np
import pytest
import tensorflow as tf

from examples.common.data import streams
from tests import harness


def of_indices(count, size=7, **given):
    given = {"seed": 3, "draws": 2, **given}
    return list(streams.indices(size, **given).take(count).as_numpy_iterator())


def of_records(count, size=50, **given):
    given = {"seed": 3, "draws": 2, "buffer_size": 10, **given}
    dataset = tf.data.Dataset.range(size)
    stream = streams.records(dataset, size, **given)
    return list(stream.take(count).as_numpy_iterator())


@pytest.mark.parametrize("stream, size", [(of_indices, 7), (of_records, 50)])
class TestStreams:
    def test_each_pass_has_all_in_its_own_order(self, stream, size):
        numbers = [int(number) for number, _ in stream(3 * size)]
        passes = np.reshape(numbers, (3, size))
        for one_pass in passes:
            assert sorted(one_pass) == list(range(size))
        assert len({tuple(one_pass) for one_pass in passes}) == 3

    def test_starts_anywhere(self, stream, size):
        whole = stream(3 * size)
        for start in (1, size - 1, size, size + 3):
            part = stream(size, start=start)
            for (number, draws), (expected, expected_draws) in zip(
                part, whole[start:]
            ):
                assert number == expected
                np.testing.assert_array_equal(draws, expected_draws)

    @pytest.mark.parametrize("rows", [1, 2])
    def test_workers_share_all_of_it(self, stream, size, rows):
        whole = [int(number) for number, _ in stream(12, start=5)]
        shares = [
            [
                int(number)
                for number, _ in stream(
                    4, start=5, share=streams.Share(index, 3, rows)
                )
            ]
            for index in range(3)
        ]
        # Batches of 3 workers: `rows` of the first, then of the second ...
        parts = [np.reshape(share, (-1, rows)) for share in shares]
        batches = np.concatenate(parts, axis=1)
        assert batches.ravel().tolist() == whole

    def test_seeds_differ(self, stream, size):
        first, second = stream(size), stream(size, seed=4)
        assert [int(n) for n, _ in first] != [int(n) for n, _ in second]
        assert not np.array_equal(first[0][1], second[0][1])

    def test_draws_are_uniform_and_differ_between_passes(self, stream, size):
        draws = np.array([draws for _, draws in stream(20 * size)])
        assert draws.shape == (20 * size, 2)
        assert 0 <= draws.min() < draws.max() < 1
        assert len(np.unique(draws)) > 0.99 * draws.size
        # The mean of n uniform numbers deviates by 1 / sqrt(12 n).
        deviation = 1 / np.sqrt(12 * len(draws))
        np.testing.assert_allclose(draws.mean(0), 0.5, atol=4 * deviation)


@pytest.mark.parametrize("global_seed", [0, 5])
def test_the_global_seed_is_neither_used_nor_changed(global_seed):
    expected = [int(number) for number, _ in of_records(100)]
    tf.random.set_seed(global_seed)
    assert [int(number) for number, _ in of_records(100)] == expected
    after = float(tf.random.uniform([]))
    tf.random.set_seed(global_seed)
    assert float(tf.random.uniform([])) == after


def test_batches_of_workers_make_one_batch():
    def batch(share):
        stream = streams.indices(100, seed=0, share=share)
        batches = streams.batches(stream, 8, share=share)
        index, _ = next(batches.as_numpy_iterator())
        return set(index.tolist())

    whole = batch(streams.Share())
    halves = [batch(streams.Share(index, 2)) for index in range(2)]
    assert len(halves[0]) == len(halves[1]) == 4
    assert halves[0] | halves[1] == whole


def test_batches_that_workers_cannot_share_are_refused():
    stream = streams.indices(100, seed=0)
    with harness.refused(
        "`batch_size` must be a multiple of the 2 workers", "batch_size=9"
    ):
        streams.batches(stream, 9, share=streams.Share(0, 2))


def test_split_keeps_the_order_and_other_axes():
    x = np.arange(24.0).reshape(6, 4)
    batch = tf.data.Dataset.from_tensors(({"x": x}, np.arange(6)))
    parts = list(streams.split(batch, 3).as_numpy_iterator())
    assert [y.tolist() for _, y in parts] == [[0, 1], [2, 3], [4, 5]]
    np.testing.assert_array_equal(
        np.concatenate([inputs["x"] for inputs, _ in parts]), x
    )
