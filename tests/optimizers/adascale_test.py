"""AdaScale against an oracle of algorithm 2, known gains and its settings."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import golden, harness
from tf_adascale import AdaScale

SGD = keras.optimizers.SGD
schedules = keras.optimizers.schedules

PUBLIC = (
    "gain",
    "gradient_variance",
    "gradient_sqnorm",
    "scale_invariant_step",
)


def public(optimizer):
    """Returns the public numbers, in the order of `PUBLIC`."""
    return [float(getattr(optimizer, name)) for name in PUBLIC]


def assign(optimizer, name, value):
    """Sets an optimizer's variable, by its name."""
    [variable] = [v for v in optimizer.variables if v.name == name]
    variable.assign(value)


def run_of(num_replicas, make, microbatches=1, shapes=golden.SHAPES, **kwargs):
    """Returns a run from weights of 0, which then sum up the updates."""
    zeros = [np.zeros(shape, "float32") for shape in shapes]
    return harness.Run(
        num_replicas, make, zeros, microbatches=microbatches, **kwargs
    )


def one_weight(optimizer, samples):
    """Takes a step of an optimizer of one weight, on micro-batches."""
    samples = np.asarray(samples, "float32").reshape(len(samples), -1)
    optimizer.microbatches = len(samples)
    if not optimizer.built:
        optimizer.build([keras.Variable(np.zeros(samples.shape[1], "float32"))])
    optimizer.apply(
        [tf.constant(samples.mean(0))],
        sample_sqnorm_sum=tf.constant((samples**2).sum()),
    )
    return optimizer


# One sample of each replica and micro-batch: 1 and -1, or 0 and 2.
OPPOSITE = [[1.0], [-1.0]]
BETWEEN = [[0.0], [2.0]]


def layouts(num_samples):
    """Returns pairs of (replicas, micro-batches) that make the samples."""
    return [(1, num_samples), (2, 2) if num_samples == 4 else (num_samples, 1)]


@pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
def test_golden_rows_through_replicas_and_micro_batches(row):
    gradients = [np.stack(entries) for entries in zip(*row.samples)]
    for num_replicas, microbatches in layouts(row.num_samples):
        run = run_of(
            num_replicas,
            lambda: AdaScale(SGD(0.125), scale=row.scale),
            microbatches,
        )
        run.step(gradients)
        optimizer = run.optimizer
        assert optimizer.num_samples == row.num_samples
        assert optimizer.scale == row.resolved_scale
        # The floor of the variance, 1e-30, is 0 in the table.
        close = {"rtol": 1e-6, "atol": 1e-20}
        np.testing.assert_allclose(
            public(optimizer),
            [row.gain, row.variance, row.sqnorm, row.gain],
            **close,
        )
        np.testing.assert_allclose(
            optimizer.noise_scale,
            np.inf if row.sqnorm == 0 else row.variance / row.sqnorm,
            **close,
        )
        rate = 0.125 * row.gain
        harness.assert_close(
            run.weights(), [-rate * g for g in row.mean_gradient], rtol=1e-6
        )


def oracle(steps, *, scale, estimator, power, theta, schedule, momentum):
    """Runs algorithm 2 in float64, on moments by their definition.

    Args:
        steps: array [t, n, d], the gradient samples.
        scale: S.
        estimator: as for `AdaScale`.
        power: as for `AdaScale`.
        theta: smoothing or None.
        schedule: function of floor(tau) that returns a rate.
        momentum: of SGD.

    Returns:
        Array [t, 4 + d]: after each step, the numbers in `PUBLIC` and the
        weights, which start at 0.
    """
    steps = np.asarray(steps, np.float64)
    num_samples = steps.shape[1]
    if theta is None:
        theta = max(1 - num_samples / 1000, 0)
    tau, history, rows, before = 0.0, [], [], None
    weights = velocity = np.zeros(steps.shape[2])
    for samples in steps:
        mean = samples.mean(0)
        if estimator == "differenced":
            now = None
            if before is not None:
                now = scale * np.sum((mean - before) ** 2) / 2, mean @ before
            before = mean
        else:
            # The covariance of samples that are S/n base batches each.
            trace = np.trace(np.cov(samples.T, ddof=1))
            now = trace * scale / num_samples, mean @ mean - trace / num_samples
        if now is not None:
            if estimator != "ratio":
                now = max(now[0], 1e-30), max(now[1], 0.0)
            history.append(now)
        gain, average = 1.0, np.zeros(2)
        if history:
            average = np.array(history[0])
            for t, values in enumerate(history):
                weight = max(1 - theta, 1 / (t + 1))
                average = (1 - weight) * average + weight * np.array(values)
            variance, sqnorm = average
            epsilon = 1e-6 if estimator == "ratio" else 0.0
            gain = (variance + sqnorm + epsilon) / (
                variance / scale + sqnorm + epsilon
            )
            gain = min(max(gain, 1.0), scale)
        rate = gain**power * schedule(np.floor(tau))
        velocity = momentum * velocity - rate * mean
        weights = weights + velocity
        tau += gain
        rows.append([gain, *average, tau, *weights])
    return np.array(rows)


