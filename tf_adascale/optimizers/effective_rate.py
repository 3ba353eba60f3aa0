"""The learning rate that a wrapper sets on its inner optimizer.

Relies on `_learning_rate` of Keras optimizers, which is not documented: the
rate as given. Checked on Keras 3.10 to 3.15.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras


class Rate:
    """The learning rate of an optimizer in a wrapper: what the wrapper sets.

    Keras takes it for a callable.

    Args:
        rate: function without arguments that returns the effective rate.
        assign: function of a number, which becomes the rate of the wrapper.

    Example:

    >>> rate = Rate(lambda: 0.5, print)
    >>> rate.assign(0.1)
    0.1
    >>> with rate.held(0.25):
    ...     print(rate())
    0.25
    >>> rate()
    0.5
    """

    def __init__(self, rate: Callable[[], Any], assign: Callable[[Any], None]):
        self._rate = rate
        self._held = None
        self.assign = assign

    def __call__(self) -> Any:
        return self._rate() if self._held is None else self._held

    @contextlib.contextmanager
    def held(self, rate: Any) -> Iterator[None]:
        """Makes it the rate of one step while the step is taken."""
        self._held = rate
        try:
            yield
        finally:
            self._held = None

    def get_config(self) -> dict[str, Any]:
        return {}  # Delegate.get_config puts the user's rate in its place.


def held(
    optimizer: keras.optimizers.Optimizer, rate: Any
) -> contextlib.AbstractContextManager[None]:
    """Lets an optimizer's `update_step` read the rate of the present step.

    Example:

    >>> with held(keras.optimizers.SGD(), 0.1):  # In no wrapper.
    ...     pass
    """
    if isinstance(optimizer._learning_rate, Rate):
        return optimizer._learning_rate.held(rate)
    return contextlib.nullcontext()
