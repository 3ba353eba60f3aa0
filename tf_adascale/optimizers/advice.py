"""Warnings of settings that would change nothing, or too much."""

import warnings

import keras

# Keras's optimizers that divide by a size of the gradients, or take its sign.
_ADAPTIVE = [
    getattr(keras.optimizers, name)
    for name in (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax"),
        *("Ftrl", "Lamb", "Lion", "Muon", "Nadam", "RMSprop"),
        "ScheduleFreeAdamW",
    )
    if hasattr(keras.optimizers, name)
]


def warn_of_power(optimizer: keras.optimizers.Optimizer) -> None:
    """Warns if an optimizer is adaptive, which power 1 does not suit.

    Args:
        optimizer: Keras optimizer. For a subclass of Keras's optimizers nobody
            but its author can tell.

    Example:

    >>> warn_of_power(keras.optimizers.SGD())
    """
    if type(optimizer) in _ADAPTIVE:
        warnings.warn(
            "`power` is 1, which suits SGD. The steps of "
            f"{type(optimizer).__name__} hardly depend on the size of the "
            "gradient: use tf_adascale.AdamScale for Adam and its relatives, "
            "or pass power=0.5.",
            stacklevel=3,
        )


def warn_of_one_sample(name: str) -> None:
    """Warns of a gain that stays 1.

    Args:
        name: str, the optimizer's name.
    """
    warnings.warn(
        f"`{name}` gets one gradient sample per step, so its gain stays 1 and "
        "it trains like its inner optimizer. If the batch is larger than the "
        "one that the learning rate was tuned for, pass `microbatches` to "
        "tf_adascale.Model.compile, one for each base batch in a replica's "
        "batch, or train on several replicas, or pass `scale` and "
        'estimator="differenced". If it is not, pass scale=1 to omit this '
        "warning.",
        stacklevel=3,
    )
