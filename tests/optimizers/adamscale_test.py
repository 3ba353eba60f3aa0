"""AdamScale: the gain in the units of an adaptive optimizer's step.

The inner optimizer is Adam; `preconditioner_test.py` tests all divisors.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness
from tf_adascale import AdamScale
from tf_adascale.optimizers import preconditioner

WARM_STEPS = preconditioner.WARM_STEPS


def adam(epsilon=1e-3):
    return keras.optimizers.Adam(0.1, beta_2=0.9, epsilon=epsilon)


def divisor(gradients):
    """Returns Adam's divisor in float64: sqrt(v-hat) + epsilon."""
    weights = 0.9 ** np.arange(len(gradients))[::-1]
    return np.sqrt(weights @ gradients**2 / weights.sum()) + 1e-3


def samples(steps=8, count=4, size=6):
    """Returns gradient samples (t, n, d) with coordinates of many sizes."""
    random = np.random.default_rng(1)
    mean = random.normal(size=size)
    noise = random.normal(size=(steps, count, size))
    return ((mean + noise) * np.logspace(-1, 1, size)).astype("float32")


def among_samples(steps, scale):
    """Yields the moments of each step in float64, in the step's units."""
    steps = np.asarray(steps, np.float64)
    count = steps.shape[1]
    for t, now in enumerate(steps):
        if t >= WARM_STEPS:
            now = now / divisor(steps[:t].mean(1))
        mean, trace = now.mean(0), np.trace(np.cov(now.T, ddof=1))
        yield trace * scale / count, max(mean @ mean - trace / count, 0)


def between_steps(steps, scale):
    """Yields the same from one sample per step and the one before it."""
    steps = np.asarray(steps, np.float64)[:, 0]
    yield None
    for t in range(1, len(steps)):
        units = divisor(steps[:t]) if t >= WARM_STEPS else 1.0
        now, before = steps[t] / units, steps[t - 1] / units
        yield scale / 2 * np.sum((now - before) ** 2), max(now @ before, 0)


def oracle(moments, scale):
    """Returns gains in float64, from plain means of the moments."""
    gains, history = [], []
    for t, now in enumerate(moments):
        if t == WARM_STEPS:
            history = []  # Units change here.
        if now is None:
            gains.append(1.0)
            continue
        history.append(now)
        variance, sqnorm = np.mean(history, axis=0)
        gain = (variance + sqnorm) / (variance / scale + sqnorm)
        gains.append(np.clip(gain, 1, scale))
    return np.array(gains)


def run_of(num_replicas, microbatches, make=adam, shapes=((6,),), **kwargs):
    # At a smoothing this close to 1 the averages are plain means.
    return harness.Run(
        num_replicas,
        lambda: AdamScale(make(), smoothing=0.999, **kwargs),
        [np.zeros(shape, "float32") for shape in shapes],
        microbatches=microbatches,
    )


def gains_of(run, steps):
    gains = []
    for gradients in steps:
        run.step([gradients])
        gains.append(float(run.optimizer.gain))
    return gains


@pytest.mark.parametrize(
    "num_replicas, microbatches, moments, arguments",
    [
        (1, 4, among_samples, {"scale": 8}),
        (2, 2, among_samples, {}),
        (1, 1, between_steps, {"scale": 4, "estimator": "differenced"}),
    ],
    ids=["micro_batches", "replicas", "differenced"],
)
def test_gain_is_the_oracles(num_replicas, microbatches, moments, arguments):
    count = num_replicas * microbatches
    steps = samples(count=count)
    run = run_of(num_replicas, microbatches, **arguments)
    scale = run.optimizer.scale
    gains = gains_of(run, steps)
    expected = oracle(moments(steps, scale), scale)
    assert 1.1 < expected[-1] < scale - 0.1
    np.testing.assert_allclose(gains, expected, rtol=1e-4)
    # The rate has the root of the gain as factor. tau adds up the gain.
    rate = float(run.optimizer.effective_learning_rate)
    np.testing.assert_allclose(rate, 0.1 * gains[-1] ** 0.5, rtol=1e-6)
    tau = float(run.optimizer.scale_invariant_step)
    np.testing.assert_allclose(tau, expected.sum(), rtol=1e-4)


def test_warm_gain_does_not_depend_on_the_units_of_a_variable():
    """Rescaling one weight changes nothing, unlike with AdaScale."""
    gains = []
    for factors in ([1, 1, 1], np.array([10, 0.1, 100], "float32")):
        run = run_of(1, 4, lambda: adam(epsilon=1e-12), [(2,)] * 3)
        for gradients in samples():
            run.step(
                [f * g for f, g in zip(factors, np.split(gradients, 3, axis=1))]
            )
        gains.append(float(run.optimizer.gain))
    np.testing.assert_allclose(*gains, rtol=1e-4)


