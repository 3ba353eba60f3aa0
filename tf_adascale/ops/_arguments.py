"""Checks of arguments that several modules make.

Each check returns the argument as a plain Python number or string, or raises a
ValueError of one form:

    `name` must be RULE: MEANING. Received: name=value
"""

import math
import numbers
from collections.abc import Sequence


def finite(value: object) -> float | None:
    """Returns a finite number as a float, and None for anything else.

    Example:

    >>> finite(2), finite(math.nan), finite("2"), finite(True)
    (2.0, None, None, None)
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # An int beyond the largest float.
        return None
    return number if math.isfinite(number) else None


def positive_number(name: str, value: object, meaning: str = "") -> float:
    """Returns a finite number > 0 as a float.

    Args:
        name: the argument's name.
        value: the argument. A bool is not a number.
        meaning: what the argument stands for; ends the error's first sentence.

    Raises:
        ValueError: if `value` is anything else.

    Example:

    >>> positive_number("scale", 8)
    8.0
    >>> positive_number("scale", 0)
    Traceback (most recent call last):
    ValueError: `scale` must be a finite number > 0. Received: scale=0
    """
    number = finite(value)
    if number is None or number <= 0:
        raise _error(name, "a finite number > 0", value, meaning)
    return number


def nonnegative_number(name: str, value: object, meaning: str = "") -> float:
    """Returns a finite number >= 0 as a float.

    Args:
        name: the argument's name.
        value: the argument.
        meaning: as in `positive_number`.

    Raises:
        ValueError: if `value` is anything else.

    Example:

    >>> nonnegative_number("power", 0)
    0.0
    """
    number = finite(value)
    if number is None or number < 0:
        raise _error(name, "a finite number >= 0", value, meaning)
    return number


def scale(value: object) -> float:
    """Returns the argument `scale` as a float.

    Args:
        value: the argument.

    Raises:
        ValueError: if `value` is not a finite number > 0.

    Example:

    >>> scale(8)
    8.0
    """
    return positive_number(
        "scale", value, "the batch of one step divided by the base batch"
    )


def number_in(
    name: str, value: object, interval: str, meaning: str = ""
) -> float:
    """Returns a number in an interval as a float.

    Args:
        name: the argument's name.
        value: the argument.
        interval: two ends in brackets. A round bracket excludes its end.
        meaning: as in `positive_number`.

    Raises:
        ValueError: if `value` is anything else.

    Example:

    >>> number_in("efficiency", 1, "(0, 1]")
    1.0
    """
    number = finite(value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    if (
        number is None
        or not low <= number <= high
        or (number == low and interval[0] == "(")
        or (number == high and interval[-1] == ")")
    ):
        raise _error(name, f"a number in {interval}", value, meaning)
    return number


def integer(
    name: str, value: object, *, least: int = 1, meaning: str = ""
) -> int:
    """Returns an integer of at least `least` as an int.

    Args:
        name: the argument's name.
        value: the argument. A float is not an integer, and neither is a bool.
        least: the smallest integer allowed.
        meaning: as in `positive_number`.

    Raises:
        ValueError: if `value` is anything else.

    Example:

    >>> integer("microbatches", 4)
    4
    """
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or int(value) < least:
        raise _error(name, f"an int >= {least}", value, meaning)
    return int(value)


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """Returns a string that is one of several.

    Args:
        name: the argument's name.
        value: the argument.
        choices: the strings allowed.

    Raises:
        ValueError: if `value` is anything else.

    Example:

    >>> one_of("combine", "updates", ("updates", "gradients"))
    'updates'
    """
    if not isinstance(value, str) or value not in choices:
        raise _error(name, f"one of {tuple(choices)}", value)
    return value


def _error(
    name: str, rule: str, value: object, meaning: str = ""
) -> ValueError:
    meaning = meaning and f": {meaning}"
    return ValueError(
        f"`{name}` must be {rule}{meaning}. Received: {name}={value!r}"
    )
