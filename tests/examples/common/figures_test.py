"""Figures of runs."""

from examples.common import figures, runs


def test_loss_is_averaged_over_as_many_examples_as_a_large_step():
    # Two steps a row at S = 1: at S = 4 a step has the examples of 2 rows.
    run = runs.Run({}, {"base_batches": [2, 4, 6], "loss": [4.0, 2.0, 1.0]})
    assert figures.smoothed_loss(run, 4) == [4.0, 3.0, 1.5]
    assert figures.smoothed_loss(run, 1) == [4.0, 2.0, 1.0]
