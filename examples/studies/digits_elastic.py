"""Trains digits in a sequence of processes, each at another scale.

SIGTERM stops each process after a third of the training, as a cluster would.
The next process resumes from the checkpoint at twice or half the scale, with
other replicas and workers:

    S = 4     one device, four micro-batches
    S = 8     two worker processes, four micro-batches each
    S = 16    four replicas in one process, four micro-batches each

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, Figure 4 and Table 2, Elastic
Command:  python -m examples.studies.digits_elastic --out=out/digits_elastic
Hardware: 2 CPU cores
Time:     3 minutes; the same command resumes a run that was stopped
Metric:   accuracy on the test split: see docs/workers_and_failures.md
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from typing import NamedTuple

from examples.common import figures, runs, training

BENCHMARK = "digits"


class Phase(NamedTuple):
    """The command that trains at one scale.

    Attributes:
        starter: tuple of str, the words between Python and the trainer.
        flags: tuple of str, of the trainer.
    """

    starter: tuple
    flags: tuple


PHASES = {
    4: Phase(("-m",), ("--strategy=default",)),
    8: Phase(
        ("-m", "examples.launch", "--workers=2", "--"),
        ("--strategy=multiworker",),
    ),
    16: Phase(("-m",), ("--strategy=mirrored", "--replicas=4")),
}
DIRECTIONS = {"up": (4, 8, 16), "down": (16, 8, 4)}


def train(model_dir, scales, *flags, total_steps):
    """Trains at a sequence of scales and returns the `runs.Run`.

    Args:
        model_dir: str.
        scales: sequence of int, keys of `PHASES`. Each trains an equal part,
            counted in scale-invariant steps.
        *flags: str, further flags of the trainer.
        total_steps: int, T_SI.

    Raises:
        subprocess.CalledProcessError: if a process fails, or ends before it is
            stopped.
    """
    for part, scale in enumerate(scales, start=1):
        until = total_steps * part / len(scales)
        is_last = part == len(scales)
        if not is_last and _progress(model_dir) >= until:
            continue  # An earlier call has trained this part.
        command = [
            sys.executable,
            *PHASES[scale].starter,
            f"examples.{BENCHMARK}.train",
            f"--scale={scale}",
            f"--total_steps={total_steps}",
            f"--model_dir={model_dir}",
            *PHASES[scale].flags,
            *flags,
        ]
        _run(command, model_dir, until=None if is_last else until)
    return runs.read(model_dir)


def _run(command, model_dir, *, until):
    """Runs a command until training reaches a scale-invariant step."""
    print("\n$ " + " ".join(["python", *command[1:]]), flush=True)
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
    expected = 0
    with subprocess.Popen(command, env=quiet) as process:
        while process.poll() is None:
            if not expected and until and _progress(model_dir) >= until:
                process.terminate()
                expected = training.STOPPED
            time.sleep(0.1)
    if process.returncode != expected or (until and not expected):
        raise subprocess.CalledProcessError(process.returncode, command)


def _progress(model_dir):
    """Returns the scale-invariant step of the last row of the log."""
    path = os.path.join(model_dir, "log.csv")
    if not os.path.exists(path):
        return 0.0
    with open(path, newline="") as file:
        # The last row may be incomplete while the trainer writes it.
        steps = [
            row.get("scale_invariant_step") for row in csv.DictReader(file)
        ]
    return max((float(step) for step in steps if step), default=0.0)


def main(arguments=None):
    """Trains, prints the table, draws the picture and returns the runs."""
    parser = argparse.ArgumentParser(
        description="Trains digits at a scale that changes between processes."
    )
    parser.add_argument("--out", default="out/digits_elastic", help="directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--total_steps", type=int, default=1500, help="T_1")
    options = parser.parse_args(arguments)
    common = [f"--seed={options.seed}"]
    results = {
        "plain": runs.train(
            BENCHMARK,
            os.path.join(options.out, "plain"),
            "--algorithm=identity",
            "--scale=1",
            f"--total_steps={options.total_steps}",
            *common,
        )
    }
    for direction, scales in DIRECTIONS.items():
        results[direction] = train(
            os.path.join(options.out, direction),
            scales,
            "--algorithm=adascale",
            *common,
            total_steps=options.total_steps,
        )
    path = os.path.join(options.out, "elastic.png")
    page = figures.elastic(
        results["plain"],
        {f"scale going {name}": (results[name],) for name in DIRECTIONS},
    )
    page.savefig(path, dpi=110)
    print(f"\n{runs.table(list(results.values()))}\n\n{path}")
    return results


if __name__ == "__main__":
    main()
