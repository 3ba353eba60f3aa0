"""Iterations, speed-up and efficiency at any scale, from a recorded run."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_adascale.forecast.record import Record
from tf_adascale.ops import _arguments
from tf_adascale.ops import gain as gain_ops

# `scale_at_efficiency` searches log2 S up to this value, to this precision.
_LARGEST_LOG2 = 64.0
_PRECISION = 1e-9


class Row(NamedTuple):
    """The forecast for one scale.

    Attributes:
        scale: float, S.
        iterations: float, T(S).
        speedup: float, T(1) / T(S). The speed-up in time is at most that: it
            equals it if an iteration at scale S takes as long as one at S = 1.
        efficiency: float, speedup / S, the mean of r_S / S over the iterations:
            the examples used at S = 1 divided by those used at S.
    """

    scale: float
    iterations: float
    speedup: float
    efficiency: float


def iterations(
    record: Record, scale: float, *, total_steps: float | None = None
) -> float:
    """Returns the number of steps that training would take at a scale.

        T(S) = integral of d tau / r_S(tau)    from tau = 0 to T_SI         (1)

    r_S(tau) is the gain at scale S of the averages recorded at tau. Each row
    stands for the stretch of tau that it ends. From a log with one row per
    step, T at the run's own scale is the number of steps it took.

    Args:
        record: `Record`.
        scale: number > 0, S.
        total_steps: number > 0, T_SI, in steps at the base batch size. None is
            the record's last tau. Beyond that the last row holds.

    Returns:
        Float, T(S).

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> # Equal signal and noise: r_S = 2 / (1/S + 1), which is 8/5 at S = 4.
    >>> record = Record(*np.array([[40.0, 80.0], [1.0, 1.0], [1.0, 1.0]]))
    >>> iterations(record, 4), iterations(record, 4, total_steps=160)
    (50.0, 100.0)

    Reference: Johnson et al. 2020, equation (3) and algorithm 2.
    """
    scale = _arguments.scale(scale)
    ends = np.array(record.scale_invariant_step)
    if total_steps is not None:
        total_steps = _arguments.positive_number(
            "total_steps", total_steps, "the steps at the base batch size"
        )
        ends = np.minimum(ends, total_steps)
        ends[-1] = total_steps
    moments = gain_ops.Moments(
        tf.constant(record.gradient_variance, tf.float64),
        tf.constant(record.gradient_sqnorm, tf.float64),
    )
    gains = gain_ops.ratio(moments, scale=scale).numpy()
    return float(np.sum(np.diff(ends, prepend=0.0) / gains))


def rows(
    record: Record,
    scales: Iterable[float],
    *,
    total_steps: float | None = None,
) -> list[Row]:
    """Returns the forecast for several scales.

    Args:
        record: `Record`.
        scales: one or more numbers > 0.
        total_steps: as in `iterations`.

    Returns:
        List of `Row`, one per scale.

    Raises:
        ValueError: if an argument is out of its range, or there is no scale.

    Example:

    >>> record = Record(*np.array([[80.0], [1.0], [1.0]]))
    >>> for row in rows(record, [1, 4]):
    ...     print(row)
    Row(scale=1.0, iterations=80.0, speedup=1.0, efficiency=1.0)
    Row(scale=4.0, iterations=50.0, speedup=1.6, efficiency=0.4)
    """
    scales = list(scales)
    if not scales:
        raise ValueError(
            f"`scales` must be one or more numbers > 0. Received: {scales=}"
        )
    forecast = []
    for scale in scales:
        steps = iterations(record, scale, total_steps=total_steps)
        # At S = 1 every gain is 1.
        at_base = total_steps or float(record.scale_invariant_step[-1])
        speedup = at_base / steps
        forecast.append(Row(float(scale), steps, speedup, speedup / scale))
    return forecast


def scale_at_efficiency(
    record: Record, efficiency: float, *, total_steps: float | None = None
) -> float:
    """Returns the largest scale with at least a given efficiency.

    Args:
        record: `Record`.
        efficiency: number in (0, 1], see `Row`.
        total_steps: as in `iterations`.

    Returns:
        Float >= 1. Infinite if S = 2^64 still has this efficiency.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> # Equal signal and noise: the efficiency is 2 / (1 + S), 1/2 at S = 3.
    >>> record = Record(*np.array([[80.0], [1.0], [1.0]]))
    >>> round(scale_at_efficiency(record, 0.5), 6)
    3.0
    """
    efficiency = _arguments.number_in("efficiency", efficiency, "(0, 1]")

    def is_reached(log2_scale):
        (row,) = rows(record, [2.0**log2_scale], total_steps=total_steps)
        return row.efficiency >= efficiency

    # The efficiency is 1 at S = 1 and falls with S.
    low, high = 0.0, _LARGEST_LOG2
    if is_reached(high):
        return math.inf
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if is_reached(middle) else (low, middle)
    return 2.0**low
