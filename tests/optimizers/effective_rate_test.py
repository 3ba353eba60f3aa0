"""The learning rate that a wrapper sets on its inner optimizer."""

import keras
import pytest

from tf_adascale.optimizers import effective_rate


def test_is_held_only_while_a_step_is_taken():
    rates = [0.5]
    optimizer = keras.optimizers.SGD(
        effective_rate.Rate(lambda: rates[-1], rates.append)
    )

    def step():
        with effective_rate.held(optimizer, 4.0):
            assert float(optimizer.learning_rate) == 4.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        step()
    assert optimizer.learning_rate == 0.5
    optimizer.learning_rate = 3.0
    assert rates == [0.5, 3.0]