@pytest.mark.parametrize(
    "num_replicas, microbatches, arguments",
    [
        (1, 4, {}),
        (1, 4, {"power": 0.5, "smoothing": 0.75}),
        (1, 4, {"estimator": "ratio", "power": 0.5}),
        (2, 2, {"scale": 10, "smoothing": 0.5}),
        (4, 1, {"scale": 10, "estimator": "ratio", "smoothing": 0.5}),
        (1, 1, {"scale": 4, "estimator": "differenced"}),
        # Replicas share one mean gradient.
        (
            *(2, 1),
            {
                "scale": 4,
                "estimator": "differenced",
                "power": 0.5,
                "smoothing": 0.75,
            },
        ),
    ],
    ids=str,
)
def test_trajectory_is_the_oracles(num_replicas, microbatches, arguments):
    num_samples = num_replicas * microbatches
    random = np.random.default_rng(num_samples)
    steps = random.normal(size=(40, num_samples, 3))
    # Noise, and a gradient that shrinks, so the gain grows.
    steps += np.linspace(2.0, 0.2, 40)[:, None, None]
    steps = steps.astype("float32")
    expected = oracle(
        steps,
        scale=arguments.get("scale", num_samples),
        estimator=arguments.get("estimator", "moments"),
        power=arguments.get("power", 1.0),
        theta=arguments.get("smoothing"),
        schedule=lambda step: 0.1 * 0.5 ** (step / 10),
        momentum=0.9,
    )

    def make():
        rate = schedules.ExponentialDecay(0.1, 10, 0.5)
        return AdaScale(SGD(rate, momentum=0.9), **arguments)

    run = run_of(num_replicas, make, microbatches, [(3,)], graph=True)
    # The gain is well within its bounds, 1 and S.
    assert 1.1 < expected[-1, 0] < run.optimizer.scale - 0.1
    got = []
    for samples in steps:
        run.step([samples])
        got.append([*public(run.optimizer), *run.weights()[0]])
    # Float32 sums of up to 40 rounded terms.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


class TestScaleInvariantStep:
    @pytest.mark.parametrize("gain", [1.0, 1.5, 2.0])
    def test_is_exact_at_any_size(self, gain):
        # Opposite samples at S = gain have the gain S.
        optimizer = one_weight(AdaScale(SGD(0.1), scale=gain), OPPOSITE)
        for start in (0, 2**24, 2**24 + 1, 2**40, 2**52):
            assign(optimizer, "scale_invariant_step", start)
            assign(optimizer, "scale_invariant_fraction", 0.0)
            for taken in range(1, 4):
                one_weight(optimizer, OPPOSITE)
                # Past 2^52 float64 has no halves, but the state does.
                whole, fraction = divmod(taken * gain, 1)
                kept = harness.value(optimizer, "scale_invariant_step")
                assert kept == start + int(whole)
                kept = harness.value(optimizer, "scale_invariant_fraction")
                assert kept == fraction
                tau = optimizer.scale_invariant_step
                assert tau.dtype == tf.float64
                assert start == 2**52 or float(tau) == start + taken * gain

    @pytest.mark.parametrize("start", [0, 2**24, 2**40])
    def test_drives_the_schedule(self, start):
        # floor(tau) is start, start + 1, start + 3, start + 4: gain 1.5.
        rate = schedules.PiecewiseConstantDecay(
            [start, start + 1, start + 3], [1.0, 0.5, 0.25, 0.125]
        )
        optimizer = one_weight(AdaScale(SGD(rate), scale=1.5), OPPOSITE)
        assign(optimizer, "scale_invariant_step", start)
        assign(optimizer, "scale_invariant_fraction", 0.0)
        rates = []
        for _ in range(4):
            rates.append(float(optimizer.effective_learning_rate) / 1.5)
            one_weight(optimizer, OPPOSITE)
        assert rates == [1.0, 0.5, 0.25, 0.125]

    def test_is_below_the_iterations_at_a_scale_below_1(self):
        optimizer = AdaScale(SGD(0.1), scale=0.5)
        for _ in range(3):
            one_weight(optimizer, OPPOSITE)
        assert float(optimizer.scale_invariant_step) == 1.5
        assert int(optimizer.iterations) == 3


