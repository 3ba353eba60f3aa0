"""AdamScale: second moments of every optimizer, and the gain in their units."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tf_adascale import AdaScale, preconditioner

optimizers = keras.optimizers

# What the step after t others divides by: a function of the gradients so far,
# float64 of shape (t, d). beta_2 = 0.9 all over, epsilon = 1e-3.
SETTINGS = {"beta_2": 0.9, "epsilon": 1e-3}


def averaged(values, decay=0.9):
    """The exponential average of rows, from 0, and its bias corrected."""
    weights = (1 - decay) * decay ** np.arange(len(values))[::-1]
    return weights @ values / weights.sum()


def of_adam(gradients):
    return np.sqrt(averaged(gradients**2)) + 1e-3


def of_amsgrad(gradients):
    steps = len(gradients)
    # The largest uncorrected average, corrected as the last one.
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

case = pytest.mark.parametrize("name", CASES)


def samples(steps=10, count=4, size=6, seed=1):
    """Gradient samples, float32 of shape (t, n, d), coordinates of any size."""
    random = np.random.default_rng(seed)
    mean = random.normal(size=size)
    sizes = np.logspace(-1, 1, size)
    noise = random.normal(size=(steps, count, size))
    return ((mean + noise) * sizes).astype("float32")


def oracle(steps, divisor, scale):
    """Gains of AdamScale in float64, with plain means of the moments."""
    steps = np.asarray(steps, np.float64)
    count = steps.shape[1]
    gains, history = [], []
    for t, now in enumerate(steps):
        if t == preconditioner.WARM_STEPS:
            history = []  # In other units from here on.
        if t >= preconditioner.WARM_STEPS:
            now = now / divisor(steps[:t].mean(1))
        mean = now.mean(0)
        trace = np.trace(np.cov(now.T, ddof=1))
        history.append(
            (trace * scale / count, max(mean @ mean - trace / count, 0))
        )
        variance, sqnorm = np.mean(history, axis=0)
        gain = (variance + sqnorm) / (variance / scale + sqnorm)
        gains.append(np.clip(gain, 1, scale))
    return np.array(gains)


def adamscale(make, **kwargs):
    # So near 1 that the averages are plain means.
    return AdaScale(
        make(), power=0.5, preconditioned=True, smoothing=0.999, **kwargs
    )


def apply(optimizer, weight, gradients, scale_loss=1.0):
    """Takes a step on the micro-batches of one device."""
    gradients = [tf.constant(g * np.float32(scale_loss)) for g in gradients]
    sqnorm = tf.add_n(
        [optimizer.sample_sqnorm([g], [weight]) for g in gradients]
    )
    mean = tf.add_n(gradients) / len(gradients)
    optimizer.apply([mean], [weight], sample_sqnorm=sqnorm)


@case
def test_divisors(name):
    make, divisor = CASES[name]
    optimizer, weight = make(), keras.Variable(np.zeros(6, "float32"))
    gradients = samples().mean(1)
    for t, gradient in enumerate(gradients):
        if t == preconditioner.WARM_STEPS - 1:
            assert np.all(preconditioner.divisors(optimizer, 0) == 1)
        optimizer.apply([tf.constant(gradient)], [weight])
    np.testing.assert_allclose(
        preconditioner.divisors(optimizer, 0),
        divisor(gradients.astype("float64")),
        rtol=1e-5,  # Float32 powers of the decay.
    )


@case
def test_gain_against_the_oracle(name):
    make, divisor = CASES[name]
    steps = samples()
    weight = keras.Variable(np.zeros(6, "float32"))
    optimizer = adamscale(make, scale=8)
    optimizer.microbatches = 4
    gains = []
    for gradients in steps:
        apply(optimizer, weight, gradients)
        gains.append(float(optimizer.gain))
        rate = float(optimizer.effective_learning_rate)
        np.testing.assert_allclose(rate, 0.1 * gains[-1] ** 0.5, rtol=1e-6)
    expected = oracle(steps, divisor, scale=8)
    assert 1.1 < expected[-1] < 7.9
    np.testing.assert_allclose(gains, expected, rtol=1e-4)
    # tau advances by the gain, not by its root.
    tau = float(optimizer.scale_invariant_step)
    np.testing.assert_allclose(tau, expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("count, microbatches", [(2, 1), (2, 2), (4, 1)])
def test_replicas_and_micro_batches(count, microbatches, strategy_of):
    make, divisor = CASES["Adam"]
    steps = samples(count=count * microbatches)
    strategy = strategy_of(count)
    with strategy.scope():
        weight = keras.Variable(np.zeros(6, "float32"))
        optimizer = adamscale(make)
        optimizer.build([weight])
    optimizer.microbatches = microbatches

    @tf.function
    def step(gradients):
        def replica():
            context = tf.distribute.get_replica_context()
            own = gradients[context.replica_id_in_sync_group]
            sqnorms = [
                optimizer.sample_sqnorm([g / count], [weight])
                for g in tf.unstack(own)
            ]
            optimizer.apply(
                [tf.reduce_mean(own, 0) / count],
                [weight],
                sample_sqnorm=tf.add_n(sqnorms),
            )

        strategy.run(replica)

    gains = []
    for gradients in steps:
        step(tf.constant(gradients.reshape(count, microbatches, -1)))
        gains.append(float(optimizer.gain))
    expected = oracle(steps, divisor, scale=count * microbatches)
    np.testing.assert_allclose(gains, expected, rtol=1e-4)


def test_differenced():
    make, divisor = CASES["Adam"]
    gradients = samples(count=1)[:, 0]
    weight = keras.Variable(np.zeros(6, "float32"))
    optimizer = adamscale(make, scale=4, estimator="differenced")
    gains = []
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [weight])
        gains.append(float(optimizer.gain))
    expected, history = [1.0], []
    gradients = gradients.astype("float64")
    for t in range(1, len(gradients)):
        units = np.ones(6)
        if t == preconditioner.WARM_STEPS:
            history = []
        if t >= preconditioner.WARM_STEPS:
            units = divisor(gradients[:t])
        now, before = gradients[t] / units, gradients[t - 1] / units
        history.append((2 * np.sum((now - before) ** 2), max(now @ before, 0)))
        variance, sqnorm = np.mean(history, axis=0)
        expected.append((variance + sqnorm) / (variance / 4 + sqnorm))
    np.testing.assert_allclose(gains, expected, rtol=1e-4)


def test_warm_gain_does_not_depend_on_the_units_of_a_variable():
    """What plain AdaScale lacks: rescaling one weight changes nothing."""
    factors = np.array([1, 10, 0.1, 3, 100, 0.01], "float32")
    gains = []
    for rescaled in (1, factors):
        weights = [keras.Variable([0.0]) for _ in factors]
        optimizer = adamscale(lambda: optimizers.Adam(epsilon=1e-12))
        optimizer.microbatches = 4
        for gradients in samples() * rescaled:
            each = [[tf.constant([x]) for x in g] for g in gradients]
            sqnorm = tf.add_n(
                [optimizer.sample_sqnorm(g, weights) for g in each]
            )
            mean = [tf.add_n(column) / 4 for column in zip(*each)]
            optimizer.apply(mean, weights, sample_sqnorm=sqnorm)
        gains.append(float(optimizer.gain))
    np.testing.assert_allclose(*gains, rtol=1e-4)


def test_first_gradient_of_a_dead_unit_does_not_outweigh_the_others():
    """Divided by epsilon it would: 1e7 to 1."""
    gains = []
    for dead in (False, True):
        weight = keras.Variable(np.zeros(201, "float32"))
        optimizer = adamscale(lambda: optimizers.Adam(epsilon=1e-7))
        optimizer.microbatches = 4
        for t, gradients in enumerate(samples(steps=8, size=201)):
            gradients /= np.logspace(-1, 1, 201, dtype="float32")
            if dead and t < 7:
                gradients[:, 0] = 0
            apply(optimizer, weight, gradients * np.float32(0.01))
        gains.append(float(optimizer.gain))
    # One of 201 entries, floored to a hundredth: within 100^2 times its part.
    units = preconditioner.divisors(optimizer.inner_optimizer, 0).numpy()
    assert units.min() > 0.005 * np.sqrt(np.mean(units**2))
    assert abs(gains[1] - gains[0]) < 2


def test_floor():
    # Second moments 1 and 1e-6 of 2 entries: root mean square 0.7071.
    adam = optimizers.Adam(epsilon=0.5)
    weight = keras.Variable([0.0, 0.0])
    for _ in range(5):
        adam.apply([tf.constant([1.0, 1e-3])], [weight])
    np.testing.assert_allclose(
        preconditioner.divisors(adam, 0), [1.5, 0.507071], rtol=1e-5
    )


def test_loss_scale_is_divided_out():
    gains = []
    for around, factor in [
        (lambda adam: adam, 1.0),
        (
            lambda adam: optimizers.LossScaleOptimizer(adam, initial_scale=8.0),
            8.0,
        ),
    ]:
        weight = keras.Variable(np.zeros(6, "float32"))
        optimizer = adamscale(lambda wrap=around: wrap(CASES["Adam"][0]()))
        optimizer.microbatches = 4
        for gradients in samples():
            apply(optimizer, weight, gradients, scale_loss=factor)
        gains.append(float(optimizer.gain))
    # A power of two, so to the bit.
    assert gains[0] == gains[1]


def test_sparse_gradient_is_the_dense_one():
    gains = []
    for sparse in (False, True):
        weight = keras.Variable(np.zeros((6, 1), "float32"))
        optimizer = adamscale(CASES["Adam"][0])
        optimizer.microbatches = 2
        optimizer.build([weight])
        for both in samples(count=2):
            gradients = []
            for g in both:
                # Every index twice, half of the gradient each.
                slices = tf.IndexedSlices(
                    tf.constant(np.tile(g / 2, 2)[:, None]),
                    tf.constant([*range(6), *range(6)]),
                    tf.constant([6, 1]),
                )
                gradients.append(
                    slices if sparse else tf.convert_to_tensor(slices)
                )
            sqnorm = tf.add_n(
                [optimizer.sample_sqnorm([g], [weight]) for g in gradients]
            )
            mean = tf.constant(both.mean(0)[:, None])
            optimizer.apply([mean], [weight], sample_sqnorm=sqnorm)
        gains.append(float(optimizer.gain))
    np.testing.assert_allclose(*gains, rtol=1e-6)


def test_variables_without_a_gradient_are_left_out():
    optimizer = adamscale(CASES["Adam"][0])
    weights = [keras.Variable([0.0]), keras.Variable([0.0])]
    gradient = tf.constant([3.0])
    # Ones before it is warm.
    assert float(optimizer.sample_sqnorm([None, gradient], weights)) == 9
    with pytest.raises(
        ValueError, match=r"no gradient .*Expected .*Received: "
    ):
        optimizer.sample_sqnorm([None, None], weights)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_in_fit(count, jit_compile, strategy_of):
    """Gradients of micro-batches are divided where they come up."""
    strategy = strategy_of(count)
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 3)).astype("float32")
    y = (x @ [[1.0], [2.0], [-1.0]] + random.normal(size=(64, 1))).astype(
        "float32"
    )
    with strategy.scope():
        inputs = keras.Input((3,))
        outputs = keras.layers.Dense(1, kernel_initializer="ones")(inputs)
        model = tf_adascale.Model(inputs, outputs)
        model.compile(
            adamscale(CASES["Adam"][0]),
            "mse",
            microbatches=4 // count,
            jit_compile=jit_compile,
        )
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    # The same by hand: 8 steps of 4 samples of 2 examples each.
    weights = [
        keras.Variable(np.ones((3, 1), "float32")),
        keras.Variable(np.zeros(1, "float32")),
    ]
    adam = CASES["Adam"][0]()
    adam.build(weights)
    history = []
    for step in range(8):
        if step == preconditioner.WARM_STEPS:
            history = []
        gradients = []
        for part in range(4):
            rows = slice(8 * step + 2 * part, 8 * step + 2 * part + 2)
            kernel, bias = (w.numpy().astype("float64") for w in weights)
            error = x[rows] @ kernel + bias - y[rows]
            gradients.append(np.append(x[rows].T @ error, error.sum()))
        gradients = np.array(gradients)
        mean = gradients.mean(0)
        units = np.concatenate(
            [np.ravel(preconditioner.divisors(adam, slot)) for slot in (0, 1)]
        )
        trace = np.trace(np.cov((gradients / units).T, ddof=1))
        sqnorm = np.sum((mean / units) ** 2) - trace / 4
        history.append((trace, max(sqnorm, 0)))
        variance, sqnorm = np.mean(history, axis=0)
        gain = np.clip((variance + sqnorm) / (variance / 4 + sqnorm), 1, 4)
        adam.learning_rate = 0.1 * gain**0.5
        adam.apply(
            [
                tf.constant(mean[:3, None].astype("float32")),
                tf.constant(mean[3:].astype("float32")),
            ],
            weights,
        )
    np.testing.assert_allclose(float(model.optimizer.gain), gain, rtol=1e-4)
    trained = [
        strategy.experimental_local_results(v.value)[0].numpy()
        for v in model.trainable_variables
    ]
    for got, expected in zip(trained, weights):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4)


def test_model_that_is_not_built():
    """The optimizer gets its slots before the first norm is taken."""

    class Net(tf_adascale.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    for microbatches in (1, 2):
        model = Net()
        optimizer = AdaScale(
            optimizers.Adam(),
            scale=2,
            preconditioned=True,
            estimator="moments" if microbatches == 2 else "differenced",
        )
        model.compile(optimizer, "mse", microbatches=microbatches)
        x = np.ones((8, 3), "float32")
        model.fit(x, x[:, :1], batch_size=4, verbose=0)
        assert len(optimizer.inner_optimizer._velocities) == 2


@pytest.mark.parametrize("name", ["SGD", "Adadelta", "Adagrad", "Ftrl", "Lion"])
def test_optimizers_without_a_second_moment_are_refused(name):
    inner = getattr(optimizers, name)(0.1)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        AdaScale(inner, preconditioned=True)
    assert re.search(
        "no second moment.*Expected one of Adam, .*Received: optimizer=",
        str(caught.value),
    )
    # Untouched: it may still be used by itself.
    assert isinstance(inner.learning_rate, keras.Variable)


def test_bad_power_of_a_refused_optimizer_is_told_first():
    with pytest.raises(ValueError, match="power"):
        AdaScale(optimizers.SGD(), preconditioned=True, power=-1)


def test_skipped_step_does_not_begin_the_averages_anew():
    weight = keras.Variable(np.zeros(6, "float32"))
    optimizer = adamscale(CASES["Adam"][0])
    optimizer.microbatches = 4
    steps = samples()
    for t, gradients in enumerate(steps):
        if t in (preconditioner.WARM_STEPS, preconditioner.WARM_STEPS + 2):
            apply(optimizer, weight, gradients * np.nan)
        apply(optimizer, weight, gradients)
    expected = oracle(steps, of_adam, scale=4)
    np.testing.assert_allclose(float(optimizer.gain), expected[-1], rtol=1e-4)
    assert int(optimizer.skipped_steps) == 2
