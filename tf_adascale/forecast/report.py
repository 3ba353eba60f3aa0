"""Forecasts as a table, a CSV or a picture."""

import csv
import math
import os
from collections.abc import Iterable

from tf_adascale.forecast.prediction import Row


def table(rows: Iterable[Row]) -> str:
    """Returns a forecast as a plain-text table.

    Args:
        rows: one or more `Row`s.

    Returns:
        String of a header and one line per row.

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


def write_csv(rows: Iterable[Row], path: str | os.PathLike[str]) -> None:
    """Writes a forecast as a CSV.

    `pandas.read_csv(path)` returns one row per scale, and the columns scale,
    iterations, speedup and efficiency, all float64.

    Args:
        rows: `Row`s.
        path: path of the file to write.

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


def picture(rows: Iterable[Row], path: str | os.PathLike[str]) -> None:
    """Plots speed-up against scale, with the ideal speed-up, as a PNG.

    Args:
        rows: one or more `Row`s. At most 12 points are labelled with their
            efficiency.
        path: path of the file to write.

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
            "`picture` needs matplotlib, which is not installed. Install it "
            "with pip install matplotlib."
        ) from error
    rows = sorted(rows)
    labelled = rows[:: math.ceil(len(rows) / 12)]
    scales = [row.scale for row in rows]
    # A figure made without pyplot needs no display.
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
        title="Forecast: speed-up in iterations, and efficiency",
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
