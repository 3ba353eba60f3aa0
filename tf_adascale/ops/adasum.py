"""The arithmetic of Adasum: a sum of gradients that respects their angles.

Two gradients of one layer, or two updates of its weights, combine to

    Adasum(a, b) = (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b        (1)

where a.b is their inner product. The result is their sum if they are
orthogonal, their mean if they are equal, and zero if they are opposite.

More than two combine in a binary tree over neighbours: inputs 0 and 1, 2 and 3,
and so on, then the results in the same way. An odd one at the end of a level
moves up unchanged, so three inputs give Adasum(Adasum(a, b), c). Adasum is not
associative: this order is part of the definition.

The result of a tree is a linear combination of its inputs. The inner products
between the inputs determine the factors: see `coefficients`.

If a norm is too small to divide by, its factor is 1. A vector that is zero up
to rounding, because its parts cancelled, has no meaningful direction.

All functions are pure. They work eagerly, in a `tf.function` and under XLA.

Reference: Maleki et al., "Scaling Distributed Training with Adaptive
Summation", 2020.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# Norms and squared norms below these count as zero. The float64 values are
# Horovod's: its squared norm is the square root of the smallest normal number.
_LEAST_NORM = {tf.float32: 1.2e-38, tf.float64: 1.2e-77}
_LEAST_SQUARE = {tf.float32: 1.2e-38, tf.float64: 1.5e-154}

# A remainder of up to this many units in the last place of what cancelled is
# rounding noise. Updates are differences of weights and carry their rounding.
_NOISE = 64

# The same for squared norms computed from inner products, which resolve one
# unit in the last place of a square.
_NOISE_OF_SQUARES = 8


def pair(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns the Adasum of two tensors, equation (1).

        (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

    Args:
        left: floating tensor of any shape, a.
        right: tensor of the same dtype and shape, b.

    Returns:
        Tensor of the same dtype and shape. Half precision is combined in
        float32.

    Raises:
        ValueError: if the dtypes or shapes differ, or are not floating.

    Example:

    >>> pair(tf.constant([1.0, 0.0]), tf.constant([0.0, 2.0])).numpy().tolist()
    [1.0, 2.0]
    >>> pair(tf.constant([1.0, 0.0]), tf.constant([3.0, 0.0])).numpy().tolist()
    [2.0, 0.0]

    Reference: Maleki et al. 2020.
    """
    return combine([left, right])


