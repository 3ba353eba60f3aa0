"""Trains the digits four ways, prints a table and draws the paper's Figure 1.

Plain SGD at S = 1 is the quality to preserve. At S = 64, AdaScale preserves it
in far fewer iterations; linear scaling with warm-up does not, neither in its
own number of iterations (LSW) nor in AdaScale's (LSW+).

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, Figure 1 and Table 2
Command:  python -m examples.digits.demo --out=out/demo
Hardware: 2 CPU cores
Time:     3 minutes; given again, it goes on where it was stopped
Metric:   accuracy: 99 % for SGD and AdaScale, 94 % for LSW+, 20 to 40 % for LSW
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from typing import NamedTuple

from matplotlib import figure

TITLES = {
    "identity": "SGD",
    "adascale": "AdaScale",
    "lsw": "LSW",
    "lsw_plus": "LSW+",
}
COLORS = {
    "identity": "#444444",
    "adascale": "#0b6fb8",
    "lsw": "#d1651a",
    "lsw_plus": "#b0912b",
}


class Run(NamedTuple):
    """A finished run, read from its model directory.

    Attributes:
        result: dict, the fields of `training.Result`.
        steps: list of int, the iteration that each row of the log ends with.
        log: dict from column to list of float, one per row.
    """

    result: dict
    steps: list
    log: dict

    @property
    def label(self):
        """String, for tables and plots."""
        return f"{TITLES[self.result['algorithm']]}, S = {self.result['scale']}"


def train(algorithm, out, *, scale, arguments=()):
    """Trains in a process of its own, in sight, and returns the `Run`.

    Raises:
        subprocess.CalledProcessError: if the process fails.
    """
    model_dir = os.path.join(out, algorithm)
    command = [
        sys.executable,
        "-m",
        "examples.digits.train",
        f"--algorithm={algorithm}",
        f"--scale={scale}",
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
    with open(os.path.join(model_dir, "run.json")) as file:
        steps_per_row = json.load(file)["steps_per_row"]
    with open(os.path.join(model_dir, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [
        min((int(row["epoch"]) + 1) * steps_per_row, result["iterations"])
        for row in rows
    ]
    log = {
        name: [float(row[name]) for row in rows]
        for name in rows[0]
        if not name.startswith("val_")  # Without validation there are none.
    }
    return Run(result, steps, log)


def table(runs):
    """Returns the runs as a table in plain text.

    Example:

    >>> result = {"algorithm": "adascale", "scale": 64, "iterations": 68,
    ...           "examples": 69632, "value": 0.9917, "mean_gain": 22.43}
    >>> print(table([Run(result, [], {})]))
    algorithm   S  iterations  examples  accuracy  mean gain
    AdaScale   64          68     69632    99.2 %       22.4
    """
    header = (
        "algorithm",
        "S",
        "iterations",
        "examples",
        "accuracy",
        "mean gain",
    )
    rows = [header]
    for run in runs:
        result = run.result
        gain = result["mean_gain"]
        rows.append(
            (
                TITLES[result["algorithm"]],
                str(result["scale"]),
                str(result["iterations"]),
                str(result["examples"]),
                f"{result['value']:.1%}".replace("%", " %"),
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


def picture(runs, path):
    """Draws the four panels of Figure 1 and saves them as a PNG.

    Args:
        runs: list of `Run`; those of "identity" and "adascale" must be among
            them.
        path: string, of the file.
    """
    plain, adascale = (
        next(run for run in runs if run.result["algorithm"] == algorithm)
        for algorithm in ("identity", "adascale")
    )
    scale = adascale.result["scale"]
    # Without pyplot, which would look for a display.
    page = figure.Figure(figsize=(11, 7.5), layout="constrained")
    axes = page.subplots(2, 2)
    (by_iteration, by_tau), (rates, gains) = axes

    for run in runs:
        _draw(by_iteration, run, run.steps, smoothed_loss(run, scale))
    by_iteration.set(
        title="Training loss", xlabel="iteration", xscale="log", yscale="log"
    )
    _label(by_iteration, runs, x=0.03, y=0.06)

    # At S = 1 every step is one scale-invariant step.
    tau = adascale.log["scale_invariant_step"]
    _draw(by_tau, plain, plain.steps, smoothed_loss(plain, scale))
    _draw(by_tau, adascale, tau, smoothed_loss(adascale, scale))
    by_tau.set(
        title="Training loss by scale-invariant step",
        xlabel="scale-invariant step τ",
        yscale="log",
    )
    _label(by_tau, [plain, adascale], x=0.7, y=0.82)

    last = adascale.steps[-1]
    for run in runs:
        shown = [step for step in run.steps if step <= last] or run.steps[:1]
        _draw(rates, run, shown, run.log["learning_rate"][: len(shown)])
    rates.set(
        title=f"Effective learning rate, first {last} iterations",
        xlabel="iteration",
        yscale="log",
    )
    _label(rates, runs, x=0.7, y=0.68)

    _draw(gains, adascale, tau, adascale.log["gain"])
    for bound, text in ((scale, f" S = {scale}"), (1, " 1")):
        gains.axhline(bound, color="#999999", linestyle=":")
        gains.text(0, bound, text, va="bottom", color="#777777")
    gains.set(
        title="Gain", xlabel="scale-invariant step τ", ylim=(0, 1.1 * scale)
    )
    _label(gains, [adascale], x=0.7, y=0.2)

    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    page.savefig(path, dpi=150)


def smoothed_loss(run, scale):
    """Returns the loss averaged over as many examples as a step at `scale` has.

    A row at S = 1 averages few examples and is noisy beside one at a large
    scale. Each value is the mean of that row and those before it.
    """
    loss = run.log["loss"]
    examples_per_row = run.steps[0] * run.result["scale"]
    window = max(1, round(scale / examples_per_row))
    means = []
    for end in range(1, len(loss) + 1):
        recent = loss[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def _draw(panel, run, x, y):
    color = COLORS[run.result["algorithm"]]
    # A line of one point would not be seen.
    panel.plot(
        x, y, color=color, linewidth=1.8, marker="." if len(x) < 2 else ""
    )


def _label(panel, runs, *, x, y):
    """Names the lines in their colors, the last run at (x, y) of the panel."""
    for number, run in enumerate(reversed(runs)):
        panel.text(
            x,
            y + 0.08 * number,
            run.label,
            color=COLORS[run.result["algorithm"]],
            transform=panel.transAxes,
        )


def main(arguments=None):
    """Trains, prints the table and draws the picture; returns the `Run`s."""
    parser = argparse.ArgumentParser(
        description="Compares AdaScale with linear scaling on digits."
    )
    parser.add_argument("--out", default="out/demo", help="directory")
    parser.add_argument("--scale", type=int, default=64, help="S")
    parser.add_argument("--total_steps", type=int, default=1500, help="T_1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    common = [
        f"--total_steps={options.total_steps}",
        f"--seed={options.seed}",
    ]
    runs = [train("identity", options.out, scale=1, arguments=common)]
    for algorithm in ("adascale", "lsw", "lsw_plus"):
        extra = []
        if algorithm == "lsw_plus":
            # Runs so far: identity, adascale, lsw.
            extra = [f"--iterations={runs[1].result['iterations']}"]
        runs.append(
            train(
                algorithm,
                options.out,
                scale=options.scale,
                arguments=common + extra,
            )
        )
    path = os.path.join(options.out, "figure1.png")
    picture(runs, path)
    print(f"\n{table(runs)}\n\n{path}")
    return runs


if __name__ == "__main__":
    main()
