"""Compares forecasts from a run at a small scale with runs at larger scales.

A run with AdaScale at S = 4 forecasts the number of iterations T(S) at S = 8,
16 and 32. Then AdaScale trains at these scales. The recorded run uses the
smoothing of a run at the middle scale: its own averages are longer and would
lag behind.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, equation (3)
Command:  python -m examples.studies.forecast --seeds=0,1,2
          python -m examples.studies.forecast digits --recorded=2 --scales=64
Hardware: 2 CPU cores
Time:     6 minutes of processor time per seed; the same command resumes a run
          that was stopped
Metric:   (forecast - iterations) / iterations: see docs/forecast.md
"""

import argparse
import math
import os
from typing import NamedTuple

from examples.common import runs
from tf_adascale import forecast
from tf_adascale.ops import gain as gain_ops

BENCHMARKS = ("digits", "transformer")


class Row(NamedTuple):
    """One run and its forecast.

    Attributes:
        benchmark: str.
        scale: int, S.
        seed: int.
        forecast: float, T(S) forecast from the recorded run.
        iterations: int, steps taken.
    """

    benchmark: str
    scale: int
    seed: int
    forecast: float
    iterations: int

    @property
    def error(self):
        """Float, (forecast - iterations) / iterations."""
        return self.forecast / self.iterations - 1


def study(benchmark, *, recorded, scales, seed, out):
    """Forecasts the iterations of a benchmark, then counts them.

    Runs that are in the directory already are not repeated.

    Args:
        benchmark: str, one of `BENCHMARKS`.
        recorded: int, S of the recorded run.
        scales: sequence of int, S of the runs to forecast.
        seed: int, of all runs.
        out: str, directory.

    Yields:
        `Row` per scale, as they finish.
    """
    middle = math.sqrt(min(scales) * max(scales))
    smoothing = f"--smoothing={gain_ops.default_smoothing(middle):.3f}"
    record = forecast.read(_run(benchmark, recorded, seed, out, smoothing).log)
    for scale in scales:
        run = _run(benchmark, scale, seed, out)
        yield Row(
            benchmark,
            scale,
            seed,
            forecast.iterations(record, scale),
            run.result["iterations"],
        )


def table(rows):
    """Returns a Markdown table of rows, with a line for all seeds.

    Example:

    >>> print(table([Row("digits", 8, 0, 99.0, 90), Row("digits", 8, 1, 95.0,
    ...                                                 100)]))
    | benchmark | S | forecast | real | error |
    |---|---|---|---|---|
    | digits | 8 | 99.0, 95.0 | 90, 100 | +10.0 %, -5.0 % |
    """
    lines = [
        "| benchmark | S | forecast | real | error |",
        "|---|---|---|---|---|",
    ]
    groups = {}
    for row in rows:
        groups.setdefault((row.benchmark, row.scale), []).append(row)
    for (benchmark, scale), group in groups.items():
        cells = (
            benchmark,
            str(scale),
            ", ".join(f"{row.forecast:.1f}" for row in group),
            ", ".join(str(row.iterations) for row in group),
            ", ".join(f"{100 * row.error:+.1f} %" for row in group),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None):
    """Trains, forecasts, prints the table and returns the rows."""
    parser = argparse.ArgumentParser(
        description="Compares forecasts with runs of AdaScale."
    )
    parser.add_argument(
        "benchmarks", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--out", default="out/forecast", help="directory")
    parser.add_argument("--seeds", default="0", help="for example 0,1,2")
    parser.add_argument(
        "--recorded", type=int, default=4, help="S of the recorded run"
    )
    parser.add_argument(
        "--scales", default="8,16,32", help="S of the runs to forecast"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.benchmarks) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    rows = [
        row
        for benchmark in options.benchmarks or BENCHMARKS
        for seed in options.seeds.split(",")
        for row in study(
            benchmark,
            recorded=options.recorded,
            scales=[int(scale) for scale in options.scales.split(",")],
            seed=int(seed),
            out=options.out,
        )
    ]
    print(f"\nForecast from S = {options.recorded}:\n\n{table(rows)}")
    return rows


def _run(benchmark, scale, seed, out, *flags):
    """Returns the run in its directory, and trains it if it is missing."""
    name = "-".join([f"S{scale}-seed{seed}", *flags]).replace("--", "")
    model_dir = os.path.join(out, benchmark, name)
    if os.path.exists(os.path.join(model_dir, "result.json")):
        return runs.read(model_dir)
    return runs.train(
        benchmark,
        model_dir,
        "--algorithm=adascale",
        f"--scale={scale}",
        f"--seed={seed}",
        *flags,
    )


if __name__ == "__main__":
    main()
