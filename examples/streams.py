"""Endless, shuffled streams of examples that begin anywhere.

A stream is passes over the data, each in an order of its own, that run on into
one another. The example at a place of the stream, and the random numbers that
come with it, depend on nothing but the seed and the place. So a run goes on
where it was stopped, S batches of size B hold the same examples as one batch of
size S B, and how many workers or threads read does not change what is read.
"""

from typing import NamedTuple

import tensorflow as tf

# What random numbers are for, so that those for one are not those for another.
_ORDER, _DRAWS = 0, 1


class Share(NamedTuple):
    """The part of every batch that one worker reads.

    Attributes:
        index: int, number of the worker, in [0, count).
        count: int, number of workers.
        rows: int, how many examples of a batch a worker has, one after another.
    """

    index: int = 0
    count: int = 1
    rows: int = 1


def indices(size, *, seed, start=0, share=Share(), draws=0):
    """Returns an endless stream of the numbers of examples.

    Args:
        size: int >= 1, number of examples.
        seed: int, of the orders and the random numbers.
        start: int >= 0, number of examples to leave out at the beginning.
        share: `Share` of the stream: so many rows of every so many.
        draws: int, how many random numbers come with an example.

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

    A pass holds every record once, in the order of the dataset shuffled through
    a buffer. The records left out at the beginning are read, so they had better
    not be decoded yet.

    Args:
        dataset: finite `tf.data.Dataset`, in the same order at every pass.
        size: int, number of its records.
        seed: int, of the orders and the random numbers.
        start: int >= 0, number of records to leave out at the beginning.
        share: `Share` of the stream: so many rows of every so many.
        draws: int, how many random numbers come with a record.
        buffer_size: int >= 1, records held for shuffling.

    Returns:
        `tf.data.Dataset` of (record, draws), see `indices`.
    """

    def order(number):
        order_seed = tf.random.stateless_uniform(
            [], _seeds(seed, number, _ORDER), 0, tf.int64.max, tf.int64
        )
        # The seed of the graph that this function is traced into, and of no
        # other: `shuffle` mixes it in, and takes no tensor beside a seed of 0.
        tf.random.set_seed(1)
        return dataset.shuffle(buffer_size, seed=order_seed)

    return _stream(order, size, seed, start, share, draws)


def batches(stream, batch_size, *, share=Share()):
    """Returns one worker's parts of a stream's batches: all equally large.

    Args:
        stream: `tf.data.Dataset` of the worker's share.
        batch_size: int, examples in the batch of all workers.
        share: `Share`.

    Raises:
        ValueError: if the workers cannot share the batch equally.
    """
    if batch_size % share.count:
        raise ValueError(
            "The workers cannot share a batch equally. Expected a batch that "
            "is a multiple of their number. Received: "
            f"batch_size={batch_size}, share={share}"
        )
    return stream.batch(batch_size // share.count, drop_remainder=True)


def split(dataset, count):
    """Returns batches in equal parts, one part after another.

    Args:
        dataset: `tf.data.Dataset` of tuples, batches of a multiple of `count`.
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
    """Returns the passes that `order` makes, one after another.

    `order` is a callable of a pass's number that returns the `tf.data.Dataset`
    of its examples; for the others see `indices`.
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
    # Pass and purpose in one number: stateless functions take two.
    return tf.stack([tf.constant(seed, tf.int64), 2 * number + purpose])
