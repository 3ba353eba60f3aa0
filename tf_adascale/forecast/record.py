"""Recorded runs: the logs of `callbacks.ScalingLog`, read and checked."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np


class Record(NamedTuple):
    """A recorded run: one value per row of its log.

    Attributes:
        scale_invariant_step: float64 array [rows], tau at the end of the row.
        gradient_variance: float64 array [rows], averaged sigma^2 at that step,
            the trace of the gradient's covariance at the base batch size.
        gradient_sqnorm: float64 array [rows], averaged mu^2 at that step, the
            squared norm of the true gradient.
    """

    scale_invariant_step: np.ndarray
    gradient_variance: np.ndarray
    gradient_sqnorm: np.ndarray


def read(
    log: str
    | os.PathLike[str]
    | keras.callbacks.History
    | Mapping[str, Sequence[float]],
) -> Record:
    """Returns the record of a run by AdaScale at any scale.

    The run must have several gradient samples per step: replicas, or
    micro-batches on one device. A log to which a resumed run appended is one
    run. Rows in which no step was taken are left out.

    Args:
        log: path of a CSV by `keras.callbacks.CSVLogger`, listed after
            `callbacks.ScalingLog`; or a `keras.callbacks.History`; or its
            `history`, a dict from column to values.

    Returns:
        `Record`.

    Raises:
        ValueError: if columns are missing, a line is cut short, a value is not
            a finite number, tau falls, or nothing was measured. The message
            names the line of the file or the row of the history.

    Example:

    >>> history = {"scale_invariant_step": [1.5, 3.0], "loss": [0.7, 0.6],
    ...            "gradient_variance": [2.0, 2.0],
    ...            "gradient_sqnorm": [0.5, 0.5]}
    >>> read(history).scale_invariant_step
    array([1.5, 3. ])
    """
    if isinstance(log, keras.callbacks.History):
        log = log.history
    is_history = isinstance(log, Mapping)
    rows, previous = [], 0.0
    for where, line in _history_lines(log) if is_history else _csv_lines(log):
        row = [_number(line, column, where) for column in Record._fields]
        if row[0] < previous:
            raise ValueError(
                "`log` must hold one run, in which scale_invariant_step never "
                f"falls. Received: {where}: scale_invariant_step={row[0]} "
                f"after {previous}"
            )
        if row[0] > previous:
            rows.append(row)
        previous = row[0]
    if not any(variance or sqnorm for _, variance, sqnorm in rows):
        raise ValueError(
            "`log` must hold measurements of the gradient. Record a run by "
            "AdaScale with several gradient samples per step. Received: "
            f"log={'history' if is_history else str(log)!r}, with {len(rows)} "
            "rows in which training advanced"
        )
    return Record(*np.array(rows).T)


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
                    f"`log` must have {len(header)} fields in each line, as in "
                    f"line 1. Received: {where}: fields={fields}"
                )
            yield where, dict(zip(header, fields))


def _history_lines(history):
    """Yields (where, dict from column to value) for each row of a history."""
    _check_columns(history, where="history")
    columns = [history[name] for name in Record._fields]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            "`log` must have columns of one length. Received: "
            f"rows={dict(zip(Record._fields, lengths))}"
        )
    for number, values in enumerate(zip(*columns), start=1):
        yield f"history, row {number}", dict(zip(Record._fields, values))


def _check_columns(columns, *, where):
    missing = [name for name in Record._fields if name not in columns]
    if missing:
        raise ValueError(
            "`log` must have the columns of tf_adascale.callbacks.ScalingLog, "
            f"listed before CSVLogger; it lacks {missing}. Received: {where}: "
            f"columns={list(columns)}"
        )


def _number(line, column, where):
    try:
        number = float(line[column])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"`log` must hold finite numbers. Received: {where}: "
            f"{column}={line[column]!r}"
        )
    return number