class TestScale:
    @pytest.mark.parametrize("number", [3, 0.5, np.float32(3), np.int64(3)])
    def test_may_be_any_number(self, number):
        optimizer = AdaScale(SGD(0.1), scale=number)
        assert optimizer.scale == number
        json.dumps(optimizer.get_config())

    def test_gain_at_another_scale(self):
        # 0 and 2: A = 2, T = 1, sigma^2 = 2 (2 - 1) = 2, mu^2 = 1 - 2/2 = 0.
        # 1 and 3: A = 5, T = 4, sigma^2 = 2, mu^2 = 3. Means: 2 and 1.5.
        optimizer = one_weight(AdaScale(SGD(0.1)), BETWEEN)
        one_weight(optimizer, [[1.0], [3.0]])
        # (2 + 1.5) / (2/S + 1.5).
        for scale in (2, 0.5, 1, 7.5, 1e6):
            np.testing.assert_allclose(
                optimizer.gain_at(scale), 3.5 / (2 / scale + 1.5), rtol=1e-6
            )
        np.testing.assert_allclose(optimizer.gain, 3.5 / 2.5, rtol=1e-6)
        # 2 / 1.5.
        np.testing.assert_allclose(optimizer.noise_scale, 4 / 3, rtol=1e-6)


def test_default_smoothing_follows_the_samples():
    # Ten samples of two base batches each: 1 - 10/1000.
    optimizer = AdaScale(SGD(0.1), scale=20)
    optimizer.microbatches = 10
    assert optimizer.smoothing == 0.99


@pytest.mark.parametrize("mode", harness.MODES)
def test_public_numbers_before_the_first_step(mode):
    with harness.strategy_of(2).scope():
        optimizer = AdaScale(SGD(0.25), scale=8)
    names = [*PUBLIC, "skipped_steps", "effective_learning_rate"]

    @harness.MODES[mode]
    def read():
        numbers = [getattr(optimizer, name) for name in names]
        return *numbers, optimizer.gain_at(1000), optimizer.noise_scale

    *numbers, noise_scale = (float(x) for x in read())
    assert numbers == [1, 0, 0, 0, 0, 0.25, 1]
    assert np.isnan(noise_scale)


@pytest.mark.parametrize(
    "power, factor", [(1.0, 4.0), (0.5, 2.0), (0, 1.0), (2, 16.0)]
)
def test_power_multiplies_the_rate(power, factor):
    # 1, 1, 1, -1: A = 1, T = 1/4, n = 4, S = 4:
    # sigma^2 = 4/3 (1 - 1/4) = 1, mu^2 = 1/4 - 1/4 = 0: gain 4.
    optimizer = AdaScale(SGD(0.25), power=power)
    one_weight(optimizer, [[1.0], [1.0], [1.0], [-1.0]])
    rate = 0.25 * factor
    np.testing.assert_allclose(
        optimizer.effective_learning_rate, rate, rtol=1e-6
    )
    # The mean gradient is 1/2.
    [weight] = optimizer._trainable_variables
    np.testing.assert_allclose(weight, [-rate / 2], rtol=1e-6)
    # Progress is the gain itself.
    np.testing.assert_allclose(optimizer.scale_invariant_step, 4.0, rtol=1e-6)


