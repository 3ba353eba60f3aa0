"""Compares forecasts from one run at a small scale with runs at larger ones.

From a run by AdaScale at S = 4 it is forecast how many iterations T(S) training
takes at S = 8, 16 and 32, where AdaScale is then run. The averages of the
recorded run are as short as those of a run in the middle of these: longer ones
lag behind.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, equation (3)
Command:  python -m examples.forecast_study --seeds=0,1,2
          python -m examples.forecast_study digits --recorded=2 --scales=64
Hardware: 2 CPU cores
Time:     6 minutes of processor time per seed; given again, it goes on where
          it was stopped
"""

import argparse
import math
import os
from typing import NamedTuple

from examples import runs
from tf_adascale import forecast, gain

BENCHMARKS = ("digits", "transformer")


class Row(NamedTuple):
    """One run, and what was forecast.

    Attributes:
        benchmark: str.
        scale: int, S.
        seed: int.
        forecast: float, T(S) by the run at the recorded scale.
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

    Args:
        benchmark: str, one of `BENCHMARKS`.
        recorded: int, S of the run that the forecast is made from.
        scales: sequence of int, what it is made for.
        seed: int, of all runs.
        out: str, directory; what it has is not trained again.

    Yields:
        `Row` per scale, as they finish.
    """
    middle = math.sqrt(min(scales) * max(scales))
    smoothing = f"--smoothing={gain.default_smoothing(middle):.3f}"
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
    """Returns rows as a table in Markdown, the seeds of a line together.

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
    """Trains, forecasts and compares; returns the list of `Row`."""
    parser = argparse.ArgumentParser(
        description="Compares forecasts with runs of AdaScale."
    )
    parser.add_argument(
        "benchmarks", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--out", default="out/forecast", help="directory")
    parser.add_argument("--seeds", default="0", help="as in 0,1,2")
    parser.add_argument(
        "--recorded", type=int, default=4, help="S of the run to forecast from"
    )
    parser.add_argument(
        "--scales", default="8,16,32", help="S of the runs to compare with"
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
    """Returns the run in its directory, trained if it is not there."""
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
