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

import numpy as np
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

    >>> rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    >>> combined([tf.constant(row) for row in rows]).numpy().tolist()
    [1.0, 1.0]

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

    Example:

    >>> combined_rows(tf.constant([[1.0, 0.0], [3.0, 0.0]])).numpy().tolist()
    [2.0, 0.0]

    Reference: Maleki et al. 2020.
    """
    count = int(rows.shape[-2])
    while count > 1:
        if count % 2:  # A row of zeros leaves its neighbour be.
            rows = _padded(rows, axes=[-2])
        left, right = rows[..., ::2, :], rows[..., 1::2, :]
        dots, *sqnorms = (
            tf.reduce_sum(x * y, -1, keepdims=True)
            for x, y in [(left, right), (left, left), (right, right)]
        )
        of_left, of_right = (_factors(dots, sqnorm) for sqnorm in sqnorms)
        rows = of_left * left + of_right * right
        count = (count + 1) // 2
    return rows[..., 0, :]


def coefficients(inner_products):
    """Returns the factors by which the tree adds up its inputs.

        Adasum(x_0, ..., x_n-1) = sum over i, c_i x_i

    On the way up the tree, only the inner products between the inputs of a
    level matter, and those of the next level follow from them. What cancels is
    lost in them: for inputs of few entries, whose sums are often small beside
    them, `combined` is more accurate. From 8 entries on there is no difference
    beyond rounding unless inputs are opposite to one another.

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
    shape, dtype = inner_products.shape, inner_products.dtype
    is_square = (
        shape.rank is not None
        and shape.rank >= 2
        and (shape[-1] == shape[-2] is not None)
    )
    if not is_square or dtype not in _NEGLIGIBLE:
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
        factors = _factors(
            tf.repeat(tf.linalg.diag_part(products, k=1)[..., ::2], 2, axis=-1),
            tf.linalg.diag_part(products),
            rounding=_ROUNDING
            * np.finfo(dtype.as_numpy_dtype).eps
            * lengths**2,
        )
        result *= tf.gather(factors, leaves, axis=-1)
        leaves = [node // 2 for node in leaves]
        products *= factors[..., :, None] * factors[..., None, :]
        products = products[..., ::2] + products[..., 1::2]
        products = products[..., ::2, :] + products[..., 1::2, :]
        lengths *= tf.abs(factors)
        lengths = lengths[..., ::2] + lengths[..., 1::2]
        count = (count + 1) // 2
    return result


def _wide(dtype):
    return tf.float64 if dtype == tf.float64 else tf.float32


def _factors(dots, sqnorms, *, rounding=0.0):
    """Returns 1 - a.b / (2 |a|^2), for many a at once."""
    divides = (sqnorms > _NEGLIGIBLE[sqnorms.dtype]) & (sqnorms > rounding)
    safe = tf.where(divides, sqnorms, tf.ones_like(sqnorms))
    return 1 - tf.where(divides, dots / (2 * safe), tf.zeros_like(sqnorms))


def _padded(values, *, axes):
    """Returns values with a zero at the end of some axes."""
    paddings = [[0, 0] for _ in values.shape]
    for axis in axes:
        paddings[axis][1] = 1
    return tf.pad(values, paddings)
