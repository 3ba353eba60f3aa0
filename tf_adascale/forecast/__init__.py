"""What other scales would buy, from one recorded run.

`callbacks.ScalingLog` records the gradient's moments at the base batch size.
They give the gain at every scale, and so the iterations of training there:

    T(S) = integral of d tau / r_S(tau)    from tau = 0 to T_SI

One device is enough for the run: four micro-batches are four gradient samples.

Averages lag behind: by default they remember 1000 base batches, which a run at
a large scale has over in a few steps. To forecast for a scale S, record with
the averages that a run there has:
`AdaScale(smoothing=gain.default_smoothing(S))`.

The same from the command line: `python -m tf_adascale.forecast --help`.
"""

import csv
import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_adascale import gain

# Efficiencies are looked for up to this scale, 2^64.
_LARGEST_LOG2 = 64.0

# Of the logarithm of a scale.
_PRECISION = 1e-9


class Record(NamedTuple):
    """A recorded run: a value per row of its log.

    Attributes:
        scale_invariant_step: float64 array [rows], tau at the end of the row.
        gradient_variance: float64 array [rows], the average of sigma^2 there.
        gradient_sqnorm: float64 array [rows], the average of mu^2 there.
    """

    scale_invariant_step: np.ndarray
    gradient_variance: np.ndarray
    gradient_sqnorm: np.ndarray


class Row(NamedTuple):
    """The forecast for one scale.

    Attributes:
        scale: float, S.
        iterations: float, T(S).
        speedup: float, T(1) / T(S). In time it is at most that: an iteration at
            scale S takes as long as one at S = 1 only if no device waits.
        efficiency: float, speedup / S: the mean of r / S over the iterations;
            the examples that training at S = 1 takes over those it takes here.
    """

    scale: float
    iterations: float
    speedup: float
    efficiency: float


def read(log):
    """Returns the record of a run.

    Of a run by AdaScale at any scale, from several gradient samples per step
    (replicas, or micro-batches on one device). A log that was appended to when
    the run went on is one run. Rows in which no step was taken are left out.

    Args:
        log: path of a CSV that `keras.callbacks.CSVLogger`, listed after
            `callbacks.ScalingLog`, wrote; or `keras.callbacks.History`, or its
            dict from column to list.

    Returns:
        `Record`.

    Raises:
        ValueError: if columns are missing, a line is cut short, a value is not
            a finite number, tau falls, or nothing was measured. It names the
            line of the file, or the row of the history.

    Example:

    >>> history = {"scale_invariant_step": [1.5, 3.0], "loss": [0.7, 0.6],
    ...            "gradient_variance": [2.0, 2.0],
    ...            "gradient_sqnorm": [0.5, 0.5]}
    >>> read(history).scale_invariant_step
    array([1.5, 3. ])
    """
    if isinstance(log, keras.callbacks.History):
        log = log.history
    is_history = isinstance(log, dict)
    rows, previous = [], 0.0
    for where, line in _history_lines(log) if is_history else _csv_lines(log):
        row = [_number(line, column, where) for column in Record._fields]
        if row[0] < previous:
            raise ValueError(
                "The scale-invariant step falls. Expected the log of one run. "
                f"Received: {where}: scale_invariant_step={row[0]} after "
                f"{previous}"
            )
        if row[0] > previous:
            rows.append(row)
        previous = row[0]
    if not any(variance or sqnorm for _, variance, sqnorm in rows):
        raise ValueError(
            "The log holds no measurement of the gradient. Expected a run by "
            "AdaScale with several gradient samples per step. Received: "
            f"log={'history' if is_history else str(log)!r}, with {len(rows)} "
            "rows in which training advanced"
        )
    return Record(*np.array(rows).T)