class TestClipping:
    def test_acts_on_the_mean_gradient(self):
        # The mean is (3, 3). Each replica's half of (6, 0) or (0, 6) has norm
        # 3. Clipped alone and added, the halves would have norm sqrt(2).
        run = run_of(
            2,
            lambda: AdaScale(SGD(0.1, global_clipnorm=1.0), scale=1),
            shapes=[(2,)],
        )
        run.step([[[6, 0], [0, 6]]])
        harness.assert_close(run.weights(), [[-0.1 / 2**0.5] * 2])

    @pytest.mark.parametrize("kind", ["clipnorm", "clipvalue"])
    def test_comes_after_the_norms_for_the_gain(self, kind):
        plain, clipped = (
            run_of(2, lambda s=settings: AdaScale(SGD(0.1, **s)))
            for settings in ({}, {kind: 0.1})
        )
        for gradients in harness.random_gradients(2, 2, golden.SHAPES):
            plain.step(gradients)
            clipped.step(gradients)
        assert float(plain.optimizer.gain) > 1
        assert public(plain.optimizer) == public(clipped.optimizer)

    def test_acts_on_sparse_gradients_as_on_dense_ones(self):
        """Both replicas have a slice of row 1.

        Mean gradients are 4 + 2 = 6 in row 1 and 1 in row 0, clipped to 5 and
        1. Clipped slice by slice, 4 and 2 would both pass.
        """
        run = run_of(
            2,
            lambda: AdaScale(SGD(1.0, clipvalue=5.0), scale=1),
            shapes=[(3, 1)],
        )

        def slices(local):
            [dense] = local
            rows = tf.constant([1, 0])
            return [
                tf.IndexedSlices(tf.gather(dense, rows), rows, tf.shape(dense))
            ]

        run.step([[[[2], [8], [0]], [[0], [4], [0]]]], slices)
        harness.assert_close(run.weights(), [[[-1], [-5], [0]]], atol=0)


def test_sparse_samples_have_the_norms_of_dense_ones():
    """The sparse samples hold each row twice."""
    dense, sparse = (
        run_of(2, lambda: AdaScale(SGD(0.1, momentum=0.9)), graph=graph)
        for graph in (False, True)
    )
    for gradients in harness.random_gradients(2, 2, golden.SHAPES):
        dense.step(gradients)
        sparse.step(gradients, lambda local: list(map(harness.slices, local)))
    assert float(dense.optimizer.gain) > 1
    for x, y in zip(dense.optimizer.variables, sparse.optimizer.variables):
        # The two parts are added in another order.
        harness.assert_close(harness.copies(x), harness.copies(y), rtol=1e-6)
    harness.assert_close(sparse.weights(), dense.weights())


def test_weight_decay_is_at_the_effective_rate():
    weight = keras.Variable([1.0])
    optimizer = AdaScale(SGD(0.125, weight_decay=0.5), scale=2)
    optimizer.microbatches = 2
    # Opposite samples, 1 and -1: gain 2. 1 - 2 * 0.125 * 0.5 = 0.875.
    optimizer.apply([tf.zeros(1)], [weight], sample_sqnorm_sum=2.0)
    assert weight.numpy() == [0.875]


