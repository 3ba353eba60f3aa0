"""AdamScale: AdaScale for adaptive inner optimizers."""

from typing import Any, Literal

import keras

from tf_adascale.optimizers.adascale import AdaScale


@keras.saving.register_keras_serializable(package="tf_adascale")
class AdamScale(AdaScale):
    """AdaScale for adaptive inner optimizers, such as Adam.

    `AdaScale` with the gain of the gradients divided by the inner optimizer's
    sqrt(v-hat) + epsilon, and the square root of that gain on the learning
    rate. For Adam, AdamW, Adamax, Lamb, Nadam and RMSprop.

        eta_t = sqrt(r_t) lr(floor(tau_t)),    tau_{t+1} = tau_t + r_t

    Args:
        inner_optimizer: one of these optimizers, or a `LossScaleOptimizer`
            around one.
        power: number >= 0, the power of the gain that multiplies the rate.
        preconditioned: bool, see `AdaScale`.
        name: string.
        **kwargs: as for `AdaScale`.

    Raises:
        ValueError: as `AdaScale`.

    Example:

    >>> optimizer = AdamScale(keras.optimizers.AdamW(1e-3))
    >>> optimizer.power, optimizer.preconditioned
    (0.5, True)

    Reference: Qiao et al., "Pollux: Co-adaptive Cluster Scheduling for
    Goodput-Optimized Deep Learning", OSDI 2021.
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        *,
        scale: float | None = None,
        estimator: Literal["moments", "ratio", "differenced"] = "moments",
        smoothing: float | None = None,
        power: float = 0.5,
        preconditioned: bool = True,
        scale_ema: bool = True,
        name: str = "adamscale",
        **kwargs: Any,
    ):
        super().__init__(
            inner_optimizer,
            scale=scale,
            estimator=estimator,
            smoothing=smoothing,
            power=power,
            preconditioned=preconditioned,
            scale_ema=scale_ema,
            name=name,
            **kwargs,
        )
