"""Drops unusable records, counts them and logs a warning.

One bad record in a million must not end a run of several days, and a dataset of
bad records must not look like an empty one. A warning is logged at the 1st,
2nd, 4th, 8th ... dropped record, when the next good record is read.
"""

import tensorflow as tf
from absl import logging

# After this many records, it is an error if more than half were dropped.
ENOUGH_TO_JUDGE = 200


def filtered(dataset, predicate, reason):
    """Returns the elements that satisfy a predicate and counts the others.

    Args:
        dataset: `tf.data.Dataset`.
        predicate: callable of an element, returns a boolean scalar.
        reason: str, why the other elements are dropped.

    Example:

    >>> even = filtered(tf.data.Dataset.range(4), lambda x: x % 2 == 0, "odd")
    >>> [int(x) for x in even]
    [0, 2]
    """
    return _counted(
        dataset.enumerate().filter(
            lambda _, element: (
                predicate(*element)
                if isinstance(element, tuple)
                else predicate(element)
            )
        ),
        reason,
    )


def mapped(dataset, function, reason):
    """Maps a function over the elements and drops those on which it fails.

    Every failure counts as `reason`, so the function must not fail for any
    other reason.

    Args:
        dataset: `tf.data.Dataset`.
        function: callable of an element, for example one that decodes images.
        reason: str, why the function fails on an element.
    """

    def numbered(number, element):
        arguments = element if isinstance(element, tuple) else (element,)
        return number, function(*arguments)

    return _counted(
        dataset.enumerate()
        .map(numbered, num_parallel_calls=tf.data.AUTOTUNE)
        .ignore_errors(),
        reason,
    )


def counted(dataset, reason):
    """Returns the values of a dataset and adds up the records it dropped.

    Args:
        dataset: `tf.data.Dataset` of (value, dropped, seen). The int64 scalar
            `seen` is the number of records behind the element, and `dropped`
            is how many of them were dropped.
        reason: str, why they were dropped.
    """

    def count(totals, element):
        value, dropped, seen = element
        before, seen_before = totals
        now, seen_now = before + dropped, seen_before + seen
        logged = tf.cond(
            dropped > 0,
            lambda: tf.numpy_function(log, [before, now, seen_now], tf.int64),
            lambda: now,
        )
        return (logged, seen_now), value

    def log(before, now, seen):
        _log(int(before), int(now), int(seen), reason)
        return now

    zero = tf.constant(0, tf.int64)
    values = dataset.scan((zero, zero), lambda *args: count(*args))
    # The number of elements is not that of the data. A filter makes it unknown.
    return values.filter(lambda *value: True)


def _counted(numbered, reason):
    """Returns the elements of a numbered dataset and counts the gaps."""

    def gap(expected, element):
        number, value = element
        return number + 1, (value, number - expected, number - expected + 1)

    gaps = numbered.scan(tf.constant(0, tf.int64), lambda *args: gap(*args))
    return counted(gaps, reason)


def _log(before, dropped, seen, reason):
    """Logs a count that doubled, or raises a ValueError if it is too high."""
    if dropped.bit_length() > before.bit_length():
        logging.warning(
            "%d of %d records dropped so far: %s", dropped, seen, reason
        )
    if seen >= ENOUGH_TO_JUDGE and 2 * dropped > seen:
        raise ValueError(
            "`dropped` must be at most half of `seen`: most records are "
            f"unusable. Received: dropped={dropped}, seen={seen}, "
            f"reason={reason!r}"
        )
