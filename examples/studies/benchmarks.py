"""Trains benchmarks with several algorithms, prints a table, draws a figure.

Trains the miniature of each benchmark with the plain optimizer at S = 1, then
with AdaScale and with other rules at larger scales.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, Table 2
Command:  python -m examples.studies.benchmarks --out=out/study
          python -m examples.studies.benchmarks cifar10 --seeds=0,1,2
          python -m examples.studies.benchmarks adamw --out=out/adamw
Hardware: 2 CPU cores
Time:     see docs/results.md; the same command resumes a run that was
          stopped
Metric:   see docs/results.md
"""

import argparse
import os
import time
from typing import NamedTuple

from matplotlib import ticker

from examples.common import figures, runs


class Benchmark(NamedTuple):
    """A benchmark of the study.

    Attributes:
        trainer: str, the folder of the trainer.
        scales: tuple of int, for all algorithms except "identity" (S = 1).
        algorithms: tuple of str, with "adascale" before "lsw_plus".
        optimizer: str, the title of "identity".
        flags: tuple of str, further flags of the trainer.
    """

    trainer: str
    scales: tuple
    algorithms: tuple = (
        "identity",
        "adascale",
        "linear",
        "sqrt",
        "lsw",
        "lsw_plus",
    )
    optimizer: str = "SGD"
    flags: tuple = ()


# The paper's benchmarks, each at a scale at which linear scaling fails.
SCALES = {
    "cifar10": 64,
    "imagenet": 32,
    "speech": 16,
    "transformer": 16,
    "yolo": 32,
}
BENCHMARKS = {
    **{name: Benchmark(name, (scale,)) for name, scale in SCALES.items()},
    "adamw": Benchmark(
        "transformer",
        (8, 32),
        algorithms=("identity", "adamscale", "sqrt", "linear"),
        optimizer="AdamW",
        flags=("--optimizer=adamw",),
    ),
}


class Row(NamedTuple):
    """One run: a row of results.csv.

    Attributes:
        benchmark: str, one of `BENCHMARKS`.
        algorithm: str.
        scale: int, S.
        seed: int.
        iterations: int, steps taken.
        metric: str, name of the metric.
        value: float, the metric on the test data.
        mean_gain: float, or "" for algorithms without a gain.
        seconds: float, wall time of the process, including its start.
    """

    benchmark: str
    algorithm: str
    scale: int
    seed: int
    iterations: int
    metric: str
    value: float
    mean_gain: float | str
    seconds: float


def study(name, *, seed, out, algorithms=None):
    """Trains a benchmark with several algorithms.

    Runs that are in the directory already are not repeated.

    Args:
        name: str, one of `BENCHMARKS`.
        seed: int.
        out: str, directory.
        algorithms: sequence of str, with "adascale" before "lsw_plus". Default:
            those of the benchmark.

    Yields:
        `Row` per algorithm and scale, as they finish.
    """
    benchmark = BENCHMARKS[name]
    done = {row[:4]: row for row in read(out)}
    # A dict removes duplicates: "identity" is the same for all scales.
    wanted = dict.fromkeys(
        (algorithm, 1 if algorithm == "identity" else scale)
        for scale in benchmark.scales
        for algorithm in algorithms or benchmark.algorithms
    )
    for algorithm, scale in wanted:
        key = (name, algorithm, scale, seed)
        if key not in done:
            flags = [
                f"--algorithm={algorithm}",
                f"--scale={scale}",
                f"--seed={seed}",
                *benchmark.flags,
            ]
            if algorithm == "lsw_plus":
                adascale = done[name, "adascale", scale, seed]
                flags.append(f"--iterations={adascale.iterations}")
            directory = f"{algorithm}-S{scale}-seed{seed}"
            begin = time.monotonic()
            run = runs.train(
                benchmark.trainer, os.path.join(out, name, directory), *flags
            )
            seconds = round(time.monotonic() - begin, 1)
            result = run.result
            done[key] = Row(
                *key,
                result["iterations"],
                result["metric"],
                round(result["value"], 4),
                "" if result["mean_gain"] is None else result["mean_gain"],
                seconds,
            )
            runs.append(out, done[key])
        yield done[key]


def read(out):
    """Returns the list of `Row` in a directory's results.csv."""
    return [
        Row(
            benchmark=row["benchmark"],
            algorithm=row["algorithm"],
            scale=int(row["scale"]),
            seed=int(row["seed"]),
            iterations=int(row["iterations"]),
            metric=row["metric"],
            value=float(row["value"]),
            mean_gain=row["mean_gain"] and float(row["mean_gain"]),
            seconds=float(row["seconds"]),
        )
        for row in runs.rows(out)
    ]


