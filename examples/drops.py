"""Records that cannot be used are left out, counted and told of.

One bad record among a million must not end a run of days, and a dataset that is
bad throughout must not pass for an empty one. Dropped records are told of, by a
warning at the 1st, 2nd, 4th, 8th ..., when the next good one is read.
"""

import tensorflow as tf
from absl import logging

# Once this many records were seen, at most half of them may have been dropped.
ENOUGH_TO_JUDGE = 200


def filtered(dataset, predicate, reason):
    """Returns the elements that satisfy a predicate; counts the others.

    Args:
        dataset: `tf.data.Dataset`.
        predicate: callable of an element, returns a boolean scalar.
        reason: str, why the others are dropped.

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
    """Returns a function of the elements; drops those at which it fails.

    It is for functions that fail for nothing but the reason given.

    Args:
        dataset: `tf.data.Dataset`.
        function: callable of an element, for example one that decodes images.
        reason: str, why elements at which it fails are dropped.
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
    """Returns values, counting what was dropped for each.

    Args:
        dataset: `tf.data.Dataset` of (value, dropped, seen): int64 scalars that
            say how many of how many records this element stands for were
            dropped.
        reason: str, why.
    """

    def count(totals, element):
        value, dropped, seen = element
        before, seen_before = totals
        now, seen_now = before + dropped, seen_before + seen
        told = tf.cond(
            dropped > 0,
            lambda: tf.numpy_function(tell, [before, now, seen_now], tf.int64),
            lambda: now,
        )
        return (told, seen_now), value

    def tell(before, now, seen):
        _tell(int(before), int(now), int(seen), reason)
        return now

    zero = tf.constant(0, tf.int64)
    values = dataset.scan((zero, zero), lambda *args: count(*args))
    # A filter's length is unknown: without what was dropped it is not that of
    # the data.
    return values.filter(lambda *value: True)


def _counted(numbered, reason):
    """Returns the elements of a numbered dataset, counting the gaps."""

    def gap(expected, element):
        number, value = element
        return number + 1, (value, number - expected, number - expected + 1)

    gaps = numbered.scan(tf.constant(0, tf.int64), lambda *args: gap(*args))
    return counted(gaps, reason)


def _tell(before, dropped, seen, reason):
    """Logs a count that doubled; raises a ValueError if it is too high."""
    if dropped.bit_length() > before.bit_length():
        logging.warning(
            "%d of %d records dropped so far: %s", dropped, seen, reason
        )
    if seen >= ENOUGH_TO_JUDGE and 2 * dropped > seen:
        raise ValueError(
            "Most records are unusable. Expected at most half of them to be "
            f"dropped. Received: dropped={dropped}, seen={seen}, "
            f"reason={reason!r}"
        )
