"""Measures the best learning rate of Adasum at 8 replicas.

Trains the digits with SGD with momentum, Adam and Lamb. Each optimizer takes
T_1 / 8 iterations with its compressed schedule, at multiples of the learning
rate that is best at S = 1, and with three methods: averaged gradients, Adasum
of the updates, and Adasum of the gradients. `--tune` instead compares learning
rates at S = 1 on part of the training data.

Paper:    Maleki et al., "Scaling Distributed Training with Adaptive Summation",
          2020
Command:  python -m examples.studies.adasum --out=out/adasum_study
          python -m examples.studies.adasum --tune --out=out/adasum_tune
Hardware: 2 CPU cores
Time:     20 minutes per seed; the same command resumes a run that was stopped
Metric:   accuracy on the test split: see docs/adasum.md
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from matplotlib import ticker

import tf_adascale
from examples.common import figures, runs, training
from examples.digits import data, train

REPLICAS = 8
MULTIPLIERS = (1, 2, 4, 8)
TUNING_MULTIPLIERS = (0.25, 0.5, 1, 2, 4)
# Figures draw lower accuracies at this value, in percent.
FLOOR = 94


class Optimizer(NamedTuple):
    """An optimizer to compare.

    Attributes:
        title: str.
        make: callable, schedule to a new Keras optimizer.
        learning_rate: float, of the first step, the best one at S = 1.
    """

    title: str
    make: Callable[[Any], keras.optimizers.Optimizer]
    learning_rate: float


class Method(NamedTuple):
    """A method to combine the replicas.

    Attributes:
        title: str.
        wrap: callable, Keras optimizer to the optimizer to train with.
        color: str, in figures.
    """

    title: str
    wrap: Callable[[keras.optimizers.Optimizer], keras.optimizers.Optimizer]
    color: str


class Row(NamedTuple):
    """One run: a row of results.csv.

    Attributes:
        optimizer: str, one of `OPTIMIZERS`.
        method: str, one of `METHODS`.
        multiplier: float, of the learning rate.
        seed: int.
        accuracy: float, on the test split.
        loss: float, mean training loss of the last tenth of the log.
    """

    optimizer: str
    method: str
    multiplier: float
    seed: int
    accuracy: float
    loss: float


OPTIMIZERS = {
    "sgd": Optimizer("SGD with momentum", train.sgd, 0.08),
    "adam": Optimizer("Adam", keras.optimizers.Adam, 0.008),
    "lamb": Optimizer("Lamb", keras.optimizers.Lamb, 0.01),
}
# The baseline: one replica that takes T_1 iterations.
SINGLE = "single"
METHODS = {
    SINGLE: Method("S = 1", lambda optimizer: optimizer, "#444444"),
    "average": Method(
        "average", lambda optimizer: optimizer, figures.COLORS["average"]
    ),
    "updates": Method(
        "Adasum, updates", tf_adascale.Adasum, figures.COLORS["adasum"]
    ),
    "gradients": Method(
        "Adasum, gradients",
        lambda optimizer: tf_adascale.Adasum(optimizer, combine="gradients"),
        "#c9a227",
    ),
}


def plan(seeds, *, tune=False):
    """Returns the runs to train, in order: the first four fields of each `Row`.

    Args:
        seeds: sequence of int.
        tune: bool, whether to compare learning rates at S = 1.
    """
    if tune:
        cells = [(SINGLE, multiplier) for multiplier in TUNING_MULTIPLIERS]
    else:
        cells = [(SINGLE, 1)]
        cells += itertools.product(list(METHODS)[1:], MULTIPLIERS)
    return [
        (optimizer, *cell, seed)
        for seed, optimizer, cell in itertools.product(seeds, OPTIMIZERS, cells)
    ]


def study(keys, *, out, tune=False):
    """Trains the runs that are not in the directory yet.

    Args:
        keys: list that `plan` returned.
        out: str, directory.
        tune: bool, see `plan`.

    Yields:
        `Row` per key, as they finish.
    """
    done = {row[:4]: row for row in read(out)}
    for key in keys:
        if key not in done:
            name = "{}-{}-x{:g}-seed{}".format(*key)
            options = {"model_dir": os.path.join(out, name), "tune": tune}
            # Strategies in one process would share collectives.
            done[key] = runs.alone(trained, *key, **options)
            runs.append(out, done[key])
        yield done[key]


def trained(
    optimizer, method, multiplier, seed, *, model_dir, tune=False, smoke=False
):
    """Trains once and returns the `Row`.

    Args:
        optimizer: see `Row`.
        method: see `Row`.
        multiplier: see `Row`.
        seed: see `Row`.
        model_dir: str.
        tune: bool, whether to hold out part of the training data to test on.
        smoke: see `training.Settings`.
    """
    chosen = OPTIMIZERS[optimizer]
    wrap = METHODS[method].wrap
    task = train.task(learning_rate=multiplier * chosen.learning_rate)
    task = task._replace(
        optimizer=lambda schedule: wrap(chosen.make(schedule)),
        train_dataset=functools.partial(data.train_dataset, validation=tune),
        test_dataset=functools.partial(data.test_dataset, validation=tune),
    )
    settings = training.Settings(
        algorithm="identity", seed=seed, model_dir=model_dir, smoke=smoke
    )
    if method != SINGLE:
        # Adasum takes as many steps as "average", at the same learning rates.
        settings = settings._replace(
            algorithm="average", strategy="mirrored", replicas=REPLICAS
        )
    result = training.run(task, settings)
    losses = runs.read(model_dir).log["loss"]
    loss = np.mean(losses[-(len(losses) // 10 or 1) :])
    return Row(
        optimizer,
        method,
        multiplier,
        seed,
        accuracy=round(result.value, 4),
        loss=round(float(loss), 4),
    )


def read(out):
    """Returns the list of `Row` in a directory's results.csv."""
    return [
        Row(
            optimizer=row["optimizer"],
            method=row["method"],
            multiplier=float(row["multiplier"]),
            seed=int(row["seed"]),
            accuracy=float(row["accuracy"]),
            loss=float(row["loss"]),
        )
        for row in runs.rows(out)
    ]


