"""AdaScale against an oracle of algorithm 2, known gains and its contract."""

import json
import re

import golden
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tf_adascale
from tf_adascale import AdaScale

SGD = keras.optimizers.SGD
schedules = keras.optimizers.schedules

PUBLIC = (
    "gain",
    "gradient_variance",
    "gradient_sqnorm",
    "scale_invariant_step",
)


def three_parts(happened, expected, received):
    """A pattern of an error message in its three parts."""
    parts = (happened, f"Expected {expected}", f"Received: {received}")
    return "(?s)" + ".*".join(map(re.escape, parts))


class Run:
    """Weights 0 and their AdaScale, on replicas and micro-batches.

    Args:
        strategy: `tf.distribute.Strategy`.
        make: function of no argument that returns an `AdaScale`.
        microbatches: int, k.
        shapes: shapes of the weights.
    """

    def __init__(self, strategy, make, microbatches=1, shapes=golden.SHAPES):
        self.strategy = strategy
        with strategy.scope():
            self.variables = [
                keras.Variable(np.zeros(shape, "float32"), name=f"weight_{i}")
                for i, shape in enumerate(shapes)
            ]
            self.optimizer = make()
            self.optimizer.build(self.variables)
        self.optimizer.microbatches = microbatches
        self._graph = tf.function(self._step)

    def step(self, samples, eager=False):
        """Takes a step on n = N k samples, the first k on the first replica.

        Args:
            samples: list of samples, each a list of arrays.
            eager: bool, whether to do so without a graph.
        """
        count = self.strategy.num_replicas_in_sync
        k = self.optimizer.microbatches
        # As `tf_adascale.Model` has them: divided by N, the mean of k.
        parts = np.array(
            [
                np.concatenate([np.ravel(entries) for entries in sample])
                for sample in samples
            ],
            "float32",
        ).reshape(count, k, -1) / np.float32(count)
        step = self._step if eager else self._graph
        step(
            tf.constant(parts.mean(1)),
            tf.constant((parts**2).sum((1, 2))),
        )
        return self

    def _step(self, gradients, sqnorms):
        def replica():
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            sizes = [v.shape.num_elements() for v in self.weights_of()]
            local = tf.split(gradients[index], sizes)
            local = [
                tf.reshape(g, v.shape) for g, v in zip(local, self.variables)
            ]
            statistics = {}
            if self.optimizer.microbatches > 1:
                statistics["sample_sqnorm"] = sqnorms[index]
            self.optimizer.apply(local, self.variables, **statistics)

        self.strategy.run(replica)

    def weights_of(self):
        """The TensorFlow variables of the weights."""
        return [variable.value for variable in self.variables]

    def weights(self):
        """All weights in one array; they are the same on every replica."""
        replicas = [
            self.strategy.experimental_local_results(v)
            for v in self.weights_of()
        ]
        for copies in replicas:
            for one in copies[1:]:
                assert np.array_equal(copies[0].numpy(), one.numpy())
        return np.concatenate([np.ravel(c[0].numpy()) for c in replicas])

    def public(self):
        """The public numbers, in the order of `PUBLIC`."""
        return [float(getattr(self.optimizer, name)) for name in PUBLIC]


def assign(optimizer, name, value):
    """Sets an optimizer's variable, by its name."""
    [variable] = [v for v in optimizer.variables if v.name == name]
    variable.assign(value)


def flat(samples):
    """Samples as lists of one array, for `Run` with one weight."""
    return [[sample] for sample in samples]


def one_weight(optimizer, samples, scale_loss=1.0):
    """Takes a step of an optimizer of one weight, on micro-batches."""
    samples = np.asarray(samples, "float32") * np.float32(scale_loss)
    samples = samples.reshape(len(samples), -1)
    optimizer.microbatches = len(samples)
    if not optimizer.built:
        optimizer.build([keras.Variable(np.zeros(samples.shape[1], "float32"))])
    optimizer.apply(
        [tf.constant(samples.mean(0))],
        sample_sqnorm=tf.constant((samples**2).sum()),
    )
    return optimizer


# One sample of each replica and micro-batch: 1 and -1, or 0 and 2.
OPPOSITE = [[1.0], [-1.0]]
BETWEEN = [[0.0], [2.0]]


