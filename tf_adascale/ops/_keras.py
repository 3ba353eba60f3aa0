"""The Keras in use: version 3, with TensorFlow; and a step for schedules.

Relies on `_initialize` and `_value` of `keras.Variable`, which Keras does not
document. Checked on Keras 3.10 to 3.15.
"""

import sys
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

# The package of Keras 2. With TF_USE_LEGACY_KERAS=1 it is `tf.keras` too.
_KERAS_2 = "tf_keras"


def check_backend() -> None:
    """Raises a ValueError if Keras's backend is not TensorFlow.

    Example:

    >>> check_backend()
    """
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            "`keras.backend.backend()` must be 'tensorflow' for tf_adascale: "
            "set KERAS_BACKEND=tensorflow before Keras is imported. Received: "
            f"keras.backend.backend()={backend!r}"
        )


def check_version(name: str, values: Iterable[Any]) -> None:
    """Raises a ValueError if one of several objects is of Keras 2.

    Args:
        name: str, the argument or attribute that holds them.
        values: objects.

    Example:

    >>> check_version("inputs", [keras.Input((2,))])
    """
    for value in values:
        if _is_keras_2(type(value)):
            raise ValueError(
                f"`{name}` must hold objects of Keras 3. tf_keras, which "
                "TF_USE_LEGACY_KERAS=1 makes tf.keras too, is Keras 2: use "
                f"`import keras` instead. Received: {name} with {value!r}"
            )


def check_layers(model: keras.Model) -> None:
    """Raises a ValueError if an attribute of a model is a layer of Keras 2.

    Example:

    >>> check_layers(keras.Sequential())
    """
    for value in list(vars(model).values()):
        held = value if isinstance(value, list | tuple) else [value]
        check_version("layers", held)


def note_for_version_2() -> str:
    """Returns a sentence for those who use Keras 2, empty if it is not loaded.

    Example:

    >>> note_for_version_2()
    ''
    """
    if _KERAS_2 not in sys.modules:
        return ""
    return (
        ", which is an optimizer of Keras 3 and not of tf_keras: make the "
        "model with `import keras`, not with the tf.keras of "
        "TF_USE_LEGACY_KERAS=1"
    )


def _is_keras_2(cls):
    return any(
        base.__module__.split(".")[0] == _KERAS_2 for base in cls.__mro__
    )


class Step(keras.Variable):
    """A tensor with the arithmetic of `optimizer.iterations`.

    A schedule may multiply its step by a float, which a `keras.Variable` of
    integers allows and a tensor of integers does not.

    Args:
        value: scalar tensor.

    Example:

    >>> float(Step(tf.constant(3)) * 0.5)
    1.5
    """

    def __init__(self, value: tf.Tensor):
        super().__init__(value, dtype=value.dtype.name, name="step")

    def _initialize(self, value):
        self._value = value
