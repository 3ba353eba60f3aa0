"""Squared norms of lists of gradients, as an optimizer gets them."""

import tensorflow as tf


def squared_norm(gradients, *, jit_compile=False):
    """Returns the squared Euclidean norm of a list of gradients.

        |g|^2 = sum over gradients, sum over entries, entry^2

    Args:
        gradients: list of tensors of any floating type and shape; None counts
            as zero, and a `tf.IndexedSlices` as the dense gradient it stands
            for: values with the same index are added before they are squared.
        jit_compile: bool. True compiles one fused XLA kernel, which reads each
            gradient once. The result is the same up to rounding, which for
            tensors of more than 10 million entries can be 1e-3 on CPUs.

    Returns:
        Scalar float32, or float64 where every gradient is float64. Squares are
        taken and added in that type, so half-precision gradients neither
        overflow nor round.

    Raises:
        ValueError: if there is no gradient at all.

    Example:

    >>> float(squared_norm([tf.constant([3.0]), None, tf.constant([4.0])]))
    25.0
    >>> repeated = tf.IndexedSlices(tf.constant([[1.0], [2.0]]), [0, 0], [5, 1])
    >>> float(squared_norm([repeated]))
    9.0
    """
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        raise ValueError(
            "The squared norm of no gradient was asked for. Expected at least "
            f"one gradient that is not None. Received: gradients={gradients}"
        )
    wide = all(gradient.dtype == tf.float64 for gradient in present)
    dtype = tf.float64 if wide else tf.float32
    square = _fused_sum_of_squares if jit_compile else _sum_of_squares
    return square([_values(gradient, dtype) for gradient in present], dtype)


def deduplicated(gradient):
    """Returns a sparse gradient with the values of each index added up.

    Args:
        gradient: `tf.IndexedSlices` of k slices, with repeated indices.

    Returns:
        `tf.IndexedSlices` of k slices, for under XLA no shape may depend on the
        data: where there are fewer indices, slices of zeros at index 0 are left
        over.

    Example:

    >>> repeated = tf.IndexedSlices(tf.constant([1.0, 2.0]), [3, 3])
    >>> deduplicated(repeated).values.numpy().tolist()
    [3.0, 0.0]
    """
    # Slices of one index are adjacent after sorting; numbering the runs gives
    # segments.
    order = tf.argsort(gradient.indices)
    indices = tf.gather(gradient.indices, order)
    starts = tf.cast(indices[1:] != indices[:-1], tf.int32)
    first = tf.zeros_like(indices[:1], tf.int32)
    segments = tf.concat([first, tf.cumsum(starts)], 0)
    count = tf.shape(indices)[0]
    return tf.IndexedSlices(
        tf.math.unsorted_segment_sum(
            tf.gather(gradient.values, order), segments, count
        ),
        tf.maximum(tf.math.unsorted_segment_max(indices, segments, count), 0),
        gradient.dense_shape,
    )


def dot(left, right):
    """Returns the inner product of two lists of dense gradients.

        <g, g'> = sum over gradients, sum over entries, entry entry'

    Args:
        left: list of dense floating tensors.
        right: list of tensors of the same shapes.

    Returns:
        Scalar float32, or float64 where every tensor is float64.

    Example:

    >>> float(dot([tf.constant([1.0, 2.0])], [tf.constant([3.0, 4.0])]))
    11.0
    """
    wide = all(tensor.dtype == tf.float64 for tensor in (*left, *right))
    dtype = tf.float64 if wide else tf.float32
    return tf.add_n(
        [
            tf.reduce_sum(tf.cast(a, dtype) * tf.cast(b, dtype))
            for a, b in zip(left, right)
        ]
    )


def _sum_of_squares(tensors, dtype):
    # tf.nn.l2_loss is half the sum of squares, in one pass without a temporary.
    return 2 * tf.add_n([tf.nn.l2_loss(tf.cast(x, dtype)) for x in tensors])


_fused_sum_of_squares = tf.function(
    _sum_of_squares, jit_compile=True, reduce_retracing=True
)


def _values(gradient, dtype):
    """Returns a tensor whose squares sum to the squared norm of `gradient`."""
    if not isinstance(gradient, tf.IndexedSlices):
        return tf.convert_to_tensor(gradient)
    # In the wide type already here, for repeated indices are added.
    wide = tf.cast(gradient.values, dtype)
    return deduplicated(tf.IndexedSlices(wide, gradient.indices)).values