class TestGoldenRows:
    @staticmethod
    def check(row, run):
        run.step(row.samples, eager=True)
        # The floor of the variance, 1e-30, is 0 in the table.
        np.testing.assert_allclose(
            run.public(),
            [row.gain, row.variance, row.sqnorm, row.gain],
            rtol=1e-6,
            atol=1e-20,
        )
        mean = np.concatenate([g.ravel() for g in row.mean_gradient])
        np.testing.assert_allclose(
            run.weights(), -0.125 * row.gain * mean, rtol=1e-6, atol=1e-6
        )
        np.testing.assert_allclose(
            run.optimizer.noise_scale,
            np.inf if row.sqnorm == 0 else row.variance / row.sqnorm,
            rtol=1e-6,
            atol=1e-20,
        )

    @pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
    def test_through_replicas(self, row, strategy_of):
        strategy = strategy_of(row.num_samples)
        run = Run(strategy, lambda: AdaScale(SGD(0.125), scale=row.scale))
        self.check(row, run)

    @pytest.mark.parametrize("row", golden.ROWS, ids=lambda row: row.name)
    def test_through_micro_batches(self, row, strategy_of):
        run = Run(
            strategy_of(1),
            lambda: AdaScale(SGD(0.125), scale=row.scale),
            row.num_samples,
        )
        self.check(row, run)

    @pytest.mark.parametrize(
        "row",
        [row for row in golden.ROWS if row.num_samples == 4],
        ids=lambda row: row.name,
    )
    def test_through_both(self, row, strategy_of):
        run = Run(
            strategy_of(2), lambda: AdaScale(SGD(0.125), scale=row.scale), 2
        )
        self.check(row, run)


