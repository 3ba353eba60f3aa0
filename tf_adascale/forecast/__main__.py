"""Prints a forecast of training at other scales, from the log of one run.

python -m tf_adascale.forecast --log=run.csv --scales=1,2,4,...,1024
"""

import argparse
import csv
import math
from collections.abc import Sequence

import tensorflow as tf

from tf_adascale import forecast

# A progression of more terms is a typing error.
_MOST_SCALES = 1000


def parsed_scales(text: str) -> list[float]:
    """Returns the scales in a comma-separated list.

    "..." continues the progression of the terms before it, at least two, up to
    the term after it. The progression is geometric if that reaches the term,
    else arithmetic.

    Args:
        text: the list.

    Returns:
        List of floats.

    Raises:
        ValueError: if the list cannot be parsed.

    Example:

    >>> parsed_scales("1,2,...,16")
    [1.0, 2.0, 4.0, 8.0, 16.0]
    >>> parsed_scales("8,12,...,24,100")
    [8.0, 12.0, 16.0, 20.0, 24.0, 100.0]
    """
    scales, terms = [], iter(text.split(","))
    try:
        for term in terms:
            if term.strip() == "...":
                scales += _continued(scales, float(next(terms)))
            else:
                scales.append(float(term))
    except (ValueError, StopIteration, ZeroDivisionError):
        raise ValueError(
            "`scales` must be numbers separated by commas, with ... between "
            "terms of a progression, as in 1,2,4,...,1024. Received: "
            f"scales={text!r}"
        ) from None
    return scales


def _continued(terms, end):
    """Returns the terms after the last one, up to and including the end."""
    before, last = terms[-2:]  # Raises a ValueError if there are fewer.
    steps = [
        lambda term: term * (last / before),
        lambda term: term + (last - before),
    ]
    if len(terms) > 2:  # A third term may exclude one of them.
        fitting = [s for s in steps if math.isclose(s(terms[-3]), before)]
        steps = fitting or steps
    for step in steps:
        more = [step(last)]
        while (
            abs(end - step(more[-1])) < abs(end - more[-1])
            and len(more) < _MOST_SCALES
        ):
            more.append(step(more[-1]))
        if math.isclose(more[-1], end):
            return [*more[:-1], end]
    raise ValueError


def main(arguments: Sequence[str] | None = None) -> list[forecast.Row]:
    """Prints the forecast and returns its rows.

    Args:
        arguments: flags. None is those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tf_adascale.forecast",
        description="Forecasts how many iterations training would take at "
        "other scales, from the log of one AdaScale run at any scale.",
    )
    parser.add_argument(
        "--log",
        required=True,
        metavar="PATH",
        help="CSV by keras.callbacks.CSVLogger, listed after "
        "tf_adascale.callbacks.ScalingLog",
    )
    parser.add_argument(
        "--scales",
        default="1,2,4,...,1024",
        help="numbers > 0, and ... between terms of a progression "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--total_steps",
        type=float,
        help="steps of training at the base batch size (default: the log's "
        "last scale_invariant_step)",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.5,
        help="number in (0, 1]; prints the largest scale whose speed-up / "
        "scale is at least this (default: %(default)s)",
    )
    parser.add_argument(
        "--csv", metavar="PATH", help="write the table to a CSV"
    )
    parser.add_argument("--picture", metavar="PATH", help="draw a PNG")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (ImportError, OSError, ValueError, csv.Error) as error:
        return parser.error(str(error))


def _run(options):
    record = forecast.read(options.log)
    total_steps = options.total_steps
    rows = forecast.rows(
        record, parsed_scales(options.scales), total_steps=total_steps
    )
    limit = forecast.scale_at_efficiency(
        record, options.efficiency, total_steps=total_steps
    )
    efficiency = f"{100 * options.efficiency:g} %"
    print(forecast.table(rows))
    if math.isinf(limit):
        print(f"\nThe efficiency is {efficiency} or more at every scale.")
    else:
        print(f"\nThe efficiency falls under {efficiency} at S = {limit:.1f}.")
    if options.csv:
        forecast.write_csv(rows, options.csv)
    if options.picture:
        forecast.picture(rows, options.picture)
    return rows


if __name__ == "__main__":
    # Leave the GPUs to training: the forecast needs none.
    tf.config.set_visible_devices([], "GPU")
    main()