class TestAverageOfWeights:
    @staticmethod
    def averaged(optimizer, num_replicas, steps, start=1.0):
        """Takes steps of gain 4 and gradient 1; returns weight and average."""
        strategy = harness.strategy_of(num_replicas)
        with strategy.scope():
            weight = keras.Variable([start])
            optimizer = optimizer()
            optimizer.build([weight])
        optimizer.microbatches = 4 // num_replicas

        def step():
            # At n = 4, |g_i|^2 = 13 of mean gradient 1: sigma^2 =
            # 4/3 (13 - 1) = 16, mu^2 = 1 - 16/4 < 0, so 0: the gain is 4.
            # A replica gets its part of each sample, |g_i / N|^2 = 13 / N^2.
            optimizer.apply(
                [tf.ones(1) / num_replicas],
                [weight],
                sample_sqnorm_sum=13.0 * (4 / num_replicas) / num_replicas**2,
            )

        for _ in range(steps):
            strategy.run(step)
        assert float(optimizer.gain) == 4.0
        [average] = optimizer.inner_optimizer._model_variables_moving_average
        return harness.first(weight), harness.first(average)

    @pytest.mark.parametrize("scale_ema", [True, False])
    @pytest.mark.parametrize("num_replicas", [1, 2])
    def test_advances_by_the_gain(self, num_replicas, scale_ema):
        weight, average = self.averaged(
            lambda: AdaScale(
                SGD(0.125, use_ema=True, ema_momentum=0.5),
                scale=4,
                scale_ema=scale_ema,
            ),
            num_replicas,
            steps=2,
        )
        # Weights 1, 0.5, 0: steps of 4 * 0.125, each worth four base steps.
        # Over 8 base steps the average starts at 7/8 and then is half itself
        # and half 6/8, 5/8, ...: 13/16, 23/32, 39/64, 63/128, 95/256, 127/512,
        # 127/1024. Keras's starts at 0.5 and then is 0.5 * 0.5 = 0.25.
        assert weight == [0.0]
        np.testing.assert_allclose(
            average, [127 / 1024 if scale_ema else 0.25], rtol=1e-6
        )

    def test_equals_that_of_the_base_steps(self):
        """On a line, t steps of gain r average like r t base steps."""
        rate, momentum = 0.01, 0.97
        _, average = self.averaged(
            lambda: AdaScale(
                SGD(rate, use_ema=True, ema_momentum=momentum), scale=4
            ),
            1,
            steps=25,
        )
        # Base step j of n = 100 is at 1 - j rate, and an average that starts
        # there lags by c (1 - rho^(n-1)), c = rho / (1 - rho).
        lag = momentum / (1 - momentum) * (1 - momentum**99)
        np.testing.assert_allclose(average, [1 - rate * (100 - lag)], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_micro_batch_that_is_not_finite_skips_the_step(bad):
    optimizer = AdaScale(SGD(0.1, momentum=0.9), scale=2)
    optimizer.microbatches = 2
    weight = keras.Variable([1.0, 2.0])
    good = tf.constant([1.0, 1.0])
    optimizer.apply([good], [weight], sample_sqnorm_sum=8.0)
    before = harness.state([weight, optimizer])
    # The mean of samples may be finite although their norm is not.
    for gradient, sqnorm in [([bad, 1.0], 1.0), (good, abs(bad))]:
        optimizer.apply(
            [tf.constant(gradient)], [weight], sample_sqnorm_sum=sqnorm
        )
    changed = harness.changed(before, harness.state([weight, optimizer]))
    assert changed == {"adascale/skipped_steps"}
    assert int(optimizer.skipped_steps) == 2


def test_moments_that_overflow_skip_the_step():
    """Norms of (1e15)^2 are finite, but times a scale of 1e10 they are not."""
    optimizer = AdaScale(SGD(1.0), scale=1e10)
    one_weight(optimizer, [[1e15], [-1e15]])
    assert int(optimizer.skipped_steps) == 1
    assert float(optimizer.gradient_variance) == 0.0
    assert float(optimizer.scale_invariant_step) == 0.0


def test_gradients_of_zero_say_nothing():
    optimizer = one_weight(AdaScale(SGD(1.0)), [[0.0], [0.0]])
    assert float(optimizer.gain) == 1.0
    assert float(optimizer.scale_invariant_step) == 1.0


@pytest.mark.parametrize("estimator", ["moments", "ratio", "differenced"])
@pytest.mark.parametrize(
    "dtypes",
    [
        ["float64", "float64"],
        ["float64", "float32"],
        ["bfloat16", "bfloat16"],
        ["float16", "float32"],
    ],
    ids="-".join,
)
def test_weights_of_any_type_have_the_same_gain(dtypes, estimator):
    # Steps of one sample are compared with the step before.
    microbatches, rest = 2, [[1.0, 5.0], [2.0, 8.0]]
    if estimator == "differenced":
        microbatches, rest = 1, [[1.0, 3.0]]
    results = []
    for types in (["float32", "float32"], dtypes):
        optimizer = AdaScale(
            SGD(0.125, momentum=0.5), scale=4, estimator=estimator
        )
        optimizer.microbatches = microbatches
        weights = [keras.Variable([1.0], dtype=dtype) for dtype in types]
        # Small whole numbers: exact in every type.
        for mean, sqnorm in [(2.0, 12.0), *rest]:
            optimizer.apply(
                [tf.constant([mean], v.dtype) for v in weights],
                weights,
                sample_sqnorm_sum=2 * sqnorm,
            )
        slots = optimizer.inner_optimizer.momentums
        assert [v.dtype for v in weights] == types
        assert [v.dtype for v in slots] == types
        assert all(np.isfinite(w.numpy().astype(float)) for w in weights)
        results.append(public(optimizer))
    assert results[0][0] > 1
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaScale(
            SGD(
                schedules.ExponentialDecay(0.1, 3, 0.5),
                momentum=0.9,
                weight_decay=0.1,
                global_clipnorm=1.0,
                use_ema=True,
                ema_overwrite_frequency=2,
            )
        ),
        lambda: AdaScale(
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.Adam(0.1), dynamic_growth_steps=2
            ),
            scale=8,
            estimator="differenced",
            power=0.5,
        ),
    ],
    ids=["moments", "differenced"],
)
def test_a_whole_step_under_xla_is_the_same(make):
    states = [five_steps(make(), jit_compile) for jit_compile in (False, True)]
    # XLA fuses products and sums, which rounds differently.
    harness.assert_close(*states, rtol=1e-5)