def iterations(record, scale, *, total_steps=None):
    """Returns the steps that training would take at a scale.

        T(S) = integral of d tau / r_S(tau)    from tau = 0 to T_SI

    r_S is the gain at S of the averages that were recorded. Each row stands for
    the stretch of tau that it ends: from a log with a row per step, T at the
    run's own scale is the steps it took.

    Args:
        record: `Record`.
        scale: number > 0, S.
        total_steps: number > 0, T_SI, in steps at the base batch. By default
            the record's last. Beyond its end its last row holds.

    Returns:
        Float.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> # As much signal as noise: r = 2 / (1/S + 1), 8/5 at S = 4.
    >>> record = read({"scale_invariant_step": [40, 80],
    ...                "gradient_variance": [1, 1], "gradient_sqnorm": [1, 1]})
    >>> iterations(record, 4), iterations(record, 4, total_steps=160)
    (50.0, 100.0)

    Reference: Johnson et al. 2020, equation (3) and algorithm 2.
    """
    _check(scale, name="scale")
    ends = np.array(record.scale_invariant_step)
    if total_steps is not None:
        _check(total_steps, name="total_steps")
        ends = np.minimum(ends, total_steps)
        ends[-1] = total_steps
    moments = gain.Moments(
        tf.constant(record.gradient_variance, tf.float64),
        tf.constant(record.gradient_sqnorm, tf.float64),
    )
    gains = gain.ratio(moments, scale=float(scale)).numpy()
    return float(np.sum(np.diff(ends, prepend=0.0) / gains))


def rows(record, scales, *, total_steps=None):
    """Returns the forecast for several scales.

    Args:
        record: `Record`.
        scales: sequence of numbers > 0.
        total_steps: as in `iterations`.

    Returns:
        List of `Row`, one per scale.

    Raises:
        ValueError: if an argument is out of range, or there is no scale.

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
            "There is no scale to forecast. Expected one or more numbers > 0. "
            f"Received: scales={scales}"
        )
    forecast = []
    for scale in scales:
        steps = iterations(record, scale, total_steps=total_steps)
        # At S = 1 every gain is 1.
        at_base = total_steps or float(record.scale_invariant_step[-1])
        speedup = at_base / steps
        forecast.append(Row(float(scale), steps, speedup, speedup / scale))
    return forecast


def scale_at_efficiency(record, efficiency, *, total_steps=None):
    """Returns the scale at which the efficiency falls under a value.

    Args:
        record: `Record`.
        efficiency: number in (0, 1], see `Row`.
        total_steps: as in `iterations`.

    Returns:
        Float >= 1, the largest scale that is still so efficient; infinite if
        2^64 is.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> # 2 / (1 + S) where signal and noise are equal: 1/2 at S = 3.
    >>> record = Record(*np.array([[80.0], [1.0], [1.0]]))
    >>> round(scale_at_efficiency(record, 0.5), 6)
    3.0
    """
    _check(efficiency, name="efficiency", most=1)

    def reaches(log2_scale):
        (row,) = rows(record, [2.0**log2_scale], total_steps=total_steps)
        return row.efficiency >= efficiency

    # The efficiency is 1 at S = 1.
    low, high = 0.0, _LARGEST_LOG2
    if reaches(high):
        return math.inf
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return 2.0**low


def table(rows):
    """Returns a forecast as a table in plain text.

    Args:
        rows: list of `Row`.

    Example:

    >>> print(table([Row(1.0, 80.0, 1.0, 1.0), Row(4.0, 50.0, 1.6, 0.4)]))
    S  iterations  speed-up  efficiency
    1        80.0      1.00     100.0 %
    4        50.0      1.60      40.0 %
    """
    cells = [("S", "iterations", "speed-up", "efficiency")]
    cells += [
        (
            f"{row.scale:.12g}",
            f"{row.iterations:.1f}",
            f"{row.speedup:.2f}",
            f"{100 * row.efficiency:.1f} %",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths))
        for line in cells
    )


def write_csv(rows, path):
    """Writes a forecast as a CSV.

    `pandas.read_csv(path)` gets a row per scale and the columns scale,
    iterations, speedup and efficiency, all float64.

    Args:
        rows: list of `Row`.
        path: str, of the file.

    Example:

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "forecast.csv")
    >>> write_csv([Row(4.0, 50.0, 1.6, 0.4)], path)
    >>> print(path.read_text())
    scale,iterations,speedup,efficiency
    4.0,50.0,1.6,0.4
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Row._fields, *rows])