def oracle(steps, *, scale, estimator, power, theta, schedule, momentum):
    """Algorithm 2 in float64, from the samples' definitions.

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


class TestTrajectory:
    """A run of 40 steps against the oracle."""

    steps = 40

    def check(self, runs, num_samples, **arguments):
        random = np.random.default_rng(num_samples)
        steps = random.normal(size=(self.steps, num_samples, 3))
        # Both noise and a gradient that shrinks, so that the gain grows.
        steps += np.linspace(2.0, 0.2, self.steps)[:, None, None]
        steps = steps.astype("float32")
        expected = oracle(
            steps,
            schedule=lambda step: 0.1 * 0.5 ** (step / 10),
            momentum=0.9,
            **arguments,
        )
        # Neither trivial gain hides what differs.
        assert 1.1 < expected[-1, 0] < arguments["scale"] - 0.1
        for run in runs:
            got = []
            for samples in steps:
                run.step(flat(samples))
                got.append([*run.public(), *run.weights()])
            # Float32 sums of up to 40 rounded terms.
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    @staticmethod
    def runs(strategy_of, layouts, **kwargs):
        def make():
            rate = schedules.ExponentialDecay(0.1, 10, 0.5)
            return AdaScale(SGD(rate, momentum=0.9), **kwargs)

        for count, microbatches in layouts:
            yield Run(strategy_of(count), make, microbatches, [(3,)])

    @pytest.mark.parametrize("estimator", ["moments", "ratio"])
    @pytest.mark.parametrize("power", [1.0, 0.5])
    @pytest.mark.parametrize("smoothing", [None, 0.75])
    def test_of_micro_batches(self, estimator, power, smoothing, strategy_of):
        runs = self.runs(
            strategy_of,
            [(1, 4)],
            estimator=estimator,
            power=power,
            smoothing=smoothing,
        )
        self.check(
            runs, 4, scale=4, estimator=estimator, power=power, theta=smoothing
        )

    @pytest.mark.parametrize("estimator", ["moments", "ratio"])
    def test_of_replicas_and_micro_batches(self, estimator, strategy_of):
        layouts = [(1, 4), (2, 2), (4, 1)]
        runs = self.runs(
            strategy_of, layouts, scale=10, estimator=estimator, smoothing=0.5
        )
        self.check(runs, 4, scale=10, estimator=estimator, power=1.0, theta=0.5)

    @pytest.mark.parametrize("power", [1.0, 0.5])
    @pytest.mark.parametrize("smoothing", [None, 0.75])
    def test_of_differenced_gradients(self, power, smoothing, strategy_of):
        runs = self.runs(
            strategy_of,
            [(1, 1)],
            scale=4,
            estimator="differenced",
            power=power,
            smoothing=smoothing,
        )
        self.check(
            runs,
            1,
            scale=4,
            estimator="differenced",
            power=power,
            theta=smoothing,
        )

    def test_of_differenced_gradients_on_replicas(self, strategy_of):
        """Replicas share one mean gradient."""
        runs = self.runs(
            strategy_of, [(2, 1)], scale=4, estimator="differenced"
        )
        self.check(
            runs, 2, scale=4, estimator="differenced", power=1.0, theta=None
        )


class TestScaleInvariantStep:
    @pytest.mark.parametrize("start", [0, 2**24, 2**24 + 1, 2**40, 2**52])
    @pytest.mark.parametrize("gain", [1.0, 1.5, 2.0])
    def test_is_exact_at_any_size(self, start, gain):
        # Opposite samples at S = gain have the gain S.
        optimizer = AdaScale(SGD(0.1), scale=gain)
        one_weight(optimizer, OPPOSITE)
        assign(optimizer, "scale_invariant_step", start)
        assign(optimizer, "scale_invariant_fraction", 0.0)
        step = tf.function(
            lambda: optimizer.apply([tf.zeros(1)], sample_sqnorm=2.0)
        )
        for taken in range(1, 6):
            step()
            tau = optimizer.scale_invariant_step
            assert tau.dtype == tf.float64
            # A float64 past 2^52 has no halves; what is kept has.
            whole, fraction = divmod(taken * gain, 1)
            values = {v.name: v.numpy() for v in optimizer.variables}
            assert values["scale_invariant_step"] == start + int(whole)
            assert values["scale_invariant_fraction"] == fraction
            if start < 2**52:
                assert float(tau) == start + taken * gain

    def test_adds_up_small_fractions(self):
        # mean 1, |g|^2 = (0 + 4)/2: sigma^2 = 2 (2 - 1) = 2, mu^2 = 1 - 2/2.
        optimizer = AdaScale(SGD(0.1), scale=1 + 2**-20)
        for _ in range(9):
            one_weight(optimizer, OPPOSITE)
        # 9 gains of 1 + 2^-20 each.
        assert float(optimizer.scale_invariant_step) == 9 + 9 * 2**-20

    @pytest.mark.parametrize("start", [0, 2**24, 2**40])
    def test_drives_the_schedule(self, start):
        # floor(tau) is start, start + 1, start + 3, start + 4: gain 1.5.
        rate = schedules.PiecewiseConstantDecay(
            [start, start + 1, start + 3], [1.0, 0.5, 0.25, 0.125]
        )
        optimizer = AdaScale(SGD(rate), scale=1.5)
        one_weight(optimizer, OPPOSITE)
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
    def test_is_the_number_of_samples_by_default(self, strategy_of):
        run = Run(strategy_of(2), lambda: AdaScale(SGD(0.1)), microbatches=3)
        assert run.optimizer.num_samples == 6
        assert run.optimizer.scale == 6

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

    def test_averages_are_those_of_the_base_batch(self):
        """The same gradients, of samples of one base batch and of eight."""
        one, eight = AdaScale(SGD(0.1)), AdaScale(SGD(0.1), scale=16)
        for samples in (BETWEEN, [[1.0], [3.0]]):
            one_weight(one, samples)
            one_weight(eight, samples)
        # A sample's variance is 1/8 of a base batch's.
        np.testing.assert_allclose(
            eight.gradient_variance, 8 * one.gradient_variance, rtol=1e-6
        )
        np.testing.assert_allclose(
            eight.gradient_sqnorm, one.gradient_sqnorm, rtol=1e-6
        )

    def test_before_the_first_step(self):
        optimizer = AdaScale(SGD(0.25), scale=8)
        assert float(optimizer.gain) == 1.0
        assert float(optimizer.gain_at(1000)) == 1.0
        assert float(optimizer.scale_invariant_step) == 0.0
        assert float(optimizer.effective_learning_rate) == 0.25
        assert int(optimizer.skipped_steps) == 0
        assert np.isnan(float(optimizer.noise_scale))

    def test_public_scalars_in_a_graph(self, strategy_of):
        strategy = strategy_of(2)
        with strategy.scope():
            optimizer = AdaScale(SGD(0.25))
        names = (*PUBLIC, "skipped_steps", "effective_learning_rate")

        @tf.function
        def read():
            return [getattr(optimizer, name) for name in names]

        assert [float(x) for x in read()] == [1, 0, 0, 0, 0, 0.25]
        assert [float(getattr(optimizer, n)) for n in names] == [
            *(1, 0, 0, 0, 0, 0.25)
        ]


class TestPower:
    @pytest.mark.parametrize(
        "power, factor", [(1.0, 4.0), (0.5, 2.0), (0, 1.0), (2, 16.0)]
    )
    def test_multiplies_the_rate(self, power, factor):
        # 1, 1, 1, -1: A = 1, T = 1/4, n = 4, S = 4:
        # sigma^2 = 4/3 (1 - 1/4) = 1, mu^2 = 1/4 - 1/4 = 0: gain 4.
        optimizer = AdaScale(SGD(0.25), power=power)
        one_weight(optimizer, [[1.0], [1.0], [1.0], [-1.0]])
        np.testing.assert_allclose(optimizer.gain, 4.0, rtol=1e-6)
        np.testing.assert_allclose(
            optimizer.effective_learning_rate, 0.25 * factor, rtol=1e-6
        )
        # The mean gradient is 1/2.
        [weight] = optimizer._trainable_variables
        np.testing.assert_allclose(
            weight.numpy(), [-0.25 * factor / 2], rtol=1e-6
        )
        # Progress is the gain itself.
        np.testing.assert_allclose(
            optimizer.scale_invariant_step, 4.0, rtol=1e-6
        )


class TestDifferenced:
    def test_needs_two_steps(self):
        optimizer = AdaScale(SGD(0.125), scale=8, estimator="differenced")
        weight = keras.Variable([0.0, 0.0])
        optimizer.apply([tf.constant([1.0, 1.0])], [weight])
        assert float(optimizer.gain) == 1.0
        assert float(optimizer.scale_invariant_step) == 1.0
        optimizer.apply([tf.constant([3.0, 1.0])], [weight])
        # |g - g'|^2 = 4, <g, g'> = 4: sigma^2 = 8 * 4/2 = 16, mu^2 = 4,
        # gain (16 + 4) / (2 + 4) = 10/3.
        assert float(optimizer.gradient_variance) == 16.0
        assert float(optimizer.gradient_sqnorm) == 4.0
        np.testing.assert_allclose(optimizer.gain, 10 / 3, rtol=1e-6)
        np.testing.assert_allclose(
            weight.numpy(),
            [-0.125 * (1 + 10), -0.125 * (1 + 10 / 3)],
            rtol=1e-6,
        )

    def test_of_opposite_gradients_is_the_scale(self):
        optimizer = AdaScale(SGD(0.1), scale=5, estimator="differenced")
        weight = keras.Variable([0.0])
        for sign in (1.0, -1.0, 1.0):
            optimizer.apply([tf.constant([sign])], [weight])
        np.testing.assert_allclose(optimizer.gain, 5.0, rtol=1e-6)

    def test_of_equal_gradients_is_1(self):
        optimizer = AdaScale(SGD(0.1), scale=5, estimator="differenced")
        weight = keras.Variable([0.0])
        for _ in range(3):
            optimizer.apply([tf.ones(1)], [weight])
        assert float(optimizer.gain) == 1.0


class TestTypesOfWeights:
    # Steps of one sample are compared with the one before, 1 with 2.
    CASES = (
        ("moments", 2, [[1.0, 5.0], [2.0, 8.0]]),
        ("ratio", 2, [[1.0, 5.0], [2.0, 8.0]]),
        ("differenced", 1, [[1.0, 3.0]]),
    )

    @pytest.mark.parametrize("estimator, microbatches, rest", CASES)
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
    def test_give_the_same_gain(self, dtypes, estimator, microbatches, rest):
        results = []
        for types in (["float32", "float32"], dtypes):
            optimizer = AdaScale(
                SGD(0.125, momentum=0.5), scale=4, estimator=estimator
            )
            optimizer.microbatches = microbatches
            weights = [keras.Variable([1.0], dtype=dtype) for dtype in types]
            optimizer.build(weights)
            # Small whole numbers: exact in every type.
            for mean, sqnorm in [(2.0, 12.0), *rest]:
                optimizer.apply(
                    [tf.constant([mean], v.dtype) for v in weights],
                    sample_sqnorm=2 * sqnorm,
                )
            assert [v.dtype for v in weights] == types
            assert [v.dtype for v in optimizer.inner_optimizer.momentums] == (
                types
            )
            results.append([float(getattr(optimizer, n)) for n in PUBLIC])
            assert all(np.isfinite(w.numpy().astype(float)) for w in weights)
        assert results[0][0] > 1
        np.testing.assert_allclose(*results, rtol=1e-6)


class TestInXla:
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
                estimator="ratio",
                power=0.5,
            ),
            lambda: AdaScale(SGD(0.1), scale=8, estimator="differenced"),
        ],
        ids=["moments", "ratio", "differenced"],
    )
    def test_a_whole_step_is_the_same(self, make):
        states = [self.trained(make(), jit) for jit in (False, True)]
        # XLA fuses products and sums.
        for x, y in zip(*states):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    @staticmethod
    def trained(optimizer, jit_compile):
        """Takes five steps, of which one overflows; returns the state."""
        optimizer.microbatches = 2
        weights = [
            keras.Variable(np.ones(shape, "float32"), name=f"weight_{i}")
            for i, shape in enumerate(golden.SHAPES)
        ]
        optimizer.build(weights)

        @tf.function(jit_compile=jit_compile)
        def step(mean, sqnorm):
            gradients = [mean[:2], tf.reshape(mean[2:], (1, 1))]
            optimizer.apply(gradients, weights, sample_sqnorm=sqnorm)

        random = np.random.default_rng(0)
        for number in range(5):
            samples = random.normal(size=(2, 3)).astype("float32")
            samples *= float(optimizer.scale_loss(tf.constant(1.0)))
            if number == 2:
                samples[0, 0] = np.inf
            step(tf.constant(samples.mean(0)), tf.constant((samples**2).sum()))
        assert int(optimizer.skipped_steps) == 1
        assert float(optimizer.gain) > 1
        return [v.numpy() for v in (*weights, *optimizer.variables)]


class TestProperties:
    # Small whole numbers: sums are exact.
    samples = st.integers(2, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-4, 4), min_size=3, max_size=3),
            min_size=n,
            max_size=n,
        )
    )
    four = st.lists(
        st.lists(st.integers(-4, 4), min_size=3, max_size=3),
        min_size=4,
        max_size=4,
    )
    scales = st.one_of(st.none(), st.floats(0.25, 64.0))
    estimators = st.sampled_from(["moments", "ratio"])

    @settings(max_examples=25)
    @given(
        steps=st.lists(samples, min_size=1, max_size=3),
        scale=scales,
        estimator=estimators,
    )
    def test_gain_is_between_1_and_the_scale(self, steps, scale, estimator):
        optimizer = AdaScale(SGD(0.1), scale=scale, estimator=estimator)
        for samples in steps:
            one_weight(optimizer, samples)
            bounds = sorted((1.0, float(optimizer.scale)))
            gain = float(optimizer.gain)
            # S itself is rounded to a float32.
            assert np.float32(bounds[0]) <= gain <= np.float32(bounds[1])
            assert np.all(
                np.isfinite(optimizer._trainable_variables[0].numpy())
            )

    @settings(max_examples=15)
    @given(
        steps=st.lists(four, min_size=1, max_size=3), power=st.integers(-8, 8)
    )
    def test_gain_is_invariant_to_the_scale_of_the_loss(self, steps, power):
        one, other = AdaScale(SGD(0.1)), AdaScale(SGD(0.1))
        for samples in steps:
            one_weight(one, samples)
            one_weight(other, samples, scale_loss=2.0**power)
            # Powers of two scale float32 exactly; only the floor of 1e-30 does
            # not, and beside it there is a gradient or nothing.
            np.testing.assert_allclose(one.gain, other.gain, rtol=1e-6)

    @settings(max_examples=5)
    @given(samples=four, scale=scales, estimator=estimators)
    def test_replicas_and_micro_batches_agree(self, samples, scale, estimator):
        def make():
            return AdaScale(SGD(0.1), scale=scale, estimator=estimator)

        mirrored = [
            tf.distribute.MirroredStrategy(
                [f"CPU:{index}" for index in range(count)],
                cross_device_ops=tf.distribute.ReductionToOneDevice(),
            )
            for count in (2, 4)
        ]
        results = []
        for strategy, microbatches in (
            (tf.distribute.get_strategy(), 4),
            (mirrored[0], 2),
            (mirrored[1], 1),
        ):
            run = Run(strategy, make, microbatches, [(3,)])
            run.step(flat(samples), eager=True)
            results.append([*run.public(), *run.weights()])
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=1e-6, atol=1e-6)


class TestRefused:
    @pytest.mark.parametrize(
        "scale", [0, -1, -0.5, np.inf, np.nan, "2", True, [2], 1 + 1j]
    )
    def test_scale(self, scale):
        message = three_parts(
            "The scale is not a size of a batch.",
            "a finite number > 0, the batch of one step divided by the base "
            "batch.",
            f"scale={scale!r}",
        )
        inner = SGD(0.1)
        with pytest.raises(ValueError, match=message):
            AdaScale(inner, scale=scale)
        assert isinstance(inner.learning_rate, keras.Variable)
        with pytest.raises(ValueError, match=message):
            AdaScale(inner).gain_at(scale)

    @pytest.mark.parametrize("smoothing", [-0.1, 1, 1.5, np.nan, np.inf])
    def test_smoothing(self, smoothing):
        inner = SGD(0.1)
        message = three_parts(
            "The smoothing is out of range.",
            "a number in [0, 1), 0 for no averaging.",
            f"smoothing={smoothing!r}",
        )
        with pytest.raises(ValueError, match=message):
            AdaScale(inner, smoothing=smoothing)
        assert isinstance(inner.learning_rate, keras.Variable)

    @pytest.mark.parametrize("estimator", ["moment", "", None, "Ratio"])
    def test_estimator(self, estimator):
        inner = SGD(0.1)
        message = three_parts(
            "The estimator is unknown.",
            "one of ('moments', 'ratio', 'differenced').",
            f"estimator={estimator!r}",
        )
        with pytest.raises(ValueError, match=message):
            AdaScale(inner, estimator=estimator)
        assert isinstance(inner.learning_rate, keras.Variable)

    @pytest.mark.parametrize("power", [-1, np.nan, np.inf])
    def test_power(self, power):
        message = three_parts(
            "The power of the gain is out of range.",
            "a finite number >= 0.",
            f"power={power!r}",
        )
        with pytest.raises(ValueError, match=message):
            AdaScale(SGD(0.1), power=power)

    def test_arguments_by_position(self):
        with pytest.raises(TypeError):
            AdaScale(SGD(0.1), 2)

    @pytest.mark.parametrize("scale", [2, 0.5])
    @pytest.mark.parametrize("estimator", ["moments", "ratio"])
    def test_one_sample_at_another_scale(self, scale, estimator):
        optimizer = AdaScale(SGD(0.1), scale=scale, estimator=estimator)
        weight = keras.Variable([1.0])
        optimizer.build([weight])
        before = [v.numpy() for v in optimizer.variables]
        message = three_parts(
            "The gradient's variance cannot be estimated from one sample per "
            "step.",
            "more replicas, or microbatches >= 2 in tf_adascale.Model.compile, "
            'or AdaScale(estimator="differenced"), or scale=1.',
            f"scale={optimizer.scale}, replicas=1, microbatches=1, "
            f"estimator={estimator!r}",
        )
        with pytest.raises(ValueError, match=message):
            optimizer.apply([tf.ones(1)], [weight])
        assert weight.numpy() == [1.0]
        for v, old in zip(optimizer.variables, before):
            assert np.array_equal(v.numpy(), old)

    def test_one_sample_at_another_scale_in_fit(self):
        inputs = keras.Input((1,))
        model = tf_adascale.Model(inputs, keras.layers.Dense(1)(inputs))
        model.compile(AdaScale(SGD(0.1), scale=4), "mse")
        x = np.ones((4, 1))
        before = model.get_weights()
        with pytest.raises(ValueError, match="from one sample per step"):
            model.fit(x, x, verbose=0)
        for old, new in zip(before, model.get_weights()):
            assert np.array_equal(old, new)

    def test_micro_batches_without_their_norms(self):
        optimizer = AdaScale(SGD(0.1))
        optimizer.microbatches = 3
        weight = keras.Variable([1.0])
        message = three_parts(
            "The squared norms of the micro-batches' gradients are missing.",
            "`sample_sqnorm` in `apply`, as tf_adascale.Model passes it.",
            "microbatches=3, sample_sqnorm=None",
        )
        with pytest.raises(ValueError, match=message):
            optimizer.apply([tf.ones(1)], [weight])
        assert weight.numpy() == [1.0]


class TestConfig:
    ARGUMENTS = (
        {},
        {"scale": 8},
        {"scale": 0.5, "estimator": "ratio", "smoothing": 0.25},
        {"estimator": "differenced", "power": 0.5, "scale_ema": False},
        {"name": "mine", "smoothing": 0.0},
    )

    @pytest.mark.parametrize("arguments", ARGUMENTS)
    def test_round_trip(self, arguments):
        rate = schedules.ExponentialDecay(0.5, 10, 0.25)
        optimizer = AdaScale(SGD(rate, momentum=0.5), **arguments)
        config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
        copied = keras.optimizers.deserialize(config)
        assert type(copied) is AdaScale
        for name, value in arguments.items():
            assert optimizer.get_config()[name] == value
        assert copied.get_config() == optimizer.get_config()

    def test_copy_trains_alike(self):
        rate = schedules.ExponentialDecay(0.5, 3, 0.25)
        optimizer = AdaScale(
            SGD(rate, momentum=0.5, use_ema=True),
            scale=6,
            estimator="ratio",
            smoothing=0.25,
            power=0.5,
            scale_ema=False,
        )
        copied = AdaScale.from_config(optimizer.get_config())
        for samples in ([[1.0], [2.0]], [[-1.0], [2.0]], [[0.0], [1.0]]):
            for one in (optimizer, copied):
                one_weight(one, samples)
        for x, y in zip(optimizer.variables, copied.variables):
            assert np.array_equal(x.numpy(), y.numpy())
        weights = [
            o._trainable_variables[0].numpy() for o in (optimizer, copied)
        ]
        assert np.array_equal(*weights)


def test_gradients_of_zero_say_nothing():
    run = Run(
        tf.distribute.get_strategy(),
        lambda: AdaScale(SGD(1.0)),
        microbatches=2,
        shapes=[(2,)],
    )
    zero = [np.zeros(2, "float32")]
    run.step([zero, zero])
    assert float(run.optimizer.gain) == 1.0
    assert float(run.optimizer.scale_invariant_step) == 1.0


def test_moments_that_overflow_skip_the_step():
    """Norms of (1e15)^2 are finite, but times a scale of 1e10 they are not."""
    run = Run(
        tf.distribute.get_strategy(),
        lambda: AdaScale(SGD(1.0), scale=1e10),
        microbatches=2,
        shapes=[(1,)],
    )
    run.step([[np.array([1e15])], [np.array([-1e15])]])
    assert int(run.optimizer.skipped_steps) == 1
    assert float(run.optimizer.gradient_variance) == 0.0
    assert float(run.optimizer.scale_invariant_step) == 0.0


def test_a_sum_of_sparse_gradients_is_clipped_as_one(strategy_of):
    """Both replicas have a gradient of row 1, which joined are two slices.

    Mean gradients are 4 + 2 = 6 in row 1 and 1 in row 0, clipped to 5 and 1.
    Slice by slice, 4 and 2 would both pass.
    """
    strategy = strategy_of(2)
    with strategy.scope():
        weight = keras.Variable(np.zeros((3, 1), "float32"))
        optimizer = AdaScale(SGD(1.0, clipvalue=5.0), scale=1)

    @tf.function
    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        rows = tf.where(replica == 0, [[4.0], [1.0]], [[2.0], [0.0]])
        gradient = tf.IndexedSlices(
            rows, tf.constant([1, 0]), tf.constant([3, 1])
        )
        optimizer.apply([gradient], [weight])

    strategy.run(step)
    np.testing.assert_array_equal(weight.value.numpy(), [[-1], [-5], [0]])
