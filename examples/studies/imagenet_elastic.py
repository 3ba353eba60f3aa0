"""Trains while the scale goes up or down, and draws the paper's Figure 4.

AdaScale keeps its state when the scale changes: its averages are at the base
batch, and its progress is in steps at the base batch.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, Figure 4 and Table 2, Elastic
Command:  python -m examples.studies.imagenet_elastic --out=out/elastic
Hardware: 2 CPU cores
Time:     see docs/results.md; the same command resumes a run that was
          stopped
Metric:   accuracy on the test split: see docs/results.md
"""

import argparse
import os

from examples.common import figures, runs

ELASTIC = {
    "up": "0:8,0.25:16,0.5:32",
    "down": "0:32,0.25:16,0.5:8",
}


def main(arguments=None):
    """Trains, prints the table, draws the picture and returns the runs."""
    parser = argparse.ArgumentParser(
        description="Trains the imagenet miniature at a scale that changes."
    )
    parser.add_argument("--out", default="out/elastic", help="directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--total_steps", type=int, help="T_1; default: that of the benchmark"
    )
    options = parser.parse_args(arguments)
    common = [f"--seed={options.seed}"]
    if options.total_steps:
        common.append(f"--total_steps={options.total_steps}")

    def train(name, *arguments):
        model_dir = os.path.join(options.out, name)
        return runs.train("imagenet", model_dir, *arguments, *common)

    results = {"plain": train("plain", "--algorithm=identity", "--scale=1")}
    for direction, scales in ELASTIC.items():
        for algorithm in ("adascale", "lsw"):
            results[direction, algorithm] = train(
                f"{algorithm}-{direction}",
                f"--algorithm={algorithm}",
                f"--elastic={scales}",
            )
    path = os.path.join(options.out, "elastic.png")
    page = figures.elastic(
        results["plain"],
        {
            f"scale going {direction}": (
                results[direction, "adascale"],
                results[direction, "lsw"],
            )
            for direction in ELASTIC
        },
    )
    page.savefig(path, dpi=110)
    print(f"\n{runs.table(list(results.values()))}\n\n{path}")
    return results


if __name__ == "__main__":
    main()