def picture(rows, path):
    """Draws the speed-up over the scale, beside the ideal one, as a PNG.

    Args:
        rows: list of `Row`. The efficiency of at most a dozen is written.
        path: str, of the file.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "forecast.png")
    >>> picture([Row(1.0, 80.0, 1.0, 1.0), Row(4.0, 50.0, 1.6, 0.4)], path)
    """
    try:
        from matplotlib import figure, ticker
    except ImportError as error:
        raise ImportError(
            "The picture needs matplotlib, which is not installed. Install it: "
            'pip install "tf_adascale[plot]".'
        ) from error
    rows = sorted(rows)
    labelled = rows[:: math.ceil(len(rows) / 12)]
    scales = [row.scale for row in rows]
    # Without pyplot, which would look for a display.
    page = figure.Figure(figsize=(7, 5), layout="constrained")
    panel = page.subplots()
    panel.plot(scales, scales, color="#999999", linestyle=":")
    panel.text(
        scales[-1], scales[-1], "ideal: S  ", ha="right", color="#777777"
    )
    panel.plot(
        scales, [row.speedup for row in rows], color="#0b6fb8", marker="o"
    )
    for row in labelled:
        _label(panel, row)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks([row.scale for row in labelled])
    panel.set(
        title="Forecast: how many times fewer iterations, and efficiency",
        xlabel="scale S",
        ylabel="speed-up over S = 1",
    )
    panel.margins(0.08)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(ticker.FormatStrFormatter("%.4g"))
        axis.set_minor_locator(ticker.NullLocator())
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25)
    page.savefig(path, format="png", dpi=150)


def _label(panel, row):
    """Writes the efficiency under a row's point."""
    panel.annotate(
        f"{row.efficiency:.0%}".replace("%", " %"),
        (row.scale, row.speedup),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center",
        color="#0b6fb8",
    )


def _csv_lines(path):
    """Yields (where, dict from column to text) for each line of a CSV."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        _check_columns(header, where=f"{path}, line 1")
        for fields in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(header):
                raise ValueError(
                    f"A line is not whole. Expected {len(header)} fields, as "
                    f"in line 1. Received: {where}: fields={fields}"
                )
            yield where, dict(zip(header, fields))


def _history_lines(history):
    """Yields (where, dict from column to value) for each row of a history."""
    _check_columns(history, where="history")
    columns = [history[name] for name in Record._fields]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            "The columns of the history differ in length. Expected a value per "
            f"row in each. Received: rows={dict(zip(Record._fields, lengths))}"
        )
    for number, values in enumerate(zip(*columns), start=1):
        yield f"history, row {number}", dict(zip(Record._fields, values))


def _check_columns(columns, *, where):
    missing = [name for name in Record._fields if name not in columns]
    if missing:
        raise ValueError(
            f"The log lacks the columns {missing}. Expected those of "
            "tf_adascale.callbacks.ScalingLog, listed before CSVLogger. "
            f"Received: {where}: columns={list(columns)}"
        )


def _number(line, column, where):
    try:
        number = float(line[column])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"The {column} is no such number. Expected a finite one. "
            f"Received: {where}: {column}={line[column]!r}"
        )
    return number


def _check(value, *, name, most=math.inf):
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if not is_number or not 0 < value <= min(most, 1e300):
        raise ValueError(
            f"The {name} is out of range. Expected a finite number > 0"
            f"{'' if most == math.inf else f' and <= {most}'}. "
            f"Received: {name}={value!r}"
        )
