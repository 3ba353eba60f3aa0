"""A wrapper's own variables in a Keras file, and the shapes of all others.

Keras saves and loads the inner optimizer by itself, also if it is of another
model. The shapes beside a wrapper's own variables tell.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_SHAPES = "shapes"


def save(store: Any, own: Sequence[Any], others: Sequence[Any]) -> None:
    """Saves variables, and the shapes of others.

    Args:
        store: Keras's mapping of strings to arrays.
        own: variables to save.
        others: variables that Keras saves elsewhere.

    Example:

    >>> store = {}
    >>> save(store, [keras.Variable([1.0])], [keras.Variable([[2.0]])])
    >>> store["0"].tolist(), store["shapes"].tolist()
    ([1.0], [2, 1, 1])
    """
    for index, variable in enumerate(own):
        store[str(index)] = variable.numpy()
    store[_SHAPES] = _shapes(others)


def is_of_wrapper(keys: Iterable[str]) -> bool:
    """Returns whether a store with these keys is one of `save`.

    Example:

    >>> is_of_wrapper(["0", "1"])
    False
    """
    return _SHAPES in keys


def load(
    store: Any, own: Sequence[Any], others: Sequence[Any], *, name: str
) -> None:
    """Assigns what `save` saved.

    Args:
        store: Keras's mapping of strings to arrays.
        own: variables to assign.
        others: variables that Keras loads elsewhere.
        name: str, the optimizer's name.

    Raises:
        ValueError: if it is the state of another optimizer or model. No
            variable has changed then.

    Example:

    >>> store, variable = {}, keras.Variable([0.0])
    >>> save(store, [keras.Variable([1.0])], [])
    >>> load(store, [variable], [], name="adascale")
    >>> variable.numpy().tolist()
    [1.0]
    """
    expected = {
        str(index): list(variable.shape) for index, variable in enumerate(own)
    }
    expected[_SHAPES] = _shapes(others).tolist()
    received = {key: list(store[key].shape) for key in store.keys()}  # noqa: SIM118
    if _SHAPES in received:
        received[_SHAPES] = np.asarray(store[_SHAPES]).tolist()
    if expected != received:
        raise ValueError(
            f"The state saved for `{name}` must be that of the same optimizer "
            f"and model, with variables of these shapes: {expected}. "
            f"Received: {received}"
        )
    for index, variable in enumerate(own):
        variable.assign(store[str(index)])


def _shapes(variables):
    """Returns rank and sizes of each variable, all in one array."""
    shapes = [[len(v.shape), *v.shape] for v in variables]
    return np.array([size for shape in shapes for size in shape], "int64")