def test_first_gradient_of_a_dead_unit_does_not_outweigh_the_others():
    """Without a floor, division by epsilon would amplify it by 1e7."""
    gains = []
    for dead in (False, True):
        steps = 0.01 * samples(size=201)
        steps /= np.logspace(-1, 1, 201, dtype="float32")
        if dead:
            steps[:7, :, 0] = 0
        run = run_of(1, 4, lambda: adam(epsilon=1e-7), [(201,)])
        gains.append(gains_of(run, steps)[-1])
    # The floor limits one of 201 entries to 100^2 times its share.
    units = preconditioner.divisors(run.optimizer.inner_optimizer, 0).numpy()
    assert units.min() > 0.005 * np.sqrt(np.mean(units**2))
    assert abs(gains[1] - gains[0]) < 2


def test_loss_scale_is_divided_out():
    plain, scaled = (
        run_of(1, 4, make)
        for make in (
            adam,
            lambda: keras.optimizers.LossScaleOptimizer(
                adam(), initial_scale=8.0
            ),
        )
    )
    # The loss scale is a power of two, so the gains are equal to the bit.
    assert gains_of(plain, samples()) == gains_of(scaled, samples())


def test_norm_of_a_sample():
    """Slices have the norm of the dense gradient, and None has norm 0."""
    run = run_of(1, 4, shapes=[(6, 1), (6, 1)])
    for gradients in samples():
        run.step([gradients[:, :, None]] * 2)
    gradient = tf.constant(samples()[0, 0, :, None])
    sqnorm = float(run.optimizer.sample_sqnorm([gradient, None], run.variables))
    units = preconditioner.divisors(run.optimizer.inner_optimizer, 0)
    np.testing.assert_allclose(
        sqnorm, np.sum((gradient / units) ** 2), rtol=1e-6
    )
    slices = harness.slices(gradient)
    np.testing.assert_allclose(
        run.optimizer.sample_sqnorm([None, slices], run.variables),
        sqnorm,
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="Received: "):
        run.optimizer.sample_sqnorm([None, None], run.variables)


def test_skipped_step_does_not_restart_the_averages():
    run = run_of(1, 4)
    steps = samples()
    for t, gradients in enumerate(steps):
        if t in (WARM_STEPS, WARM_STEPS + 2):
            run.step([gradients * np.nan])
        run.step([gradients])
    expected = oracle(among_samples(steps, 4), 4)
    np.testing.assert_allclose(run.optimizer.gain, expected[-1], rtol=1e-4)
    assert int(run.optimizer.skipped_steps) == 2


def test_in_fit():
    """Micro-batch gradients are divided where they are computed."""
    x, y = harness.regression(64)
    inputs = keras.Input((3,))
    outputs = keras.layers.Dense(1, kernel_initializer="ones")(inputs)
    model = tf_adascale.Model(inputs, outputs)
    model.compile(
        AdamScale(adam(), smoothing=0.999),
        "mse",
        microbatches=4,
        jit_compile=True,
    )
    harness.fit(model, x, y, batch_size=8)
    # The same by hand: 8 steps of 4 samples of 2 examples each.
    run = run_of(1, 4, shapes=[(3, 1), (1,)])
    run.variables[0].assign(np.ones((3, 1)))
    for rows in np.arange(64).reshape(8, 4, 2):
        kernel, bias = run.weights()
        error = x[rows] @ kernel + bias - y[rows]
        run.step([np.swapaxes(x[rows], 1, 2) @ error, error.sum(1)])
    np.testing.assert_allclose(
        model.optimizer.gain, run.optimizer.gain, rtol=1e-4
    )
    harness.assert_close(model.get_weights(), run.weights(), rtol=1e-4)


@pytest.mark.parametrize(
    "microbatches, estimator", [(2, "moments"), (1, "differenced")]
)
def test_model_that_is_not_built(microbatches, estimator):
    """The optimizer is built before the first norm is taken."""

    class Net(tf_adascale.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    model = Net()
    optimizer = AdamScale(adam(), scale=2, estimator=estimator)
    model.compile(optimizer, "mse", microbatches=microbatches, run_eagerly=True)
    harness.fit(model, *harness.regression(8), batch_size=4)
    assert len(optimizer.inner_optimizer._velocities) == 2
