"""Collectives: values that all replicas compute together.

Call these functions in replica context: in a step, once per replica.
"""

from typing import Any

import tensorflow as tf

# Large enough to fill a network, small enough that few values are copied.
BYTES_PER_PACK = 2**20

# Bytes each replica contributes per all-gather.
BYTES_PER_GATHER = 2**22


def total(values: list[Any]) -> list[Any]:
    """Returns the sums over the replicas, by one all-reduce of the whole list.

    Args:
        values: list of tensors or `tf.IndexedSlices`, of any types and shapes;
            this replica's own.

    Returns:
        List like `values`, the same on every replica.

    Example:

    >>> [float(value) for value in total([tf.constant(2.0)])]
    [2.0]
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return list(values)
    # By default TensorFlow copies all values into one tensor and back. Sorting
    # and packing by size sends large values uncopied and small ones together.
    order = sorted(range(len(values)), key=lambda i: _size(values[i]))[::-1]
    reduced = context.all_reduce(
        tf.distribute.ReduceOp.SUM,
        [values[i] for i in order],
        options=tf.distribute.experimental.CommunicationOptions(
            bytes_per_pack=BYTES_PER_PACK
        ),
    )
    places = {i: place for place, i in enumerate(order)}
    return [reduced[places[i]] for i in range(len(values))]


def index() -> tf.Tensor:
    """Returns this replica's index among all replicas, scalar int32.

    Example:

    >>> int(index())
    0
    """
    context = tf.distribute.get_replica_context()
    return tf.convert_to_tensor(context.replica_id_in_sync_group, tf.int32)


def gathered(value: tf.Tensor) -> tf.Tensor:
    """Returns a value of every replica, in their order, along a new first axis.

    Args:
        value: float32 or float64 tensor of a known shape; this replica's own.

    Returns:
        Tensor of shape `(N, ...)`, the same on every replica.

    Example:

    >>> gathered(tf.constant([3.0, 4.0])).numpy().tolist()
    [[3.0, 4.0]]
    """
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return value[None]
    rows, order = _gathered(_with_index([tf.reshape(value, [-1])]))
    return tf.reshape(tf.gather(rows[:, :-1], order), (-1, *value.shape))


def inner_products(values: list[tf.Tensor]) -> tf.Tensor:
    """Returns the inner products between the replicas, for each of V values.

        out[v, i, j] = sum over entries, x_i x_j,    x_i: value v of replica i

    The values are gathered in pieces of `BYTES_PER_GATHER`, one after another.
    A replica holds N pieces and their products at a time, however large the
    values are. In total it receives N - 1 times their size.

    Args:
        values: list of V >= 1 floating tensors of known shapes; this replica's
            own.

    Returns:
        Tensor of shape `(V, N, N)`, the same on every replica. float32, or
        float64 where any value is float64.

    Example:

    >>> inner_products([tf.constant([3.0, 4.0])]).numpy().tolist()
    [[[25.0]]]
    """
    wide = any(value.dtype == tf.float64 for value in values)
    dtype = tf.float64 if wide else tf.float32
    count = tf.distribute.get_strategy().num_replicas_in_sync
    rows = [tf.zeros((count,), dtype) for _ in values]  # Row i, on replica i.
    for bucket in _buckets(values, BYTES_PER_GATHER // dtype.size):
        # Wait for the bucket before: all at once would fill the memory.
        with tf.control_dependencies(rows):
            pieces = [
                tf.cast(tf.reshape(values[v], [-1])[start:end], dtype)
                for v, start, end in bucket
            ]
            own = _with_index(pieces)
        everyone, order = _gathered(own)
        # A matrix product would round to 10 bits on some accelerators.
        products = everyone * own
        begin = 0
        for v, start, end in bucket:
            length = end - start
            part = products[:, begin : begin + length]
            rows[v] += tf.gather(tf.reduce_sum(part, axis=1), order)
            begin += length
    # One replica computes each row, so all replicas get the same numbers.
    mine = tf.one_hot(index(), count, dtype=dtype)
    (result,) = total([mine[:, None] * tf.stack(rows)[:, None, :]])
    return result


def _with_index(pieces):
    """Returns vectors joined, and this replica's index as the last entry."""
    return tf.concat([*pieces, [tf.cast(index(), pieces[0].dtype)]], 0)


def _gathered(own):
    """Returns a vector of every replica, and the places of replicas 0, 1, ...

    Collectives list their members in an order of their own. That of tasks is
    0, 1, 10, 11, 2, because their names are sorted as strings.

    Args:
        own: what `_with_index` returned.
    """
    context = tf.distribute.get_replica_context()
    rows = context.all_gather(own[None], axis=0)
    # The collectives of CPUs and GPUs do not know the shape.
    rows = tf.ensure_shape(rows, (context.num_replicas_in_sync, *own.shape))
    return rows, tf.argsort(tf.cast(rows[:, -1], tf.int32))


def _buckets(values, size):
    """Yields lists of `(value, start, end)` with `size` entries in total."""
    bucket, room = [], size
    for number, value in enumerate(values):
        start, entries = 0, value.shape.num_elements()
        while start < entries:
            end = min(start + room, entries)
            bucket.append((number, start, end))
            room -= end - start
            start = end
            if not room:
                yield bucket
                bucket, room = [], size
    if bucket:
        yield bucket


def _size(value):
    """Returns the bytes of a tensor, 0 if its shape is unknown."""
    if isinstance(value, tf.IndexedSlices):
        return 0
    return (value.shape.num_elements() or 0) * value.dtype.size