def table(rows):
    """Returns a Markdown table of rows, with a column per multiplier.

    A cell has the accuracy and, in parentheses, the training loss. Both are
    means over the seeds.

    Example:

    >>> seeds = [Row("sgd", "average", 2, seed, accuracy, 0.01)
    ...          for seed, accuracy in [(0, 0.98), (1, 0.99)]]
    >>> print(table([Row("sgd", "single", 1, 0, 0.99, 0.02), *seeds]))
    | optimizer | method | x 1 | x 2 |
    |---|---|---|---|
    | SGD with momentum | S = 1 | 99.0 % (0.020) | - |
    | SGD with momentum | average | - | 98.5 % (0.010) |
    """
    multipliers = sorted({row.multiplier for row in rows})
    heads = [f"x {multiplier:g}" for multiplier in multipliers]
    lines = [
        f"| optimizer | method | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    for optimizer, method in dict.fromkeys(row[:2] for row in rows):
        cells = [OPTIMIZERS[optimizer].title, METHODS[method].title]
        means = _means(rows, optimizer, method)
        for multiplier in multipliers:
            if multiplier in means:
                accuracy, loss = means[multiplier]
                cells.append(f"{100 * accuracy:.1f} % ({loss:.3f})")
            else:
                cells.append("-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(rows, path):
    """Draws accuracy over multiplier, a panel per optimizer, and saves it."""
    optimizers = list(dict.fromkeys(row.optimizer for row in rows))
    page, panels = figures.page(
        1, len(optimizers), size=(3.4 * len(optimizers), 3.6)
    )
    for optimizer, panel in zip(optimizers, panels.flat):
        mine = [row for row in rows if row.optimizer == optimizer]
        for method in dict.fromkeys(row.method for row in mine):
            color = METHODS[method].color
            for row in mine:
                if row.method == method:
                    panel.plot(
                        row.multiplier,
                        _shown(row.accuracy),
                        color=color,
                        marker="o",
                        alpha=0.4,
                    )
            means = _means(rows, optimizer, method)
            panel.plot(
                list(means),
                [_shown(accuracy) for accuracy, _ in means.values()],
                color=color,
            )
        panel.set(
            title=OPTIMIZERS[optimizer].title,
            xlabel=f"learning rate / {OPTIMIZERS[optimizer].learning_rate:g}",
            ylabel=f"accuracy, %, at least {FLOOR}",
            xscale="log",
            ylim=(FLOOR - 0.1, 100),
        )
        panel.xaxis.set_major_locator(
            ticker.FixedLocator(sorted({row.multiplier for row in mine}))
        )
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
    methods = reversed(dict.fromkeys(row.method for row in rows))
    for number, method in enumerate(methods):
        panels.flat[0].text(
            0.05,
            0.05 + 0.08 * number,
            METHODS[method].title,
            color=METHODS[method].color,
            transform=panels.flat[0].transAxes,
        )
    page.savefig(path, dpi=110)


def main(arguments=None):
    """Trains, prints the table, draws the picture and returns the rows."""
    parser = argparse.ArgumentParser(
        description="Measures the best learning rate of Adasum on digits."
    )
    parser.add_argument("--out", default="out/adasum_study", help="directory")
    parser.add_argument("--seeds", default="0", help="for example 0,1,2")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="compare learning rates at S = 1 on part of the training data",
    )
    options = parser.parse_args(arguments)
    os.makedirs(options.out, exist_ok=True)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = list(
        study(
            plan(seeds, tune=options.tune), out=options.out, tune=options.tune
        )
    )
    path = os.path.join(options.out, "adasum.png")
    picture(rows, path)
    print(f"\n{table(rows)}\n\n{path}")
    return rows


def _means(rows, optimizer, method):
    """Returns a dict from multiplier to the mean accuracy and loss."""
    groups = {}
    for row in sorted(rows, key=lambda row: row.multiplier):
        if row[:2] == (optimizer, method):
            groups.setdefault(row.multiplier, []).append(row[4:])
    return {
        multiplier: tuple(np.mean(values, axis=0))
        for multiplier, values in groups.items()
    }


def _shown(accuracy):
    return max(100 * accuracy, FLOOR)


if __name__ == "__main__":
    main()
