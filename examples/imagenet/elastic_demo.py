"""Trains at scales that change, up and down, and draws the paper's Figure 4.

AdaScale goes on from the same state whatever the scale becomes: its averages
are at the base batch, its progress is in steps at the base batch.

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, Figure 4 and Table 2, Elastic
Command:  python -m examples.imagenet.elastic_demo --out=out/elastic
Hardware: 2 CPU cores
Time:     see examples/README.md; given again, it goes on where it was stopped
"""

import argparse
import os

from examples import figures, runs

ELASTIC = {
    "up": "0:8,0.25:16,0.5:32",
    "down": "0:32,0.25:16,0.5:8",
}


def main(arguments=None):
    """Trains, prints the table and draws the picture; returns the runs."""
    parser = argparse.ArgumentParser(
        description="Trains the imagenet miniature at scales that change."
    )
    parser.add_argument("--out", default="out/elastic", help="directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--total_steps", type=int, help="T_1; default: the benchmark's"
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
