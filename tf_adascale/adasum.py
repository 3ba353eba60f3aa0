"""The arithmetic of Adasum: a sum of gradients that minds their angles.

Two gradients, or two updates of the weights, of one layer combine to

    Adasum(a, b) = (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

which is their sum where they are orthogonal, their mean where they are equal,
and nothing where they are opposite. More than two combine in a binary tree
over neighbours: inputs 0 and 1, 2 and 3, ..., then the results likewise. One
that is left over at the end of a level moves up to the next as it is, so that
three are Adasum(Adasum(a, b), c). The operation is not associative: this order
is part of the definition.

Whatever the tree, its result is a linear combination of the inputs, and the
factors follow from the inner products between them: see `coefficients`.

Where a norm is too small to divide by, its factor is 1: one that is 0 up to
rounding because its parts were opposite has no direction left that would mean
anything.

All functions are pure and work eagerly, in a `tf.function` and under XLA.

Reference: Maleki et al., "Scaling Distributed Training with Adaptive
Summation", 2020.
"""

import numpy as np
import tensorflow as tf

# Norms and squared norms below are as good as 0. In float64 they are Horovod's,
# whose squared norm is the square root of the smallest normal number.
_LEAST_NORM = {tf.float32: 1.2e-38, tf.float64: 1.2e-77}
_LEAST_SQUARE = {tf.float32: 1.2e-38, tf.float64: 1.5e-154}

# What is left where tensors cancel is rounding noise up to this many units in
# the last place of what cancelled: updates are differences of weights, whose
# rounding they have.
_NOISE = 64

# The same of squared norms that follow from inner products, which see no less
# than a unit in the last place of a square.
_NOISE_OF_SQUARES = 8


def pair(left, right):
    """Returns the Adasum of two tensors.

        (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

    Args:
        left: floating tensor of any shape, a.
        right: tensor of the same type and shape, b.

    Returns:
        Tensor like `left`. Half precision is combined in float32.

    Raises:
        ValueError: if the two differ in type or shape, or do not float.

    Example:

    >>> pair(tf.constant([1.0, 0.0]), tf.constant([0.0, 2.0])).numpy().tolist()
    [1.0, 2.0]
    >>> pair(tf.constant([1.0, 0.0]), tf.constant([3.0, 0.0])).numpy().tolist()
    [2.0, 0.0]

    Reference: Maleki et al. 2020.
    """
    return combined([left, right])


def combined(inputs):
    """Returns the Adasum of a list of tensors, of one layer.

    Args:
        inputs: list of n >= 1 floating tensors of one type and shape.

    Returns:
        Tensor like the inputs. Half precision is combined in float32.

    Raises:
        ValueError: if the list is empty, or its tensors differ in type or
            shape, or do not float.

    Example:

    >>> rows = [[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]
    >>> combined([tf.constant(row) for row in rows]).numpy().tolist()
    [2.0, 5.0]

    Reference: Maleki et al. 2020.
    """
    inputs = [tf.convert_to_tensor(value) for value in inputs]
    kinds = {(value.dtype, str(value.shape)) for value in inputs}
    if len(kinds) != 1 or not inputs[0].dtype.is_floating:
        raise ValueError(
            "These tensors cannot be combined. Expected one or more of one "
            f"floating type and one shape. Received: inputs={inputs}"
        )
    (dtype, _), wide = *kinds, _wide(inputs[0].dtype)
    rows = [tf.reshape(tf.cast(value, wide), [-1]) for value in inputs]
    total = tf.reshape(combined_rows(tf.stack(rows)), tf.shape(inputs[0]))
    return tf.ensure_shape(tf.cast(total, dtype), inputs[0].shape)


