"""Forecasts training at other scales from one recorded run.

Scale S is the batch of one step divided by the base batch, the batch size that
the learning rate was tuned for. Gain r_S is the number of base steps that one
step at scale S is worth. tau, the scale-invariant step, is the sum of the gains
and runs from 0 to T_SI.

`callbacks.ScalingLog` records the moments of the gradient at the base batch
size. They determine the gain at every scale, and so the iterations of training:

    T(S) = integral of d tau / r_S(tau)    from tau = 0 to T_SI             (1)

One device suffices for the run: four micro-batches are four gradient samples.

The recorded averages lag behind. By default they remember 1000 base batches,
which a run at a large scale uses up in a few steps. To forecast for a scale S,
record with the averages that a run at S has:
`AdaScale(smoothing=tf_adascale.ops.gain.default_smoothing(S))`.

On the command line: `python -m tf_adascale.forecast --help`.
"""

from tf_adascale.forecast.prediction import (
    Row,
    iterations,
    rows,
    scale_at_efficiency,
)
from tf_adascale.forecast.record import Record, read
from tf_adascale.forecast.report import picture, table, write_csv

__all__ = [
    "Record",
    "Row",
    "iterations",
    "picture",
    "read",
    "rows",
    "scale_at_efficiency",
    "table",
    "write_csv",
]
