"""Runs of the trainers: started in separate processes, and read back."""

import csv
import json
import multiprocessing
import os
import subprocess
import sys
from typing import NamedTuple

TITLES = {
    "identity": "SGD",
    "adascale": "AdaScale",
    "adamscale": "AdamScale",
    "adasum": "Adasum",
    "average": "average",
    "linear": "linear",
    "sqrt": "square root",
    "lsw": "LSW",
    "lsw_plus": "LSW+",
}


class Run(NamedTuple):
    """A finished run, read from its model directory.

    Attributes:
        result: dict, the fields of `training.Result`.
        log: dict from column to list of float, one per row.
    """

    result: dict
    log: dict

    @property
    def steps(self):
        """List of int, the last iteration of each row of the log."""
        return [int(step) for step in self.log["step"]]

    @property
    def label(self):
        """Str, the run's name in tables and plots."""
        scale = self.result["scale"]
        which = f"S = {scale}" if isinstance(scale, int) else "elastic"
        return f"{TITLES[self.result['algorithm']]}, {which}"


def train(benchmark, model_dir, *arguments):
    """Trains in a separate process, which prints here, and returns the `Run`.

    Args:
        benchmark: str, the folder of a trainer, for example "digits".
        model_dir: str.
        *arguments: str, further flags, for example "--scale=64".

    Raises:
        subprocess.CalledProcessError: if the process fails.
    """
    command = [
        sys.executable,
        "-m",
        f"examples.{benchmark}.train",
        f"--model_dir={model_dir}",
        *arguments,
    ]
    print("\n$ " + " ".join(["python", *command[1:]]), flush=True)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
    subprocess.run(command, check=True, env=quiet)
    return read(model_dir)


def read(model_dir):
    """Returns the `Run` in a model directory."""
    with open(os.path.join(model_dir, "result.json")) as file:
        result = json.load(file)
    with open(os.path.join(model_dir, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    log = {
        name: [float(row[name]) for row in rows]
        for name in rows[0]
        if not name.startswith("val_")  # Empty columns: no validation.
    }
    return Run(result, log)


def rows(out):
    """Returns the rows of a directory's results.csv: a list of dicts of str."""
    path = os.path.join(out, "results.csv")
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(out, row):
    """Appends a row, a `NamedTuple`, to a directory's results.csv."""
    path = os.path.join(out, "results.csv")
    is_new = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(row._fields)
        writer.writerow(row)


def alone(function, *arguments, **options):
    """Calls a function in a separate process and returns its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments, options)


def table(results):
    """Returns a plain-text table of runs.

    Args:
        results: list of `Run`, all of the same benchmark.

    Example:

    >>> result = {"algorithm": "adascale", "scale": 64, "iterations": 68,
    ...           "examples": 69632, "metric": "accuracy", "value": 0.9917,
    ...           "mean_gain": 22.43}
    >>> print(table([Run(result, {})]))
    algorithm   S  iterations  examples  accuracy  mean gain
    AdaScale   64          68     69632    99.2 %       22.4
    """
    metric = results[0].result["metric"]
    rows = [
        ("algorithm", "S", "iterations", "examples", metric, "mean gain"),
    ]
    for run in results:
        gain = run.result["mean_gain"]
        rows.append(
            (
                TITLES[run.result["algorithm"]],
                str(run.result["scale"]),
                str(run.result["iterations"]),
                str(run.result["examples"]),
                f"{run.result['value']:.1%}".replace("%", " %"),
                "-" if gain is None else f"{gain:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