def combine(inputs: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the Adasum of the tensors of one layer, in a binary tree.

    Args:
        inputs: n >= 1 floating tensors of one dtype and shape.

    Returns:
        Tensor of the same dtype and shape. Half precision is combined in
        float32.

    Raises:
        ValueError: if there are no inputs, or if their dtypes or shapes differ
            or are not floating.

    Example:

    >>> rows = [[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]
    >>> combine([tf.constant(row) for row in rows]).numpy().tolist()
    [2.0, 5.0]

    Reference: Maleki et al. 2020.
    """
    inputs = [tf.convert_to_tensor(value) for value in inputs]
    kinds = {(value.dtype, str(value.shape)) for value in inputs}
    if len(kinds) != 1 or not inputs[0].dtype.is_floating:
        raise ValueError(
            "`inputs` must be one or more tensors of one floating dtype and "
            f"one shape. Received: inputs={inputs}"
        )
    dtype = inputs[0].dtype
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    rows = [tf.reshape(tf.cast(value, wide), [-1]) for value in inputs]
    total = tf.reshape(combine_rows(tf.stack(rows)), tf.shape(inputs[0]))
    return tf.ensure_shape(tf.cast(total, dtype), inputs[0].shape)


def combine_rows(rows: tf.Tensor) -> tf.Tensor:
    """Returns the Adasum of the rows of each matrix of a batch.

    Args:
        rows: float32 or float64 tensor of shape `(..., n, d)`. n must be known.

    Returns:
        Tensor of the same dtype and of shape `(..., d)`.

    Raises:
        ValueError: if the rows have another dtype.

    Example:

    >>> combine_rows(tf.constant([[1.0, 0.0], [3.0, 0.0]])).numpy().tolist()
    [2.0, 0.0]

    Reference: Maleki et al. 2020.
    """
    if rows.dtype not in _LEAST_NORM:
        raise ValueError(
            "`rows` must be float32 or float64. Received: "
            f"rows.dtype={rows.dtype.name}"
        )
    count = int(rows.shape[-2])
    # The length that each row would have if nothing in it had cancelled.
    bounds = _lengths(rows)
    while count > 1:
        if count % 2:  # A row of zeros leaves its neighbour unchanged.
            rows, bounds = (_padded(x, axes=[-2]) for x in (rows, bounds))
            count += 1
        rows, bounds = _pairs_combined(rows, bounds, count)
        count //= 2
    return rows[..., 0, :]


def _pairs_combined(rows, bounds, count):
    """Returns the next level of the tree: half as many rows and bounds."""
    # With lengths |a|, |b| and the cosine of the angle between them, no square
    # underflows or overflows:
    # (a - |b| cos/2 a/|a|) + (b - |a| cos/2 b/|b|).
    dtype = rows.dtype
    least = tf.constant(_LEAST_NORM[dtype], dtype)
    lengths = _lengths(rows)
    units = tf.math.divide_no_nan(rows, lengths)
    cosines = tf.reduce_sum(
        units[..., ::2, :] * units[..., 1::2, :], -1, keepdims=True
    )
    others = tf.gather(lengths, [i ^ 1 for i in range(count)], axis=-2)
    cuts = tf.where(
        lengths > tf.maximum(least, _NOISE * _epsilon(dtype) * bounds),
        others * tf.repeat(cosines / 2, 2, axis=-2),
        tf.zeros_like(lengths),
    )
    bounds = tf.abs(lengths - cuts) * tf.math.divide_no_nan(bounds, lengths)
    rows = rows - cuts * units
    return (
        rows[..., ::2, :] + rows[..., 1::2, :],
        bounds[..., ::2, :] + bounds[..., 1::2, :],
    )


def coefficients(inner_products: tf.Tensor) -> tf.Tensor:
    """Returns the factors by which the tree adds up its inputs.

        Adasum(x_0, ..., x_{n-1}) = sum over i, c_i x_i                     (2)

    The inner products between the inputs of one level of the tree determine
    those of the next. They cannot represent what cancels. From 8 entries per
    input on, the result matches `combine` up to rounding unless inputs are
    opposite. For fewer entries sums are often small compared with the inputs,
    and `combine` is more accurate. In float32 norms must be in 1e-19 to 1e19;
    smaller ones count as zero.

    Args:
        inner_products: float32 or float64 tensor of shape `(..., n, n)`: the
            symmetric matrix of x_i.x_j, for each layer of a batch.

    Returns:
        Tensor of the same dtype and of shape `(..., n)`, c.

    Raises:
        ValueError: if the matrices are not square or have another dtype.

    Example:

    >>> # x_0 = (1, 0), x_1 = (0, 1), x_2 = (1, 1): the first two are added;
    >>> # their sum is parallel to the third, so the two are averaged.
    >>> products = tf.constant([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0],
    ...                         [1.0, 1.0, 2.0]])
    >>> coefficients(products).numpy().tolist()
    [0.5, 0.5, 0.5]

    Reference: Maleki et al. 2020.
    """
    _check_inner_products(inner_products)
    # Of the nodes of one level: the products between them, and the length that
    # each would have if nothing in it had cancelled.
    products = inner_products
    lengths = tf.sqrt(tf.linalg.diag_part(products))
    result = tf.ones_like(lengths)
    count = int(inner_products.shape[-1])
    leaves = list(range(count))  # The node that contains each input.
    while count > 1:
        if count % 2:
            products = _padded(products, axes=[-2, -1])
            lengths = _padded(lengths, axes=[-1])
        factors = _pair_factors(products, lengths)
        result *= tf.gather(factors, leaves, axis=-1)
        leaves = [node // 2 for node in leaves]
        products *= factors[..., :, None]
        products *= factors[..., None, :]
        products = products[..., ::2] + products[..., 1::2]
        products = products[..., ::2, :] + products[..., 1::2, :]
        lengths *= tf.abs(factors)
        lengths = lengths[..., ::2] + lengths[..., 1::2]
        count = (count + 1) // 2
    return result


def _pair_factors(products, lengths):
    """Returns the factor of each node in the sum with its neighbour."""
    dtype = products.dtype
    dots = tf.linalg.diag_part(products, k=1)[..., ::2]
    squares = tf.linalg.diag_part(products)
    noise = _NOISE_OF_SQUARES * _epsilon(dtype) * lengths**2
    counts = (squares > _LEAST_SQUARE[dtype]) & (squares > noise)
    return 1 - tf.where(
        counts,
        tf.repeat(dots, 2, axis=-1)
        / tf.where(counts, 2 * squares, tf.ones_like(squares)),
        tf.zeros_like(squares),
    )


def _check_inner_products(inner_products):
    shape, dtype = inner_products.shape, inner_products.dtype
    is_square = (
        shape.rank is not None
        and shape.rank >= 2
        and (shape[-1] == shape[-2] is not None)
    )
    if not is_square or dtype not in _LEAST_SQUARE:
        raise ValueError(
            "`inner_products` must be float32 or float64 and of shape "
            "(..., n, n), with n known. Received: "
            f"inner_products.shape={shape}, inner_products.dtype={dtype.name}"
        )


def _epsilon(dtype):
    return float(np.finfo(dtype.as_numpy_dtype).eps)


def _lengths(rows):
    """Returns the norms of rows without squaring a large or small entry."""
    largest = tf.reduce_max(tf.abs(rows), -1, keepdims=True)
    scaled = tf.math.divide_no_nan(rows, largest)
    return largest * tf.sqrt(tf.reduce_sum(scaled**2, -1, keepdims=True))


def _padded(values, *, axes):
    """Returns values with a zero appended along each axis."""
    paddings = [[0, 0] for _ in values.shape]
    for axis in axes:
        paddings[axis][1] = 1
    return tf.pad(values, paddings)