def table(rows):
    """Returns a Markdown table of rows, with a line for all seeds.

    Example:

    >>> seeds = [Row("cifar10", "adascale", 64, seed, iterations, "accuracy",
    ...              value, 20.0, 60.0)
    ...          for seed, iterations, value in [(0, 70, 0.99), (1, 74, 0.97)]]
    >>> print(table(seeds))
    | benchmark | algorithm | S | iterations | metric | mean gain | seconds |
    |---|---|---|---|---|---|---|
    | cifar10 | AdaScale | 64 | 72 | accuracy 98.0 % (99.0, 97.0) | 20.0 | 60 |
    """
    lines = [
        "| benchmark | algorithm | S | iterations | metric | mean gain "
        "| seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = {}
    for row in rows:
        groups.setdefault(row[:3], []).append(row)
    for (name, algorithm, scale), group in groups.items():
        values = [_percent(row) for row in group]
        unit = "" if group[0].metric == "bleu" else " %"
        each = ", ".join(f"{value:.1f}" for value in values)
        gain = "-"
        if group[0].mean_gain != "":
            gain = f"{_mean([row.mean_gain for row in group]):.1f}"
        cells = (
            name,
            _title(name, algorithm),
            str(scale),
            f"{_mean([row.iterations for row in group]):.0f}",
            f"{group[0].metric} {_mean(values):.1f}{unit}"
            + (f" ({each})" if len(group) > 1 else ""),
            gain,
            f"{_mean([row.seconds for row in group]):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(rows, path):
    """Draws quality over iterations, a panel per scale, and saves it."""
    shown = list(
        dict.fromkeys(
            (row.benchmark, scale)
            for row in rows
            for scale in BENCHMARKS[row.benchmark].scales
        )
    )
    page, panels = figures.page(1, len(shown), size=(3.2 * len(shown), 3.6))
    for (name, scale), panel in zip(shown, panels.flat):
        mine = [
            row
            for row in rows
            if row.benchmark == name
            and (row.scale == scale or row.algorithm == "identity")
        ]
        for row in mine:
            panel.plot(
                row.iterations,
                _percent(row),
                color=figures.COLORS[row.algorithm],
                marker="o",
                alpha=0.7,
            )
        panel.set(
            title=f"{name}, S = {scale}",
            xlabel="iterations",
            ylabel=mine[0].metric,
            xscale="log",
            ylim=(-5, 105),
        )
        # Labels powers of ten only, because the other labels would overlap.
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    titles = {
        row.algorithm: _title(row.benchmark, row.algorithm) for row in rows
    }
    for number, (algorithm, title) in enumerate(titles.items()):
        panels.flat[0].text(
            0.42,
            0.05 + 0.08 * number,
            f"{title}, S = 1" if algorithm == "identity" else title,
            color=figures.COLORS[algorithm],
            transform=panels.flat[0].transAxes,
        )
    page.savefig(path, dpi=110)


def main(arguments=None):
    """Trains, prints the table, draws the figure and returns the rows."""
    parser = argparse.ArgumentParser(
        description="Compares algorithms on benchmarks."
    )
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)}; default: those of the paper",
    )
    parser.add_argument("--out", default="out/study", help="directory")
    parser.add_argument("--seeds", default="0", help="for example 0,1,2")
    parser.add_argument(
        "--algorithms",
        help="for example identity,adascale; default: those of the benchmark",
    )
    options = parser.parse_args(arguments)
    algorithms = options.algorithms and options.algorithms.split(",")
    for kind, unknown in (
        ("benchmark", set(options.benchmarks) - set(BENCHMARKS)),
        ("algorithm", set(algorithms or ()) - set(runs.TITLES)),
    ):
        if unknown:
            parser.error(f"no such {kind}: {', '.join(unknown)}")
    os.makedirs(options.out, exist_ok=True)
    rows = [
        row
        for name in options.benchmarks or SCALES
        for seed in options.seeds.split(",")
        for row in study(
            name, seed=int(seed), out=options.out, algorithms=algorithms
        )
    ]
    path = os.path.join(options.out, "benchmarks.png")
    picture(rows, path)
    print(f"\n{table(rows)}\n\n{path}")
    return rows


def _title(name, algorithm):
    if algorithm == "identity":
        return BENCHMARKS[name].optimizer
    return runs.TITLES[algorithm]


def _percent(row):
    return row.value if row.metric == "bleu" else 100 * row.value


def _mean(values):
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
