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

Where a squared norm is too small to divide by, its factor is 1.

All functions are pure and work eagerly, in a `tf.function` and under XLA.

Reference: Maleki et al., "Scaling Distributed Training with Adaptive
Summation", 2020.
"""

import tensorflow as tf

# Squared norms below are as good as 0. In float64 it is the value of Horovod,
# the square root of the smallest normal number; in float32 that would be a norm
# of 3e-10, which updates of the weights do have, so it is that number itself.
_NEGLIGIBLE = {tf.float32: 1.2e-38, tf.float64: 1.5e-154}

# A squared norm that follows from inner products is rounding noise where it
# falls under this many units in the last place of what cancelled.
_ROUNDING = 8


def pair(left, right):
    """Returns the Adasum of two tensors.

        (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

    Args:
        left: floating tensor of any shape, a.
        right: tensor of the same type and shape, b.

    Returns:
        Tensor like `left`. Half precision is combined in float32.

    Example:

    >>> pair(tf.constant([1.0, 0.0]), tf.constant([0.0, 2.0])).numpy().tolist()
    [1.0, 2.0]
    >>> pair(tf.constant([1.0, 0.0]), tf.constant([3.0, 0.0])).numpy().tolist()
    [2.0, 0.0]

    Reference: Maleki et al. 2020.
    """
    dtype = _wide(left.dtype)
    a, b = tf.cast(left, dtype), tf.cast(right, dtype)
    sqnorms = tf.stack([tf.reduce_sum(a * a), tf.reduce_sum(b * b)])
    factors = _factors(tf.reduce_sum(a * b), sqnorms, _NEGLIGIBLE[dtype])
    return tf.cast(factors[0] * a + factors[1] * b, left.dtype)


def coefficients(inner_products):
    """Returns the factors by which the tree adds up its inputs.

        Adasum(x_0, ..., x_n-1) = sum over i, c_i x_i

    On the way up the tree, only the inner products between the inputs of a
    level matter, and those of the next level follow from them.

    Args:
        inner_products: float32 or float64 tensor of shape `(..., n, n)`, the
            symmetric matrix of x_i.x_j, for each of several layers.

    Returns:
        Tensor of shape `(..., n)`, c.

    Raises:
        ValueError: if the matrices are not square.

    Example:

    >>> # x_0 = (1, 0), x_1 = (0, 1), x_2 = (1, 1): the first two are added;
    >>> # their sum is parallel to the third, so the two are averaged.
    >>> products = tf.constant([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0],
    ...                         [1.0, 1.0, 2.0]])
    >>> coefficients(products).numpy().tolist()
    [0.5, 0.5, 0.5]

    Reference: Maleki et al. 2020.
    """
    shape = inner_products.shape
    if shape.rank is None or shape.rank < 2 or shape[-1] != shape[-2]:
        raise ValueError(
            "These are no inner products between the inputs of a tree. "
            "Expected square matrices, of shape (..., n, n). "
            f"Received: inner_products of shape {shape}"
        )
    count = shape[-1]
    rounding = _ROUNDING * inner_products.dtype.as_numpy_dtype(2) ** (
        -24 if inner_products.dtype == tf.float32 else -53
    )
    # Of the nodes of one level: products between them, and the length that
    # each would have if nothing in it had cancelled.
    products = inner_products
    lengths = tf.sqrt(tf.linalg.diag_part(products))
    result = tf.ones_like(lengths)
    leaves = list(range(count))  # The node that each input has gone into.
    while products.shape[-1] > 1:
        if products.shape[-1] % 2:  # A node of zeros leaves its neighbour be.
            products = _padded(products, axes=2)
            lengths = _padded(lengths, axes=1)
        sqnorms = tf.linalg.diag_part(products)
        negligible = tf.maximum(
            rounding * lengths**2, _NEGLIGIBLE[products.dtype]
        )
        dots = tf.linalg.diag_part(products, k=1)[..., ::2]
        factors = _factors(tf.repeat(dots, 2, axis=-1), sqnorms, negligible)
        result *= tf.gather(factors, leaves, axis=-1)
        leaves = [node // 2 for node in leaves]
        products *= factors[..., :, None] * factors[..., None, :]
        products = _pairs_added(_pairs_added(products, axis=-1), axis=-2)
        lengths = _pairs_added(tf.abs(factors) * lengths, axis=-1)
    return result


def combined(inputs):
    """Returns the Adasum of a list of tensors, of one layer.

    Args:
        inputs: list of n >= 1 floating tensors of one type and shape.

    Returns:
        Tensor like the inputs. Half precision is combined in float32.

    Raises:
        ValueError: if the list is empty.

    Example:

    >>> rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    >>> combined([tf.constant(row) for row in rows]).numpy().tolist()
    [1.0, 1.0]

    Reference: Maleki et al. 2020.
    """
    if not inputs:
        raise ValueError(
            "There is nothing to combine. Expected at least one tensor. "
            f"Received: inputs={inputs}"
        )
    stacked = tf.stack(inputs)
    wide = tf.cast(stacked, _wide(stacked.dtype))
    rows = tf.reshape(wide, [len(inputs), -1])
    products = tf.reduce_sum(rows[:, None, :] * rows[None, :, :], -1)
    factors = coefficients(products)
    total = tf.reduce_sum(factors[:, None] * rows, 0)
    return tf.cast(tf.reshape(total, stacked.shape[1:]), stacked.dtype)


def _wide(dtype):
    return tf.float64 if dtype == tf.float64 else tf.float32


def _factors(dot, sqnorms, negligible):
    """Returns 1 - a.b / (2 |a|^2) for each of several a."""
    divides = sqnorms > negligible
    safe = tf.where(divides, sqnorms, tf.ones_like(sqnorms))
    return 1 - tf.where(divides, dot / (2 * safe), tf.zeros_like(sqnorms))


def _padded(values, *, axes):
    """Returns values with a zero at the end of each of the last `axes` axes."""
    before = [[0, 0]] * (values.shape.rank - axes)
    return tf.pad(values, before + [[0, 1]] * axes)


def _pairs_added(values, *, axis):
    """Returns sums of neighbours, 0 and 1, 2 and 3, ..., along an axis."""
    even, odd = (
        (values[..., start::2] if axis == -1 else values[..., start::2, :])
        for start in (0, 1)
    )
    return even + odd
