"""Figures of runs: the color of each algorithm, and its lines and labels."""

from matplotlib import figure

COLORS = {
    "identity": "#444444",
    "linear": "#8a5a2b",
    "sqrt": "#7b4fa3",
    "lsw": "#d1651a",
    "lsw_plus": "#b0912b",
    "adascale": "#0b6fb8",
    "adamscale": "#0a9396",
    "average": "#a0a0a0",
    "adasum": "#3f8f3a",
}


def page(rows, columns, *, size):
    """Returns an empty page and its panels, an array of shape (rows, columns).

    Args:
        rows: int.
        columns: int.
        size: (width, height) in inches.
    """
    # pyplot would look for a display.
    empty = figure.Figure(figsize=size, layout="constrained")
    panels = empty.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return empty, panels


def draw(panel, run, x, y, **style):
    """Draws a line in the color of a run's algorithm.

    Args:
        panel: matplotlib `Axes`.
        run: `runs.Run`.
        x: list of float.
        y: list of float.
        **style: further arguments of `Axes.plot`.
    """
    style = {
        "color": COLORS[run.result["algorithm"]],
        "linewidth": 1.8,
        # A line of one point is invisible without a marker.
        "marker": "." if len(x) < 2 else "",
        **style,
    }
    panel.plot(x, y, **style)


def label(panel, results, *, x, y):
    """Labels the lines in their colors, the last run at (x, y) of the panel."""
    for number, run in enumerate(reversed(results)):
        panel.text(
            x,
            y + 0.08 * number,
            run.label,
            color=COLORS[run.result["algorithm"]],
            transform=panel.transAxes,
        )


def smoothed_loss(run, base_batches):
    """Returns the loss averaged over at least `base_batches` base batches.

    A row at S = 1 averages few examples, so it is noisier than a row at a large
    scale. Each value is the mean of its row and the rows before it.

    Args:
        run: `runs.Run`.
        base_batches: int >= 1, the base batches in a step of the run to compare
            with.
    """
    loss = run.log["loss"]
    window = max(1, round(base_batches / run.log["base_batches"][0]))
    means = []
    for end in range(1, len(loss) + 1):
        recent = loss[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def elastic(plain, results):
    """Returns a page with loss, gain and scale of runs whose scale changed.

    Args:
        plain: `runs.Run` at S = 1.
        results: dict from a column's title to a sequence of `runs.Run`, the
            first of them by AdaScale.
    """
    empty, panels = page(2, len(results), size=(11, 7))
    for (title, (adascale, *others)), (losses, gains) in zip(
        results.items(), panels.T
    ):
        largest = int(max(adascale.log["scale"]))
        tau = adascale.log["scale_invariant_step"]
        # Without AdaScale, a step of S base batches counts as S base steps.
        for run in (plain, *others):
            loss = smoothed_loss(run, largest)
            draw(losses, run, run.log["base_batches"], loss)
        draw(losses, adascale, tau, smoothed_loss(adascale, largest))
        losses.set(
            title=f"Training loss, {title}",
            xlabel="steps at the base batch (AdaScale: τ)",
            yscale="log",
        )
        label(losses, [plain, *others, adascale], x=0.62, y=0.6)
        draw(gains, adascale, tau, adascale.log["gain"])
        draw(gains, adascale, tau, adascale.log["scale"], linestyle=":")
        gains.set(
            title="Gain (line) and scale (dots)",
            xlabel="scale-invariant step τ",
            ylim=(0, 1.1 * largest),
        )
    return empty
