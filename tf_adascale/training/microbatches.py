"""Micro-batches: a batch split in parts that are computed in turn."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

_UNEVEN = "`microbatches` must divide the batch of each replica."


def split(batch: tf.Tensor, count: int) -> tf.Tensor:
    """Returns a batch as `count` equal parts, along a new first axis.

    Args:
        batch: tensor of shape `(size, ...)`.
        count: int >= 1, divides the size.

    Returns:
        Tensor of shape `(count, size / count, ...)`.

    Raises:
        ValueError: if `count` does not divide the size. In a graph where the
            size is unknown, running it raises `tf.errors.InvalidArgumentError`,
            which `uneven_error` turns into this error.

    Example:

    >>> split(tf.constant([1, 2, 3, 4]), 2).numpy().tolist()
    [[1, 2], [3, 4]]
    """
    size = batch.shape[0]
    if size is None:
        size = tf.shape(batch)[0]
        received = ["batch =", size, "microbatches =", count]
        check = tf.debugging.Assert(
            tf.math.floormod(size, count) == 0, [_UNEVEN, *received]
        )
        with tf.control_dependencies([check]):
            batch = tf.identity(batch)
    elif size % count:
        raise _uneven_error(size, count)
    rest = tf.shape(batch)[1:]
    parts = tf.reshape(batch, tf.concat([[count, size // count], rest], 0))
    return tf.ensure_shape(parts, [count, None, *batch.shape[1:]])


def uneven_error(
    error: tf.errors.InvalidArgumentError,
) -> ValueError | None:
    """Returns the ValueError for an error that `split` caused, or None.

    Args:
        error: `tf.errors.InvalidArgumentError`.

    Example:

    >>> uneven_error(tf.errors.InvalidArgumentError(None, None, "no")) is None
    True
    """
    if _UNEVEN not in error.message:
        return None
    values = re.search(
        r"batch =\W*(\d+)\W*microbatches =\W*(\d+)", error.message
    )
    return _uneven_error(*values.groups()) if values else None


class Result(NamedTuple):
    """What a function makes of one part, or `summed` of all of them.

    Attributes:
        samples: list of tensors of known shapes, or None, to be merged.
        terms: list of tensors of known shapes, or None, to be summed.
        outputs: nested tensors, or None, to be joined along their first axes.
        maxima: list of floating tensors of known shapes, or None, of which the
            largest are taken.
    """

    samples: list[Any]
    terms: list[Any]
    outputs: Any
    maxima: Sequence[Any] = ()


def summed(
    function: Callable[..., Result],
    parts: list[Any],
    count: int,
    *,
    merge: Callable[[list[Any], list[Any]], list[Any]] | None = None,
) -> Result:
    """Returns the sums and the outputs of a function of each part.

    The loop runs in the graph and holds the sums and one part's intermediate
    results at a time.

    Args:
        function: callable of one part's tensors that returns a `Result`. None
            stands at the same places for every part.
        parts: list of nested tensors, or None, with a first axis of `count`.
        count: int >= 1.
        merge: function that merges two samples, the earlier one first, or None
            to sum them. It takes and returns lists like `samples` without None.
            Samples are merged in a binary tree over neighbours. A sample
            without a neighbour at one level moves up unchanged. The loop holds
            a list per level.

    Returns:
        `Result` of the same structure.

    Example:

    >>> parts = [tf.constant([[1.0, 2.0], [3.0, 4.0]])]
    >>> function = lambda x: Result(
    ...     [tf.reduce_max(x)], [tf.reduce_sum(x)], 2 * x, [tf.reduce_max(x)])
    >>> result = summed(function, parts, 2)
    >>> float(result.samples[0]), float(result.terms[0])
    (6.0, 10.0)
    >>> result.outputs.numpy().tolist(), float(result.maxima[0])
    ([2.0, 4.0, 6.0, 8.0], 4.0)
    >>> rise = lambda earlier, later: [later[0] - earlier[0]]
    >>> float(summed(function, parts, 2, merge=rise).samples[0])
    2.0
    """
    function = tf.function(function, autograph=False)

    def call(index):
        return function(
            *tf.nest.map_structure(
                lambda x: None if x is None else x[index], parts
            )
        )

    # One trace gives the types of the loop's variables and serves its body.
    first = Result(
        *function.get_concrete_function(
            *tf.nest.map_structure(lambda x: None if x is None else x[0], parts)
        ).structured_outputs
    )
    if any(x.shape.rank == 0 for x in _present(first.outputs)):
        raise ValueError(
            "`microbatches` must be 1 for a model with an output that has no "
            "batch axis, which cannot be joined from its parts. Received: "
            f"microbatches={count}, outputs={first.outputs}"
        )
    levels = count.bit_length() if merge else 1
    tree = [_zeros(first.samples) for _ in range(levels)]
    maxima = [tf.fill(x.shape, x.dtype.min) for x in _present(first.maxima)]
    arrays = [
        tf.TensorArray(x.dtype, count, element_shape=x.shape)
        for x in _present(first.outputs)
    ]

    def add(index, tree, sums, maxima, arrays):
        samples, terms, outputs, values = map(_present, call(index))
        if merge:
            tree = _pushed(tree, samples, index, merge)
        else:
            tree = [_added(tree[0], samples)]
        maxima = [tf.maximum(most, x) for most, x in zip(maxima, values)]
        arrays = [array.write(index, x) for array, x in zip(arrays, outputs)]
        return index + 1, tree, _added(sums, terms), maxima, arrays

    _, tree, sums, maxima, arrays = tf.while_loop(
        lambda index, *_: index < count,
        add,
        (0, tree, _zeros(first.terms), maxima, arrays),
    )
    return Result(
        _filled(
            first.samples, _folded(tree, count, merge) if merge else tree[0]
        ),
        _filled(first.terms, sums),
        _filled(first.outputs, [array.concat() for array in arrays]),
        _filled(first.maxima, maxima),
    )


def _pushed(tree, samples, index, merge, *, level=0):
    """Returns a tree's pending nodes after one more sample.

    A binary counter: bit `level` of the index is 1 if a node of that level
    waits for its neighbour. Then the two merge, which is the carry.
    """

    def keep():
        return [*tree[:level], samples, *tree[level + 1 :]]

    def carry():
        merged = merge(tree[level], samples)
        return _pushed(tree, merged, index, merge, level=level + 1)

    if level == len(tree) - 1:
        return keep()
    return tf.cond(index // 2**level % 2 == 1, carry, keep)


def _folded(tree, count, merge):
    """Returns a tree's root after `count` samples, merging what still waits."""
    waiting = [level for level in range(len(tree)) if count >> level & 1]
    root = tree[waiting[0]]
    for level in waiting[1:]:
        root = merge(tree[level], root)
    return root


def _zeros(structure):
    return [tf.zeros(x.shape, x.dtype) for x in _present(structure)]


def _added(totals, values):
    return [total + value for total, value in zip(totals, values)]


def _present(structure):
    return [x for x in tf.nest.flatten(structure) if x is not None]


def _filled(structure, values):
    """Returns a structure with new values in the places that are not None."""
    values = iter(values)
    return tf.nest.map_structure(
        lambda x: None if x is None else next(values), structure
    )


def _uneven_error(size, count):
    return ValueError(
        f"{_UNEVEN} Does the last batch of the dataset need "
        f"drop_remainder=True? Received: batch={size}, microbatches={count}"
    )