def five_steps(optimizer, jit_compile):
    """Takes five steps, one of which overflows; returns the state."""
    optimizer.microbatches = 2
    weights = harness.variables(harness.twos(golden.SHAPES))
    optimizer.build(weights)

    @tf.function(jit_compile=jit_compile)
    def step(mean, sqnorm):
        gradients = [mean[:2], tf.reshape(mean[2:], (1, 1))]
        optimizer.apply(gradients, weights, sample_sqnorm_sum=sqnorm)

    random = np.random.default_rng(0)
    for number in range(5):
        samples = random.normal(size=(2, 3)).astype("float32")
        samples *= float(optimizer.scale_loss(tf.constant(1.0)))
        if number == 2:
            samples[0, 0] = np.inf
        step(tf.constant(samples.mean(0)), tf.constant((samples**2).sum()))
    assert int(optimizer.skipped_steps) == 1
    assert float(optimizer.gain) > 1
    return harness.values([*weights, *optimizer.variables])


class TestRefused:
    @pytest.mark.parametrize(
        "name, rule, values",
        [
            (
                "scale",
                "a finite number > 0: the batch of one step divided by the "
                "base batch",
                [0, -1, -0.5, np.inf, np.nan, "2", True, [2], 1 + 1j],
            ),
            ("smoothing", "a number in [0, 1)", [-0.1, 1, 1.5, np.nan, np.inf]),
            (
                "estimator",
                "one of ('moments', 'ratio', 'differenced')",
                ["moment", "", None, "Ratio"],
            ),
            ("power", "a finite number >= 0", [-1, np.nan, np.inf, "1"]),
        ],
    )
    def test_argument(self, name, rule, values):
        inner = SGD(0.1)
        for value in values:
            received = f"{name}={value!r}"
            with harness.refused(f"`{name}` must be {rule}", received):
                AdaScale(inner, **{name: value})
            if name == "scale":
                with harness.refused(f"`{name}` must be {rule}", received):
                    AdaScale(SGD(0.1)).gain_at(value)
        # The inner optimizer still works by itself.
        assert isinstance(inner.learning_rate, keras.Variable)

    @pytest.mark.parametrize("scale", [2, 0.5])
    @pytest.mark.parametrize("estimator", ["moments", "ratio"])
    def test_one_sample_at_another_scale(self, scale, estimator):
        optimizer = AdaScale(SGD(0.1), scale=scale, estimator=estimator)
        weight = keras.Variable([1.0])
        with (
            harness.untouched(weight, optimizer),
            harness.refused(
                "`microbatches` must be >= 2 on one replica at a scale other",
                f"scale={optimizer.scale}, replicas=1, microbatches=1, "
                f"estimator={estimator!r}",
            ),
        ):
            optimizer.apply([tf.ones(1)], [weight])

    def test_one_sample_at_another_scale_in_fit(self):
        model = harness.linear_model(
            tf_adascale.Model, AdaScale(SGD(0.1), scale=4)
        )
        with (
            harness.untouched(*model.trainable_variables, model.optimizer),
            harness.refused("`microbatches` must be >= 2 on one replica"),
        ):
            harness.fit(model, np.ones((4, 2)), np.ones((4, 1)))

    def test_micro_batches_without_their_norms(self):
        optimizer = AdaScale(SGD(0.1))
        optimizer.microbatches = 3
        weight = keras.Variable([1.0])
        with (
            harness.untouched(weight, optimizer),
            harness.refused(
                "`sample_sqnorm_sum` must be passed to `apply` with several",
                "microbatches=3, sample_sqnorm_sum=None",
            ),
        ):
            optimizer.apply([tf.ones(1)], [weight])


@pytest.mark.parametrize(
    "name, value", [("estimator", "differenced"), ("preconditioned", True)]
)
def test_what_the_constructor_makes_is_not_set_later(name, value):
    optimizer = AdaScale(keras.optimizers.SGD())
    before = getattr(optimizer, name)
    with harness.refused(f"`{name}` must be passed to the constructor of Ada"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before
    setattr(optimizer, name, before)
