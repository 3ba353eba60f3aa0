"""Trains the digits in four ways, prints a table and draws Figure 1.

Plain SGD at S = 1 sets the quality to preserve. At S = 64, AdaScale preserves
it in far fewer iterations. Linear scaling with warm-up does not, neither in its
own number of iterations (LSW) nor in that of AdaScale (LSW+).

Paper:    Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for
          Distributed Training", ICML 2020, Figure 1 and Table 2
Command:  python -m examples.digits.demo --out=out/demo
Hardware: 2 CPU cores
Time:     3 minutes; the same command resumes a run that was stopped
Metric:   accuracy: 99 % for SGD and AdaScale, 90 to 99 % for LSW+, 25 to 33 %
          for LSW
"""

import argparse
import os

from examples.common import figures, runs


def picture(results, path):
    """Draws the four panels of Figure 1 and saves them as a PNG.

    Args:
        results: list of `runs.Run`, among them one of "identity" and one of
            "adascale".
        path: str, of the file.
    """
    plain, adascale = (
        next(run for run in results if run.result["algorithm"] == algorithm)
        for algorithm in ("identity", "adascale")
    )
    scale = adascale.result["scale"]
    page, panels = figures.page(2, 2, size=(11, 7.5))
    (by_iteration, by_tau), (rates, gains) = panels

    def loss(run):
        return figures.smoothed_loss(run, scale)

    for run in results:
        figures.draw(by_iteration, run, run.steps, loss(run))
    by_iteration.set(
        title="Training loss", xlabel="iteration", xscale="log", yscale="log"
    )
    figures.label(by_iteration, results, x=0.03, y=0.06)

    # At S = 1 each step is one scale-invariant step.
    tau = adascale.log["scale_invariant_step"]
    figures.draw(by_tau, plain, plain.steps, loss(plain))
    figures.draw(by_tau, adascale, tau, loss(adascale))
    by_tau.set(
        title="Training loss by scale-invariant step",
        xlabel="scale-invariant step τ",
        yscale="log",
    )
    figures.label(by_tau, [plain, adascale], x=0.7, y=0.82)

    last = adascale.steps[-1]
    for run in results:
        shown = [step for step in run.steps if step <= last] or run.steps[:1]
        rate = run.log["effective_learning_rate"][: len(shown)]
        figures.draw(rates, run, shown, rate)
    rates.set(
        title=f"Effective learning rate, first {last} iterations",
        xlabel="iteration",
        yscale="log",
    )
    figures.label(rates, results, x=0.7, y=0.68)

    figures.draw(gains, adascale, tau, adascale.log["gain"])
    for bound, text in ((scale, f" S = {scale}"), (1, " 1")):
        gains.axhline(bound, color="#999999", linestyle=":")
        gains.text(0, bound, text, va="bottom", color="#777777")
    gains.set(
        title="Gain", xlabel="scale-invariant step τ", ylim=(0, 1.1 * scale)
    )
    figures.label(gains, [adascale], x=0.7, y=0.2)

    page.savefig(path, dpi=150)


def main(arguments=None):
    """Trains, prints the table, draws the picture and returns the runs."""
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

    def train(algorithm, *arguments):
        return runs.train(
            "digits",
            os.path.join(options.out, algorithm),
            f"--algorithm={algorithm}",
            *arguments,
            *common,
        )

    scale = f"--scale={options.scale}"
    plain = train("identity", "--scale=1")
    adascale = train("adascale", scale)
    lsw = train("lsw", scale)
    iterations = adascale.result["iterations"]
    lsw_plus = train("lsw_plus", scale, f"--iterations={iterations}")

    results = [plain, adascale, lsw, lsw_plus]
    path = os.path.join(options.out, "figure1.png")
    picture(results, path)
    print(f"\n{runs.table(results)}\n\n{path}")
    return results


if __name__ == "__main__":
    main()