def combined_rows(rows):
    """Returns the Adasum of the rows of each of several matrices.

    Args:
        rows: float32 or float64 tensor of shape `(..., n, d)` with n known.

    Returns:
        Tensor of shape `(..., d)`.

    Raises:
        ValueError: if the rows are of another type.

    Example:

    >>> combined_rows(tf.constant([[1.0, 0.0], [3.0, 0.0]])).numpy().tolist()
    [2.0, 0.0]

    Reference: Maleki et al. 2020.
    """
    if rows.dtype not in _LEAST_NORM:
        raise ValueError(
            "Rows of this type are not combined. Expected float32 or float64. "
            f"Received: rows of {rows.dtype}"
        )
    # With lengths |a|, |b| and the cosine between, of which no square vanishes
    # or overflows: (a - |b| cos/2 a/|a|) + (b - |a| cos/2 b/|b|).
    count, dtype = int(rows.shape[-2]), rows.dtype
    least = tf.constant(_LEAST_NORM[dtype], dtype)
    # What each row would be as long as if nothing in it had cancelled.
    bounds = _lengths(rows)
    while count > 1:
        if count % 2:  # A row of zeros leaves its neighbour be.
            rows, bounds = (_padded(x, axes=[-2]) for x in (rows, bounds))
            count += 1
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
        rows, bounds = (
            x[..., ::2, :] + x[..., 1::2, :]
            for x in (rows - cuts * units, bounds)
        )
        count //= 2
    return rows[..., 0, :]


def coefficients(inner_products):
    """Returns the factors by which the tree adds up its inputs.

        Adasum(x_0, ..., x_n-1) = sum over i, c_i x_i

    On the way up the tree, only the inner products between the inputs of a
    level matter, and those of the next level follow from them. What cancels is
    lost in them: for inputs of few entries, whose sums are often small beside
    them, `combined` is more accurate. From 8 entries on there is no difference
    beyond rounding unless inputs are opposite to one another. In float32, norms
    must be in 1e-19 to 1e19: smaller ones are taken for 0.

    Args:
        inner_products: float32 or float64 tensor of shape `(..., n, n)`, the
            symmetric matrix of x_i.x_j, for each of several layers.

    Returns:
        Tensor of shape `(..., n)`, c.

    Raises:
        ValueError: if the matrices are not square, or of another type.

    Example:

    >>> # x_0 = (1, 0), x_1 = (0, 1), x_2 = (1, 1): the first two are added;
    >>> # their sum is parallel to the third, so the two are averaged.
    >>> products = tf.constant([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0],
    ...                         [1.0, 1.0, 2.0]])
    >>> coefficients(products).numpy().tolist()
    [0.5, 0.5, 0.5]

    Reference: Maleki et al. 2020.
    """
    shape, dtype = inner_products.shape, inner_products.dtype
    is_square = (
        shape.rank is not None
        and shape.rank >= 2
        and (shape[-1] == shape[-2] is not None)
    )
    if not is_square or dtype not in _LEAST_SQUARE:
        raise ValueError(
            "These are no inner products between the inputs of a tree. "
            "Expected square matrices of float32 or float64, of shape "
            f"(..., n, n). Received: inner_products of shape {shape}, {dtype}"
        )
    # Of the nodes of one level: products between them, and the length that
    # each would have if nothing in it had cancelled.
    products = inner_products
    lengths = tf.sqrt(tf.linalg.diag_part(products))
    result = tf.ones_like(lengths)
    count = int(shape[-1])
    leaves = list(range(count))  # The node that each input has gone into.
    while count > 1:
        if count % 2:
            products = _padded(products, axes=[-2, -1])
            lengths = _padded(lengths, axes=[-1])
        dots = tf.linalg.diag_part(products, k=1)[..., ::2]
        squares = tf.linalg.diag_part(products)
        noise = _NOISE_OF_SQUARES * _epsilon(dtype) * lengths**2
        counts = (squares > _LEAST_SQUARE[dtype]) & (squares > noise)
        factors = 1 - tf.where(
            counts,
            tf.repeat(dots, 2, axis=-1)
            / tf.where(counts, 2 * squares, tf.ones_like(squares)),
            tf.zeros_like(squares),
        )
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


def _epsilon(dtype):
    return float(np.finfo(dtype.as_numpy_dtype).eps)


def _wide(dtype):
    return tf.float64 if dtype == tf.float64 else tf.float32


def _lengths(rows):
    """Returns the norms of rows, which need not fit a type when squared."""
    largest = tf.reduce_max(tf.abs(rows), -1, keepdims=True)
    scaled = tf.math.divide_no_nan(rows, largest)
    return largest * tf.sqrt(tf.reduce_sum(scaled**2, -1, keepdims=True))


def _padded(values, *, axes):
    """Returns values with a zero at the end of some axes."""
    paddings = [[0, 0] for _ in values.shape]
    for axis in axes:
        paddings[axis][1] = 1
    return tf.pad(values, paddings)
