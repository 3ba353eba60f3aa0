"""Second moments of every adaptive optimizer, in NumPy and by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale import AdaScale
from tf_adascale.optimizers import preconditioner

optimizers = keras.optimizers

# The functions below return the divisors of the step after t others, from their
# gradients (t, d) in float64. beta_2 = 0.9, epsilon = 1e-3.
SETTINGS = {"beta_2": 0.9, "epsilon": 1e-3}


def averaged(values, decay=0.9):
    """Returns the exponential average of rows, corrected for its bias."""
    weights = (1 - decay) * decay ** np.arange(len(values))[::-1]
    return weights @ values / weights.sum()


def of_adam(gradients):
    return np.sqrt(averaged(gradients**2)) + 1e-3


def of_amsgrad(gradients):
    steps = len(gradients)
    # The largest uncorrected average, with the last one's correction.
    largest = np.max(
        [
            averaged(gradients[: t + 1] ** 2) * (1 - 0.9 ** (t + 1))
            for t in range(steps)
        ],
        axis=0,
    )
    return np.sqrt(largest / (1 - 0.9**steps)) + 1e-3


def of_adamax(gradients):
    ages = np.arange(len(gradients))[::-1, None]
    return np.max(0.9**ages * np.abs(gradients), axis=0) + 1e-3


def of_centered(gradients):
    variance = averaged(gradients**2) - averaged(gradients) ** 2
    return np.sqrt(variance) + 1e-3


CASES = {
    "Adam": (lambda: optimizers.Adam(0.1, **SETTINGS), of_adam),
    "amsgrad": (
        lambda: optimizers.Adam(0.1, amsgrad=True, **SETTINGS),
        of_amsgrad,
    ),
    "AdamW": (lambda: optimizers.AdamW(0.1, **SETTINGS), of_adam),
    "Adamax": (lambda: optimizers.Adamax(0.1, **SETTINGS), of_adamax),
    "Lamb": (lambda: optimizers.Lamb(0.1, **SETTINGS), of_adam),
    "Nadam": (lambda: optimizers.Nadam(0.1, **SETTINGS), of_adam),
    "RMSprop": (
        lambda: optimizers.RMSprop(0.1, rho=0.9, epsilon=1e-3),
        of_adam,
    ),
    "centered": (
        lambda: optimizers.RMSprop(0.1, rho=0.9, epsilon=1e-3, centered=True),
        of_centered,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_divisors(name):
    make, divisor = CASES[name]
    optimizer, weight = make(), keras.Variable(np.zeros(6, "float32"))
    # Coordinates of different sizes.
    random = np.random.default_rng(1)
    gradients = random.normal(1, 1, (10, 6)) * np.logspace(-1, 1, 6)
    for t, gradient in enumerate(gradients):
        if t == preconditioner.WARM_STEPS - 1:
            assert np.all(preconditioner.divisors(optimizer, 0) == 1)
        optimizer.apply([tf.constant(gradient, "float32")], [weight])
    np.testing.assert_allclose(
        preconditioner.divisors(optimizer, 0),
        divisor(gradients),
        rtol=1e-5,  # Powers of the decay in float32.
    )


def test_floor():
    # Second moments 1 and 1e-6 of 2 entries: root mean square 0.7071.
    adam = optimizers.Adam(epsilon=0.5)
    weight = keras.Variable([0.0, 0.0])
    for _ in range(5):
        adam.apply([tf.constant([1.0, 1e-3])], [weight])
    np.testing.assert_allclose(
        preconditioner.divisors(adam, 0), [1.5, 0.507071], rtol=1e-5
    )


def test_precondition_divides_entry_by_entry():
    divisors = [tf.constant([[2.0], [4.0], [8.0]])] * 3
    dense, sparse, none = preconditioner.precondition(
        [
            tf.constant([[2.0], [2.0], [2.0]], "float16"),
            tf.IndexedSlices(tf.constant([[2.0], [4.0]]), [2, 2], [3, 1]),
            None,
        ],
        divisors,
    )
    assert dense.dtype == tf.float32
    assert dense.numpy().tolist() == [[1.0], [0.5], [0.25]]
    assert sparse.values.numpy().tolist() == [[0.25], [0.5]]
    assert none is None
    assert preconditioner.precondition([none], None) == [None]


@pytest.mark.parametrize("name", ["SGD", "Adadelta", "Adagrad", "Ftrl", "Lion"])
def test_optimizers_without_a_second_moment_are_refused(name):
    inner = getattr(optimizers, name)(0.1)
    with harness.refused(
        "`inner_optimizer` must keep a second moment of its gradients if "
        "preconditioned=True: be one of Adam, ",
        "inner_optimizer=<keras",
    ):
        AdaScale(inner, preconditioned=True)
    # The inner optimizer still works by itself.
    assert isinstance(inner.learning_rate, keras.Variable)
