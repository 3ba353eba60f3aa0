"""Endless, shuffled streams of examples that can start at any position.

A stream is a sequence of passes over the data, each in its own order. The
example at a position, and the random numbers that come with it, depend only on
the seed and the position. Therefore

- a run resumes at the example where it was stopped,
- S batches of B examples have the same examples as one batch of S B, and
- the number of workers and threads does not change the data.
"""

from typing import NamedTuple

import tensorflow as tf

# Purposes of random numbers, so that each purpose has different ones.
_ORDER, _DRAWS = 0, 1


class Share(NamedTuple):
    """The part of each batch that one worker reads.

    Attributes:
        index: int, number of the worker, in [0, count).
        count: int, number of workers.
        rows: int, number of consecutive examples that a worker reads at a time.
    """

    index: int = 0
    count: int = 1
    rows: int = 1


def indices(size, *, seed, start=0, share=Share(), draws=0):
    """Returns an endless stream of indices of examples.

    Args:
        size: int >= 1, number of examples.
        seed: int, of the order and the random numbers.
        start: int >= 0, number of examples to skip.
        share: `Share` of the stream to read.
        draws: int, number of random numbers per example.

    Returns:
        `tf.data.Dataset` of (index, draws): an int64 scalar in [0, size), and
        float32 of shape (draws,), uniform in [0, 1).

    Example:

    >>> stream = indices(3, seed=1).map(lambda index, draws: index).take(6)
    >>> first = [int(index) for index in stream]
    >>> sorted(first[:3]), sorted(first[3:])
    ([0, 1, 2], [0, 1, 2])
    """

    def order(number):
        return tf.data.Dataset.from_tensor_slices(
            tf.random.experimental.stateless_shuffle(
                tf.range(size, dtype=tf.int64), _seeds(seed, number, _ORDER)
            )
        )

    return _stream(order, size, seed, start, share, draws)


def records(
    dataset, size, *, seed, start=0, share=Share(), draws=0, buffer_size=10_000
):
    """Returns an endless stream of a dataset's records.

    A pass has every record once, in the order of the dataset shuffled through a
    buffer. Skipped records are read too, so pass records that are not decoded
    yet.

    Args:
        dataset: finite `tf.data.Dataset`, in the same order at every pass.
        size: int, number of its records.
        seed: int, of the order and the random numbers.
        start: int >= 0, number of records to skip.
        share: `Share` of the stream to read.
        draws: int, number of random numbers per record.
        buffer_size: int >= 1, size of the shuffle buffer.

    Returns:
        `tf.data.Dataset` of (record, draws), see `indices`.
    """

    def order(number):
        order_seed = tf.random.stateless_uniform(
            [], _seeds(seed, number, _ORDER), 0, tf.int64.max, tf.int64
        )
        # This sets the seed of the graph that this function is traced into,
        # and of no other graph. `shuffle` mixes it with its own seed, which can
        # be a tensor only if the seed of the graph is not 0.
        tf.random.set_seed(1)
        return dataset.shuffle(buffer_size, seed=order_seed)

    return _stream(order, size, seed, start, share, draws)


def batches(stream, batch_size, *, share=Share()):
    """Returns one worker's equal part of each batch.

    Args:
        stream: `tf.data.Dataset` of the worker's share.
        batch_size: int, examples in the batch of all workers.
        share: `Share`.

    Raises:
        ValueError: if the batch size is not a multiple of the workers.
    """
    if batch_size % share.count:
        raise ValueError(
            f"`batch_size` must be a multiple of the {share.count} workers. "
            f"Received: batch_size={batch_size}, share={share}"
        )
    return stream.batch(batch_size // share.count, drop_remainder=True)


def split(dataset, count):
    """Splits each batch into equal parts, which follow one another.

    Args:
        dataset: `tf.data.Dataset` of batches, which are tuples. The batch size
            is a multiple of `count`.
        count: int >= 1.

    Example:

    >>> pairs = tf.data.Dataset.from_tensor_slices(([1, 2], [3, 4])).batch(2)
    >>> [(x.numpy().tolist(), y.numpy().tolist()) for x, y in split(pairs, 2)]
    [([1], [3]), ([2], [4])]
    """

    def part(x):
        return tf.reshape(x, tf.concat([[count, -1], tf.shape(x)[1:]], 0))

    return dataset.flat_map(
        lambda *batch: tf.data.Dataset.from_tensor_slices(
            tf.nest.map_structure(part, batch)
        )
    )


def _stream(order, size, seed, start, share, draws):
    """Returns a stream of the passes that `order` returns.

    `order` is a callable that maps the number of a pass to the
    `tf.data.Dataset` of its examples. For the other arguments see `indices`.
    """
    first_pass, first_example = divmod(start, size)

    def one_pass(number):
        uniform = tf.random.stateless_uniform(
            [size, draws], _seeds(seed, number, _DRAWS)
        )
        return tf.data.Dataset.zip(
            order(number), tf.data.Dataset.from_tensor_slices(uniform)
        )

    stream = (
        tf.data.Dataset.range(first_pass, tf.int64.max)
        .flat_map(one_pass)
        .skip(first_example)
    )
    if share.count == 1:
        return stream
    return (
        stream.enumerate()
        .filter(
            lambda place, _: place // share.rows % share.count == share.index
        )
        .map(lambda _, example: example)
    )


def _seeds(seed, number, purpose):
    # Stateless functions take two numbers, so one of them is pass and purpose.
    return tf.stack([tf.constant(seed, tf.int64), 2 * number + purpose])
