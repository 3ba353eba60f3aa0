"""The optimizer around another: what reaches the inner one, and what does not.

The wrapper is abstract; these tests run it as `AdaScale`, which `Adasum` and
others share it with.
"""

import copy
import json
import re
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tf_adascale import AdaScale

SGD = keras.optimizers.SGD
LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
schedules = keras.optimizers.schedules

SHAPES = ((3, 2), (2,))
MODES = {"eager": lambda function: function, "function": tf.function}


def three_parts(happened, expected, received):
    """A pattern of an error message in its three parts."""
    parts = (happened, f"Expected {expected}", f"Received: {received}")
    return "(?s)" + ".*".join(map(re.escape, parts))


def named(optimizer):
    """The state of an optimizer, but for a rate: pairs of name and value."""
    return [
        (variable.name, variable.numpy())
        for variable in optimizer.variables
        if variable.name != "learning_rate"
    ]


def assert_same(left, right):
    """Asserts that two lists of names and values are equal to the bit."""
    assert [name for name, _ in left] == [name for name, _ in right]
    for (name, x), (_, y) in zip(left, right):
        assert x.dtype == y.dtype, name
        assert np.array_equal(x, y), name


def weights(values):
    """Variables of these values, always of the same names."""
    return [
        keras.Variable(value, name=f"weight_{number}")
        for number, value in enumerate(values)
    ]


class Run:
    """Weights and their optimizer on the replicas of a strategy.

    Args:
        strategy: `tf.distribute.Strategy`.
        make: function of no argument that returns an optimizer.
        initial: list of arrays.
        sparse: bool, whether gradients are given as `tf.IndexedSlices` of all
            rows, each split in two of one index.
    """

    def __init__(self, strategy, make, initial, sparse=False):
        self.strategy = strategy
        self.sparse = sparse
        with strategy.scope():
            self.variables = weights(initial)
            self.optimizer = make()
            self.optimizer.build(self.variables)
        self._step = tf.function(self._run)

    def step(self, gradients, eager=False):
        """Takes a step.

        Args:
            gradients: list of arrays, one for each variable; their first axis
                is that of the replicas.
            eager: bool, whether to do so without a graph.
        """
        step = self._run if eager else self._step
        step([tf.constant(g, tf.float32) for g in gradients])
        return self

    def _run(self, gradients):
        def replica():
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            local = [self.optimizer.scale_loss(g[index]) for g in gradients]
            local = [g / context.num_replicas_in_sync for g in local]
            if self.sparse:
                local = [slices(g) for g in local]
            self.optimizer.apply(local, self.variables)

        self.strategy.run(replica)

    def weights(self):
        """The weights on each replica, a list of lists of arrays."""
        return self._values(self.variables)

    def state(self):
        """The weights and the optimizer's state on each replica."""
        return self._values(self.variables + self.optimizer.variables)

    def value(self, name):
        """The value of an optimizer's variable, by its name."""
        [variable] = [v for v in self.optimizer.variables if v.name == name]
        return self.strategy.experimental_local_results(variable.value)[0]

    def _values(self, variables):
        parts = [
            self.strategy.experimental_local_results(v.value) for v in variables
        ]
        return [[x.numpy() for x in replica] for replica in zip(*parts)]


def slices(dense):
    """A dense gradient as slices of every index twice: a quarter, the rest."""
    count = dense.shape[0]
    return tf.IndexedSlices(
        tf.concat([0.25 * dense, 0.75 * dense], 0),
        tf.concat([tf.range(count), tf.range(count)], 0),
        tf.shape(dense),
    )


def random_gradients(steps, replicas, seed=0):
    """Yields gradients of steps: small whole numbers, exact to add."""
    random = np.random.default_rng(seed)
    for _ in range(steps):
        yield [
            random.integers(-8, 9, size=(replicas, *shape)).astype("float32")
            for shape in SHAPES
        ]


def initial():
    return [np.full(shape, 2.0, "float32") for shape in SHAPES]


# Inner optimizers, and what of them a wrapper could get wrong.
INNER = {
    "sgd": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.03, momentum=0.9),
    "nesterov": lambda: SGD(0.03, momentum=0.9, nesterov=True),
    "weight_decay": lambda: SGD(0.1, momentum=0.9, weight_decay=0.01),
    "clipnorm": lambda: SGD(0.1, momentum=0.9, clipnorm=1.0),
    "global_clipnorm": lambda: SGD(0.1, momentum=0.9, global_clipnorm=1.0),
    "clipvalue": lambda: SGD(0.1, momentum=0.9, clipvalue=0.5),
    "ema": lambda: SGD(0.1, use_ema=True, ema_momentum=0.9),
    "ema_overwrite": lambda: SGD(
        0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=7
    ),
    "exponential": lambda: SGD(schedules.ExponentialDecay(0.1, 30, 0.5)),
    "piecewise": lambda: SGD(
        schedules.PiecewiseConstantDecay([20, 60], [0.1, 0.03, 0.01]),
        momentum=0.9,
        weight_decay=0.01,
    ),
    "callable": lambda: SGD(lambda: 0.1),
    "loss_scale_factor": lambda: SGD(0.1, loss_scale_factor=100.0),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(
        schedules.CosineDecay(0.01, 100), weight_decay=0.1
    ),
    "lamb": lambda: keras.optimizers.Lamb(0.01, weight_decay=0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5),
}


class TestAtScale1IsTheInnerOptimizer:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", INNER)
    def test_to_the_bit(self, name, mode):
        """Weights, slots, iterations; one weight has no gradient."""
        plain, wrapped = INNER[name](), AdaScale(INNER[name]())
        both = [weights([*initial(), np.ones(1, "float32")]) for _ in range(2)]
        for optimizer, variables in zip((plain, wrapped), both):
            variables[1].constraint = keras.constraints.NonNeg()
            optimizer.build(variables)

        @MODES[mode]
        def step(*gradients):
            # Keras on TensorFlow warns of None with a TypeError.
            plain.apply(gradients, both[0][:2])
            wrapped.apply([*gradients, None], both[1])

        # Fractions, so that every rounding counts.
        random = np.random.default_rng(0)
        steps = {"eager": 20, "function": 100}[mode]
        for _ in range(steps):
            step(
                *(tf.constant(random.normal(size=s), "float32") for s in SHAPES)
            )
        for x, y in zip(*both):
            assert np.array_equal(x.numpy(), y.numpy())
        assert not np.array_equal(both[0][0].numpy(), initial()[0])
        assert both[1][1].numpy().min() >= 0
        assert_same(named(plain), named(wrapped.inner_optimizer))
        assert int(wrapped.iterations) == steps
        assert float(wrapped.gain) == 1.0
        assert float(wrapped.scale_invariant_step) == steps
        assert int(wrapped.skipped_steps) == 0

    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    def test_for_weights_of_other_types(self, dtype):
        def make():
            return SGD(0.1, momentum=0.9, weight_decay=0.01, use_ema=True)

        plain, wrapped = make(), AdaScale(make())
        random = np.random.default_rng(0)
        gradients = random.normal(size=(20, 5))
        for optimizer in (plain, wrapped):
            weight = keras.Variable(np.ones(5), dtype=dtype, name="weight")
            for gradient in gradients:
                optimizer.apply([tf.constant(gradient, dtype)], [weight])
        # NumPy does not compare bfloat16.
        plain, wrapped = (
            [
                (name, value.astype("float64"))
                for name, value in named(optimizer)
            ]
            for optimizer in (plain, wrapped.inner_optimizer)
        )
        assert_same(plain, wrapped)

    @pytest.mark.parametrize(
        "name",
        [
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adamax",
            "Ftrl",
            "Lion",
            "Nadam",
            "ScheduleFreeAdamW",
        ],
    )
    def test_or_the_optimizer_is_refused(self, name):
        """No optimizer of Keras is followed in part."""
        make = getattr(keras.optimizers, name, None)
        if make is None:
            pytest.skip(f"Keras {keras.__version__} has no {name}")
        plain = make(0.01)
        try:
            wrapped = AdaScale(make(0.01))
        except ValueError as error:
            assert re.search("Expected .* Received: ", str(error))  # noqa: PT017
            return
        both = [weights(initial()) for _ in range(2)]
        for gradients in random_gradients(5, 1):
            gradients = [tf.constant(g[0]) for g in gradients]
            plain.apply(gradients, both[0])
            wrapped.apply(gradients, both[1])
        for x, y in zip(*both):
            assert np.array_equal(x.numpy(), y.numpy())
        plain, inner = named(plain), named(wrapped.inner_optimizer)
        if name == "Nadam":  # One of its variables has a name by its number.
            plain, inner = ([("", v) for _, v in vs] for vs in (plain, inner))
        assert_same(plain, inner)

    def test_in_fit(self):
        """The wrapper may be deleted from a script at any time."""
        trained = []
        for around in (lambda optimizer: optimizer, AdaScale):
            keras.utils.set_random_seed(1)
            inputs = keras.Input((4,))
            outputs = keras.layers.Dense(3, activation="relu")(inputs)
            model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
            model.compile(around(INNER["piecewise"]()), "mse")
            random = np.random.default_rng(0)
            x, y = random.normal(size=(32, 4)), random.normal(size=(32, 1))
            model.fit(x, y, batch_size=8, epochs=3, verbose=0)
            trained.append(model.get_weights())
        for x, y in zip(*trained):
            assert np.array_equal(x, y)


class TestGradientsThatAreMissing:
    @pytest.mark.parametrize("count", [1, 2])
    def test_none_leaves_its_variable_and_slots_alone(self, count, strategy_of):
        strategy = strategy_of(count)
        with strategy.scope():
            variables = [keras.Variable([1.0, 1.0]) for _ in range(3)]
            optimizer = AdaScale(SGD(0.1, momentum=0.9, weight_decay=0.1))
            optimizer.build(variables)

        def step(*present):
            optimizer.apply(
                [tf.ones(2) if p else None for p in present], variables
            )

        run = tf.function(lambda *present: strategy.run(step, present))
        run(True, True, True)
        before = [v.value.numpy() for v in optimizer.variables + variables]
        run(False, True, False)
        names = [v.name for v in optimizer.variables]
        names += ["first", "second", "third"]
        changed = [
            name
            for name, old, new in zip(
                names, before, optimizer.variables + variables
            )
            if not np.array_equal(old, new.value.numpy())
        ]
        momentum = [v.name for v in optimizer.inner_optimizer.momentums]
        assert {momentum[1], "second"} <= set(changed)
        assert not {momentum[0], momentum[2], "first", "third"} & set(changed)

    def test_none_on_another_step_counts_as_zero_in_the_norms(self):
        optimizer = AdaScale(SGD(0.1), scale=4, estimator="differenced")
        variables = weights([[0.0], [0.0]])
        one = tf.ones(1)
        optimizer.apply([one, one], variables)
        optimizer.apply([3 * one, None], variables)
        # |g - g'|^2 = (3 - 1)^2 = 4, <g, g'> = 3: sigma^2 = 4 * 4/2 = 8.
        assert float(optimizer.gradient_variance) == 8.0
        assert float(optimizer.gradient_sqnorm) == 3.0


class TestClipping:
    @staticmethod
    def make(**kwargs):
        return AdaScale(SGD(0.1, **kwargs))

    def test_acts_on_the_mean_gradient(self, strategy_of):
        # Means (3, 3): each replica's half of (6, 0) and (0, 6) has norm 3.
        # Clipped alone and added, they would have norm sqrt(2).
        def make():
            return AdaScale(SGD(0.1, global_clipnorm=1.0), scale=1)

        run = Run(strategy_of(2), make, [np.zeros(2, "float32")])
        run.step([[[6, 0], [0, 6]]])
        for [weight] in run.weights():
            np.testing.assert_allclose(weight, [-0.1 / 2**0.5] * 2, rtol=1e-6)

    def test_lets_no_larger_update_through(self, strategy_of):
        def make():
            return AdaScale(SGD(0.5, global_clipnorm=1.0), scale=1)

        run = Run(strategy_of(2), make, initial())
        before = run.weights()[0]
        for gradients in random_gradients(5, 2):
            after = run.step(gradients).weights()[0]
            update = [y - x for x, y in zip(before, after)]
            norm = sum(np.sum(u**2) for u in update) ** 0.5
            # 0.5 * 1, for no gradient here is shorter than 1.
            np.testing.assert_allclose(norm, 0.5, rtol=1e-6)
            before = after

    @pytest.mark.parametrize(
        "clipping",
        [{"clipnorm": 0.1}, {"clipvalue": 0.1}, {"global_clipnorm": 0.1}],
    )
    def test_comes_after_the_norms_for_the_gain(self, clipping, strategy_of):
        runs = [
            Run(strategy_of(2), partial(self.make, **kwargs), initial())
            for kwargs in ({}, clipping)
        ]
        for gradients in random_gradients(3, 2):
            for run in runs:
                run.step(gradients)
        plain, clipped = (run.optimizer for run in runs)
        assert float(plain.gain) > 1
        for name in ("gain", "gradient_variance", "gradient_sqnorm"):
            assert float(getattr(plain, name)) == float(getattr(clipped, name))


class TestWeightDecay:
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("by", ["list", "name"])
    def test_honours_what_is_excluded(self, by, count, strategy_of):
        strategy = strategy_of(count)
        with strategy.scope():
            kernel = keras.Variable([1.0], name="kernel")
            bias = keras.Variable([1.0], name="bias")
            optimizer = AdaScale(SGD(0.5, weight_decay=0.5), scale=1)
            if by == "list":
                optimizer.exclude_from_weight_decay(var_list=[bias])
            else:
                optimizer.exclude_from_weight_decay(var_names=["bias"])
            optimizer.build([kernel, bias])
        zero = tf.zeros(1)
        strategy.run(lambda: optimizer.apply([zero, zero], [kernel, bias]))
        # 1 - 0.5 * 0.5 * 1.
        assert kernel.value.numpy() == [0.75]
        assert bias.value.numpy() == [1.0]

    def test_is_at_the_effective_rate(self):
        weight = keras.Variable([1.0])
        optimizer = AdaScale(SGD(0.125, weight_decay=0.5), scale=2)
        optimizer.microbatches = 2
        # Opposite samples, 1 and -1: gain 2. 1 - 2 * 0.125 * 0.5 = 0.875.
        optimizer.apply([tf.zeros(1)], [weight], sample_sqnorm=2.0)
        assert weight.numpy() == [0.875]


class TestAverageOfWeights:
    @pytest.mark.parametrize("scale_ema", [True, False])
    @pytest.mark.parametrize("count", [1, 2])
    def test_advances_by_the_gain(self, count, scale_ema, strategy_of):
        strategy = strategy_of(count)
        with strategy.scope():
            weight = keras.Variable([1.0])
            optimizer = AdaScale(
                SGD(0.125, use_ema=True, ema_momentum=0.5),
                scale=4,
                scale_ema=scale_ema,
            )
            optimizer.build([weight])
        optimizer.microbatches = 4 // count

        def step():
            # At n = 4, |g_i|^2 = 13 of mean gradient 1: sigma^2 =
            # 4/3 (13 - 1) = 16, mu^2 = 1 - 16/4 < 0, so 0: the gain is 4.
            # A replica gets its part of each sample, |g_i / N|^2 = 13 / N^2.
            optimizer.apply(
                [tf.ones(1) / count],
                [weight],
                sample_sqnorm=13.0 * (4 / count) / count**2,
            )

        for _ in range(2):
            strategy.run(step)
        assert float(optimizer.gain) == 4.0
        # Weights 1, 0.5, 0: steps of 4 * 0.125, which are four base steps each.
        # Of 8 base steps, the average starts at 7/8 and then is half itself and
        # half 6/8, 5/8, ...: 13/16, 23/32, 39/64, 63/128, 95/256, 127/512,
        # 127/1024. By Keras it starts at 0.5 and then is 0.5 * 0.5 = 0.25.
        [average] = optimizer.inner_optimizer._model_variables_moving_average
        assert weight.value.numpy() == [0.0]
        np.testing.assert_allclose(
            average.value.numpy(),
            [127 / 1024 if scale_ema else 0.25],
            rtol=1e-6,
        )

    @pytest.mark.parametrize("count", [1, 2])
    def test_equals_that_of_the_base_steps(self, count, strategy_of):
        """On a line, t steps at gain r average like r t steps at the base."""
        rate, momentum, steps, scale = 0.01, 0.97, 25, 4
        base = keras.Variable([1.0])
        plain = SGD(rate, use_ema=True, ema_momentum=momentum)
        for _ in range(scale * steps):
            plain.apply([tf.ones(1)], [base])
        strategy = strategy_of(count)
        with strategy.scope():
            weight = keras.Variable([1.0])
            optimizer = AdaScale(
                SGD(rate, use_ema=True, ema_momentum=momentum), scale=scale
            )
            optimizer.build([weight])
        optimizer.microbatches = scale // count
        for _ in range(steps):
            strategy.run(
                lambda: optimizer.apply(
                    # As above: the gain is 4.
                    [tf.ones(1) / count],
                    [weight],
                    sample_sqnorm=13.0 * (scale / count) / count**2,
                )
            )
        assert float(optimizer.gain) == scale
        np.testing.assert_allclose(weight.value.numpy(), base, atol=1e-5)
        (average,), (expected,) = (
            stepping._model_variables_moving_average
            for stepping in (optimizer.inner_optimizer, plain)
        )
        np.testing.assert_allclose(average.value.numpy(), expected, rtol=1e-5)
        # The closed form: base step j of n = r t is at 1 - j rate, and an
        # average that starts there lags by c (1 - rho^(n-1)), c = rho/(1-rho).
        n, c = scale * steps, momentum / (1 - momentum)
        lag = c * (1 - momentum ** (n - 1))
        closed = 1 - rate * (n - lag)
        np.testing.assert_allclose(average.value.numpy(), [closed], rtol=1e-5)

    @pytest.mark.parametrize("count", [1, 2])
    def test_overwrites_the_weights(self, count, strategy_of):
        def make():
            return AdaScale(
                SGD(
                    0.5,
                    use_ema=True,
                    ema_momentum=0.5,
                    ema_overwrite_frequency=2,
                ),
                scale=1,
            )

        run = Run(strategy_of(count), make, [np.ones(1, "float32")])
        if count == 1:
            assert run.optimizer.num_samples == 1
        # Weights 1, 0.5, 0; averages 0.5 and 0.25, which is copied.
        for _ in range(2):
            run.step([np.ones((count, 1))])
        assert run.weights() == [[[0.25]]] * count

    def test_ends_training_in_the_weights(self):
        weight = keras.Variable([1.0])
        optimizer = AdaScale(SGD(0.5, use_ema=True, ema_momentum=0.5))
        for _ in range(2):
            optimizer.apply([tf.ones(1)], [weight])
        optimizer.finalize_variable_values([weight])
        assert weight.numpy() == [0.25]

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_swap_ema_weights(self, dynamic):
        """Keras's callback finds the averages inside the wrapper."""
        inner = SGD(0.1, use_ema=True, ema_momentum=0.5)
        if dynamic:
            inner = keras.optimizers.LossScaleOptimizer(inner)
        inputs = keras.Input((1,))
        outputs = keras.layers.Dense(
            1, use_bias=False, kernel_initializer="zeros"
        )(inputs)
        model = keras.Model(inputs, outputs)
        model.compile(AdaScale(inner), "mse", auto_scale_loss=False)
        seen = []
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: seen.append(
                model.layers[-1].kernel.numpy().item()
            )
        )
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        x = np.ones((4, 1))
        model.fit(
            x, 2 * x, batch_size=2, epochs=1, callbacks=[swap, look], verbose=0
        )
        # Gradients 2 (w - 2): weights 0, 0.4, 0.72; averages 0.4 and 0.56.
        np.testing.assert_allclose(seen, [0.56], rtol=1e-6)


BAD = [np.inf, np.nan]


class TestStepThatIsNotFinite:
    @staticmethod
    def make(**kwargs):
        return AdaScale(
            SGD(
                schedules.ExponentialDecay(0.1, 3, 0.5),
                momentum=0.9,
                weight_decay=0.1,
                use_ema=True,
                ema_overwrite_frequency=2,
            ),
            **kwargs,
        )

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize(
        "count, kwargs",
        [
            (1, {}),
            (1, {"scale": 4, "estimator": "differenced"}),
            (2, {}),
            (2, {"estimator": "ratio"}),
            (2, {"scale": 8, "estimator": "differenced"}),
        ],
    )
    def test_is_skipped_by_all_replicas(self, bad, count, kwargs, strategy_of):
        clean, dirty = (
            Run(strategy_of(count), lambda: self.make(**kwargs), initial())
            for _ in range(2)
        )
        for number, gradients in enumerate(random_gradients(4, count)):
            if number in (0, 2):
                # On the last replica only, in one entry of the first weight.
                spoilt = copy.deepcopy(gradients)
                spoilt[0][-1, 1, 1] = bad
                before = dirty.state()
                skipped = int(dirty.optimizer.skipped_steps)
                dirty.step(spoilt)
                assert int(dirty.optimizer.skipped_steps) == skipped + 1
                names = ["first", "second"]
                names += [v.name for v in dirty.optimizer.variables]
                for old, new in zip(before, dirty.state()):
                    for name, x, y in zip(names, old, new):
                        assert name == "skipped_steps" or np.array_equal(
                            x, y
                        ), name
            clean.step(gradients)
            dirty.step(gradients)
        assert dirty.optimizer.iterations.value.numpy() == 4
        for x, y in zip(clean.weights(), dirty.weights()):
            for v, w in zip(x, y):
                assert np.array_equal(v, w)
        assert float(clean.optimizer.gain) == float(dirty.optimizer.gain)

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("mode", MODES)
    def test_among_micro_batches(self, bad, mode):
        optimizer = self.make()
        optimizer.microbatches = 2
        weight = keras.Variable([1.0, 2.0])
        optimizer.build([weight])

        @MODES[mode]
        def step(gradient, sample_sqnorm):
            optimizer.apply([gradient], [weight], sample_sqnorm=sample_sqnorm)

        step(tf.constant([1.0, 1.0]), tf.constant(8.0))
        before = [v.numpy() for v in (weight, *optimizer.variables)]
        # Samples that cancel to a finite mean have a norm that tells.
        for gradient, sqnorm in [
            ([bad, 1.0], abs(bad)),
            ([bad, 1.0], 1.0),
            ([1.0, 1.0], abs(bad)),
        ]:
            step(tf.constant(gradient), tf.constant(sqnorm))
        changed = [
            v.name
            for v, old in zip((weight, *optimizer.variables), before)
            if not np.array_equal(v.numpy(), old)
        ]
        assert changed == ["skipped_steps"]
        assert int(optimizer.skipped_steps) == 3

    def test_is_skipped_where_clipping_would_hide_it(self, strategy_of):
        def make():
            return AdaScale(SGD(0.1, clipvalue=1.0))

        run = Run(strategy_of(2), make, [np.ones(2, "float32")])
        run.step([[[1, 1], [np.inf, 1]]])
        assert [w[0].tolist() for w in run.weights()] == [[1, 1], [1, 1]]


class TestLossScale:
    @staticmethod
    def make(**kwargs):
        return AdaScale(
            LossScaleOptimizer(
                SGD(0.1, momentum=0.9, global_clipnorm=4.0),
                initial_scale=2.0**10,
                **kwargs,
            )
        )

    @pytest.mark.parametrize("count", [1, 2])
    def test_changes_nothing_but_the_loss(self, count, strategy_of):
        strategy = strategy_of(count)

        def plain():
            return AdaScale(SGD(0.1, momentum=0.9, global_clipnorm=4.0))

        plain = Run(strategy, plain, initial())
        scaled = Run(
            strategy, lambda: self.make(dynamic_growth_steps=2), initial()
        )
        for gradients in random_gradients(5, count):
            plain.step(gradients)
            scaled.step(gradients)
        # Powers of two: to the bit.
        for x, y in zip(plain.weights(), scaled.weights()):
            for v, w in zip(x, y):
                assert np.array_equal(v, w)
        for name in (
            "gain",
            "gradient_variance",
            "gradient_sqnorm",
            "scale_invariant_step",
        ):
            assert float(getattr(plain.optimizer, name)) == float(
                getattr(scaled.optimizer, name)
            )
        # Doubled after steps 2 and 4.
        assert float(scaled.value("dynamic_scale")) == 2.0**12

    def test_changes_nothing_for_differenced_gradients(self):
        optimizers = [
            AdaScale(inner, scale=4, estimator="differenced")
            for inner in (
                SGD(0.1),
                SGD(0.1, loss_scale_factor=2.0**6),
                LossScaleOptimizer(SGD(0.1), dynamic_growth_steps=2),
            )
        ]
        runs = [
            Run(tf.distribute.get_strategy(), lambda o=o: o, initial())
            for o in optimizers
        ]
        for gradients in random_gradients(5, 1):
            for run in runs:
                run.step(gradients)
        plain, *others = runs
        assert float(plain.optimizer.gain) > 1
        for run in others:
            assert float(run.optimizer.gain) == float(plain.optimizer.gain)
            for v, w in zip(plain.weights()[0], run.weights()[0]):
                assert np.array_equal(v, w)

    def test_loss_scale_factor_of_two_replicas(self, strategy_of):
        plain, scaled = (
            Run(
                strategy_of(2),
                lambda f=factor: AdaScale(SGD(0.1, loss_scale_factor=f)),
                initial(),
            )
            for factor in (None, 2.0**8)
        )
        for gradients in random_gradients(3, 2):
            plain.step(gradients)
            scaled.step(gradients)
        assert float(plain.optimizer.gain) == float(scaled.optimizer.gain)
        for v, w in zip(plain.weights()[0], scaled.weights()[0]):
            assert np.array_equal(v, w)

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("replica", [0, 1])
    def test_halves_where_any_replica_overflows(
        self, replica, bad, strategy_of
    ):
        run = Run(
            strategy_of(2), lambda: self.make(dynamic_growth_steps=3), initial()
        )
        good = next(random_gradients(1, 2))
        spoilt = copy.deepcopy(good)
        spoilt[1][replica, 0] = bad
        scales = []
        # Three good steps double; an overflow halves and counts from 0 again.
        for gradients in [good] * 2 + [spoilt] + [good] * 3 + [spoilt] * 2:
            run.step(gradients)
            scales.append(float(run.value("dynamic_scale")) / 2**10)
        assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 0.5, 0.25]
        assert int(run.optimizer.skipped_steps) == 3
        assert run.optimizer.iterations.value.numpy() == 5
        assert np.all(np.isfinite(run.weights()[0][0]))
        for x, y in zip(*run.state()):
            assert np.array_equal(x, y)

    def test_is_that_of_keras_on_one_replica(self):
        def inner():
            return LossScaleOptimizer(
                SGD(0.1, momentum=0.9), dynamic_growth_steps=3
            )

        plain, wrapped = inner(), AdaScale(inner())
        variables = [weights(initial()) for _ in range(2)]
        for number, gradients in enumerate(random_gradients(10, 1)):
            if number == 4:
                gradients[0][0, 0, 0] = np.inf
            for optimizer, mine in zip((plain, wrapped), variables):
                local = [tf.constant(g[0]) for g in gradients]
                optimizer.apply([optimizer.scale_loss(g) for g in local], mine)
        for x, y in zip(*variables):
            assert np.array_equal(x.numpy(), y.numpy())
        assert_same(named(plain), named(wrapped.inner_optimizer))

    def test_added_later(self):
        optimizer = AdaScale(SGD(0.5))
        optimizer.add_loss_scale()
        optimizer.add_loss_scale()
        inner = optimizer.inner_optimizer
        assert isinstance(inner, LossScaleOptimizer)
        assert isinstance(inner.inner_optimizer, SGD)
        weight = keras.Variable([1.0])
        optimizer.apply([optimizer.scale_loss(tf.ones(1))], [weight])
        assert weight.numpy() == [0.5]

    def test_added_to_an_optimizer_that_is_built(self):
        optimizer = AdaScale(SGD(0.5))
        weight = keras.Variable([1.0])
        optimizer.build([weight])
        optimizer.add_loss_scale()
        optimizer.apply([optimizer.scale_loss(tf.ones(1))], [weight])
        assert weight.numpy() == [0.5]


class TestIndexedSlices:
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize(
        "make",
        [
            lambda: AdaScale(SGD(0.1, momentum=0.9, weight_decay=0.1)),
            lambda: AdaScale(LossScaleOptimizer(SGD(0.1), initial_scale=4.0)),
            lambda: AdaScale(SGD(0.1), scale=8, estimator="differenced"),
        ],
        ids=["momentum", "loss_scale", "differenced"],
    )
    def test_equal_dense(self, make, count, strategy_of):
        dense, sparse = (
            Run(strategy_of(count), make, initial(), sparse=sparse)
            for sparse in (False, True)
        )
        for gradients in random_gradients(3, count):
            dense.step(gradients)
            sparse.step(gradients)
        # Sums of the two parts in another order.
        for x, y in zip(dense.state(), sparse.state()):
            for v, w in zip(x, y):
                np.testing.assert_allclose(v, w, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("count", [1, 2])
    def test_of_an_embedding_with_repeated_ids(self, count, strategy_of):
        """Against a dense product with the ids one-hot."""
        strategy = strategy_of(count)
        ids = tf.constant([[0, 2, 2], [1, 2, 0]])
        states = []
        for lookup in (
            lambda table, ids: tf.gather(table, ids),
            lambda table, ids: tf.one_hot(ids, 4) @ table,
        ):
            with strategy.scope():
                table = keras.Variable(
                    np.arange(8, dtype="float32").reshape(4, 2)
                )
                optimizer = AdaScale(SGD(0.1, momentum=0.5))
                optimizer.build([table])

            def step(lookup=lookup, table=table, optimizer=optimizer):
                context = tf.distribute.get_replica_context()
                local = ids[context.replica_id_in_sync_group]
                with tf.GradientTape() as tape:
                    rows = lookup(table.value, local)
                    loss = tf.reduce_sum(rows**2) / count
                optimizer.apply(tape.gradient(loss, [table.value]), [table])

            for _ in range(3):
                strategy.run(step)
            states.append(
                [v.value.numpy() for v in (table, *optimizer.variables)]
            )
        for x, y in zip(*states):
            np.testing.assert_allclose(x, y, rtol=1e-6)


class TestLearningRate:
    def test_of_a_number_is_the_base_rate(self):
        optimizer = AdaScale(SGD(0.125), scale=2)
        optimizer.microbatches = 2
        weight = keras.Variable([0.0])
        # Opposite samples: gain 2.
        optimizer.apply([tf.zeros(1)], [weight], sample_sqnorm=2.0)
        assert float(optimizer.gain) == 2.0
        assert float(optimizer.learning_rate.numpy()) == 0.125
        assert float(optimizer.effective_learning_rate) == 0.25
        assert float(optimizer.inner_optimizer.learning_rate) == 0.25
        optimizer.learning_rate = 0.5
        assert float(optimizer.learning_rate.numpy()) == 0.5
        assert float(optimizer.effective_learning_rate) == 1.0
        # The mean 1 of samples 0 and 2 keeps the gain between 1 and 2.
        optimizer.apply([tf.ones(1)], [weight], sample_sqnorm=4.0)
        np.testing.assert_allclose(
            weight.numpy(), [-0.5 * float(optimizer.gain)], rtol=1e-6
        )

    @pytest.mark.parametrize(
        "around", [lambda o: o, LossScaleOptimizer], ids=["plain", "loss_scale"]
    )
    def test_of_a_schedule_is_the_effective_rate(self, around):
        rate = schedules.PiecewiseConstantDecay([1], [0.5, 0.25])
        optimizer = AdaScale(around(SGD(rate)), scale=2)
        optimizer.microbatches = 2
        weight = keras.Variable([0.0])
        assert float(optimizer.learning_rate) == 0.5
        # tau = 2 now: 0.25 * 2.
        sqnorm = float(optimizer.scale_loss(tf.constant(1.0))) ** 2 * 2
        optimizer.apply([tf.zeros(1)], [weight], sample_sqnorm=sqnorm)
        assert float(optimizer.learning_rate) == 0.5
        assert float(optimizer.inner_optimizer.learning_rate) == 0.5
        assert float(optimizer.effective_learning_rate) == 0.5
        with pytest.raises(TypeError, match="not settable"):
            optimizer.learning_rate = 0.1
        assert float(optimizer.learning_rate) == 0.5

    def test_may_become_a_schedule(self):
        optimizer = AdaScale(SGD(0.5))
        optimizer.learning_rate = schedules.ExponentialDecay(0.25, 10, 0.5)
        weight = keras.Variable([0.0])
        optimizer.apply([tf.ones(1)], [weight])
        assert weight.numpy() == [-0.25]

    def test_may_be_a_callable(self):
        rates = [0.5]
        optimizer = AdaScale(SGD(lambda: rates[-1]))
        weight = keras.Variable([0.0])
        for rate in (0.5, 0.25):
            rates.append(rate)
            optimizer.apply([tf.ones(1)], [weight])
        assert weight.numpy() == [-0.75]

    @pytest.mark.parametrize("count", [1, 2])
    def test_set_between_steps_reaches_a_traced_step(self, count, strategy_of):
        def make():
            return AdaScale(SGD(1.0), scale=1)

        run = Run(strategy_of(count), make, [np.zeros(1, "float32")])
        for rate in (1.0, 0.5, 0.25):
            run.optimizer.learning_rate = rate
            run.step([np.ones((count, 1))])
        assert run.weights() == [[[-1.75]]] * count

    @staticmethod
    def fit(callback, epochs):
        """Fits at a gain above 1; returns the base rate after each epoch."""
        inputs = keras.Input((4,))
        model = tf_adascale.Model(inputs, keras.layers.Dense(1)(inputs))
        model.compile(AdaScale(SGD(0.5)), "mse", microbatches=4)
        random = np.random.default_rng(0)
        x, y = random.normal(size=(32, 4)), random.normal(size=(32, 1))
        rates, effective, gains = [], [], []

        def note(epoch, logs):
            optimizer = model.optimizer
            rates.append(float(optimizer.learning_rate.numpy()))
            effective.append(float(optimizer.effective_learning_rate))
            gains.append(float(optimizer.gain))

        note = keras.callbacks.LambdaCallback(on_epoch_end=note)
        model.fit(
            *(x, y),
            batch_size=16,
            epochs=epochs,
            verbose=0,
            callbacks=[callback, note],
        )
        assert min(gains) > 1.1
        np.testing.assert_allclose(
            effective, np.multiply(rates, gains), rtol=1e-6
        )
        return rates

    def test_set_by_learning_rate_scheduler(self):
        absolute = keras.callbacks.LearningRateScheduler(
            lambda epoch: [0.5, 0.125, 0.25][epoch]
        )
        assert self.fit(absolute, 3) == [0.5, 0.125, 0.25]
        relative = keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: rate * 0.5
        )
        assert self.fit(relative, 3) == [0.25, 0.125, 0.0625]

    def test_set_by_reduce_on_plateau(self):
        # An epoch that is the best by 100 there is not: reduced from the second
        # epoch on.
        callback = keras.callbacks.ReduceLROnPlateau(
            "loss", factor=0.5, patience=1, min_delta=100.0, min_lr=0.0625
        )
        rates = self.fit(callback, 6)
        assert rates == [0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0625]


class TestOneReduction:
    @staticmethod
    def counted(monkeypatch, strategy, make):
        """What one replica asks of the others in a step, while it is traced."""
        asked = {"all_reduce": [], "merge_call": [], "all_gather": []}
        context = tf.distribute.ReplicaContext
        for name, calls in asked.items():
            stock = getattr(context, name)

            def call(self, *args, _stock=stock, _calls=calls, **kwargs):
                _calls.append(args)
                return _stock(self, *args, **kwargs)

            monkeypatch.setattr(context, name, call)
        run = Run(strategy, make, initial())
        run.step(next(random_gradients(1, 2)))
        monkeypatch.undo()
        return asked

    @pytest.mark.parametrize("estimator", ["moments", "ratio", "differenced"])
    @pytest.mark.parametrize("loss_scale", [False, True])
    def test_carries_one_more_scalar(
        self, estimator, loss_scale, strategy_of, monkeypatch
    ):
        strategy = strategy_of(2)

        def inner():
            return SGD(0.1, momentum=0.9, global_clipnorm=1.0, use_ema=True)

        def make():
            around = LossScaleOptimizer if loss_scale else lambda o: o
            return AdaScale(around(inner()), estimator=estimator)

        asked = self.counted(monkeypatch, strategy, make)
        # One reduction by each of two replicas, of two gradients and a scalar.
        assert len(asked["all_reduce"]) == 2
        assert not asked["all_gather"]
        for operation, values in asked["all_reduce"]:
            assert operation == tf.distribute.ReduceOp.SUM
            shapes = sorted(tuple(value.shape) for value in values)
            scalar = [] if estimator == "differenced" else [()]
            assert shapes == sorted([*SHAPES, *scalar])
            assert all(value.dtype == tf.float32 for value in values)
        # Beside it, one hand-off: never more than plain SGD.
        plain = self.counted(monkeypatch, strategy, inner)
        assert len(asked["merge_call"]) <= len(plain["merge_call"])


class TestVariables:
    def test_are_its_own_then_the_inner_ones(self):
        inner = SGD(0.1, momentum=0.9)
        optimizer = AdaScale(inner)
        optimizer.build(weights(initial()))
        own = optimizer.variables[: -len(inner.variables)]
        assert [v.name for v in own if v.name != "iteration"] == [
            "skipped_steps",
            "gradient_variance",
            "gradient_sqnorm",
            "averaged_steps",
            "scale_invariant_step",
            "scale_invariant_fraction",
        ]
        assert optimizer.variables[-len(inner.variables) :] == inner.variables
        ids = [id(v) for v in optimizer.variables]
        assert len(set(ids)) == len(ids)
        # One counter for both, and the user's rate where it always was.
        assert "learning_rate" in [v.name for v in inner.variables]
        optimizer.apply([tf.ones(s) for s in SHAPES])
        assert int(optimizer.iterations) == int(inner.iterations) == 1

    @pytest.mark.parametrize("estimator", ["moments", "differenced"])
    def test_are_made_once(self, estimator):
        optimizer = AdaScale(
            SGD(0.1, momentum=0.9, use_ema=True), estimator=estimator
        )
        variables = weights(initial())
        optimizer.build(variables)
        before = [id(v) for v in optimizer.variables]
        optimizer.build(variables)
        assert [id(v) for v in optimizer.variables] == before

    def test_are_made_by_the_first_step_in_a_function(self):
        optimizer = AdaScale(SGD(0.5, momentum=0.5))
        weight = keras.Variable([0.0])

        @tf.function
        def step(gradient):
            optimizer.apply([gradient], [weight])

        # Velocities -0.5, -0.75.
        for _ in range(2):
            step(tf.ones(1))
        assert weight.numpy() == [-1.25]

    def test_apply_gradients(self):
        optimizer = AdaScale(SGD(0.5))
        weight = keras.Variable([0.0])
        iterations = optimizer.apply_gradients([(tf.ones(1), weight)])
        assert int(iterations) == 1
        assert weight.numpy() == [-0.5]

    def test_apply_without_variables_once_built(self):
        optimizer = AdaScale(SGD(0.5))
        weight = keras.Variable([0.0])
        optimizer.build([weight])
        optimizer.apply([tf.ones(1)])
        assert weight.numpy() == [-0.5]

    def test_gradients_of_unknown_shape(self):
        optimizer = AdaScale(SGD(0.5))
        weight = keras.Variable([0.0, 0.0])
        optimizer.build([weight])

        @tf.function(input_signature=[tf.TensorSpec(None)])
        def step(gradient):
            optimizer.apply([gradient], [weight])

        step(tf.ones(2))
        assert weight.numpy().tolist() == [-0.5, -0.5]

    def test_slices_of_unknown_shape(self):
        optimizer = AdaScale(SGD(0.5))
        weight = keras.Variable([[0.0], [0.0]])
        optimizer.apply([tf.IndexedSlices(tf.ones((2, 1)), [1, 1])], [weight])
        assert weight.numpy().tolist() == [[0.0], [-1.0]]


class TestOwnVariables:
    """What is saved is found again by its name."""

    @staticmethod
    def trained(names=("first", "second"), **kwargs):
        optimizer = AdaScale(SGD(0.1), scale=2, **kwargs)
        variables = [
            keras.Variable(x, name=name) for x, name in zip(initial(), names)
        ]
        optimizer.build(variables)
        optimizer.microbatches = 2
        return optimizer, variables

    @pytest.mark.parametrize("estimator", ["moments", "differenced"])
    def test_round_trip(self, estimator):
        first, variables = self.trained(estimator=estimator)
        for [kernel], [bias] in random_gradients(3, 1):
            gradients = [tf.constant(kernel), tf.constant(bias)]
            first.apply(gradients, variables, sample_sqnorm=1000.0)
        store = {}
        first.save_own_variables(store)
        second, _ = self.trained(estimator=estimator)
        second.load_own_variables(store)
        for x, y in zip(first._variables, second._variables):
            assert np.array_equal(x.numpy(), y.numpy())
        assert float(first.gain) == float(second.gain)

    def test_round_trip_of_weights_with_one_name(self):
        names = ("weight", "weight")
        first, variables = self.trained(names, estimator="differenced")
        gradients = [tf.fill(SHAPES[0], 1.0), tf.fill(SHAPES[1], 2.0)]
        first.apply(gradients, variables)
        store = {}
        first.save_own_variables(store)
        second, _ = self.trained(names, estimator="differenced")
        second.load_own_variables(store)
        for x, y in zip(first._variables, second._variables):
            assert np.array_equal(x.numpy(), y.numpy())

    @pytest.mark.parametrize("other", ["estimator", "model"])
    def test_refuses_those_of_another(self, other):
        first, _ = self.trained(estimator="differenced")
        store = {}
        first.save_own_variables(store)
        if other == "model":
            store[str(len(store))] = np.zeros([5])
            second, _ = self.trained(estimator="differenced")
        else:
            second, _ = self.trained()
        before = named(second)
        with pytest.raises(
            ValueError,
            match=three_parts(
                "The state saved for adascale is that of another optimizer or "
                "model.",
                "variables of these shapes: {'0': [], ",
                "{'0': [], ",
            ),
        ):
            second.load_own_variables(store)
        assert_same(before, named(second))


def _decays_in_its_own_way():
    class Decay(SGD):
        def _apply_weight_decay(self, variables):
            pass

    return Decay(0.1)


REFUSED_INNER = {
    "name": (
        lambda: "sgd",
        "AdaScale cannot wrap this object.",
        "an instance of keras.optimizers.Optimizer.",
        "optimizer='sgd'",
    ),
    "class": (
        lambda: SGD,
        "AdaScale cannot wrap this object.",
        "an instance of keras.optimizers.Optimizer.",
        "optimizer=<class",
    ),
    "none": (
        lambda: None,
        "AdaScale cannot wrap this object.",
        "an instance of keras.optimizers.Optimizer.",
        "optimizer=None",
    ),
    "adascale": (
        lambda: AdaScale(SGD(0.1)),
        "AdaScale cannot wrap an optimizer that is a wrapper already.",
        "a plain Keras optimizer, or a LossScaleOptimizer around one.",
        "optimizer=<tf_adascale.adascale.AdaScale",
    ),
    "adascale_in_loss_scale": (
        lambda: LossScaleOptimizer(AdaScale(SGD(0.1))),
        "AdaScale cannot wrap an optimizer that is a wrapper already.",
        "a plain Keras optimizer, or a LossScaleOptimizer around one.",
        "optimizer=<keras",
    ),
    "gradient_accumulation_steps": (
        lambda: SGD(0.1, gradient_accumulation_steps=4),
        "The inner optimizer accumulates gradients itself",
        "`microbatches` in tf_adascale.Model.compile instead.",
        "gradient_accumulation_steps=4",
    ),
    "gradient_accumulation_steps_in_loss_scale": (
        lambda: LossScaleOptimizer(SGD(0.1, gradient_accumulation_steps=2)),
        "The inner optimizer accumulates gradients itself",
        "`microbatches` in tf_adascale.Model.compile instead.",
        "gradient_accumulation_steps=2",
    ),
    "own_weight_decay": (
        _decays_in_its_own_way,
        "The inner optimizer steps in a way of its own, which AdaScale cannot",
        "one that does not override _apply_weight_decay of keras.optimizers",
        "optimizer=<",
    ),
}


class TestRefusedWhenMade:
    @pytest.mark.parametrize("case", REFUSED_INNER)
    def test_optimizer(self, case):
        make, *message = REFUSED_INNER[case]
        inner = make()
        with pytest.raises(ValueError, match=three_parts(*message)):
            AdaScale(inner)
        if case.startswith("gradient"):
            # The refused call left its rate alone.
            assert isinstance(inner.learning_rate, keras.Variable)

    def test_optimizer_that_is_wrapped_already(self):
        """Its rate would have the gain twice."""
        inner = SGD(0.1)
        AdaScale(inner)
        with pytest.raises(ValueError, match=r"Expected .* Received: "):
            AdaScale(inner)

    @pytest.mark.parametrize(
        "name, value",
        [
            ("learning_rate", 0.1),
            ("weight_decay", 0.1),
            ("clipnorm", 1.0),
            ("clipvalue", 1.0),
            ("global_clipnorm", 1.0),
            ("use_ema", True),
            ("ema_momentum", 0.9),
            ("ema_overwrite_frequency", 2),
            ("loss_scale_factor", 2.0),
            ("gradient_accumulation_steps", 2),
        ],
    )
    def test_argument_of_the_inner_optimizer(self, name, value):
        inner = SGD(0.1)
        message = three_parts(
            f"AdaScale does not take the arguments ['{name}'].",
            "settings of the optimizer on the inner one, as in "
            "AdaScale(keras.optimizers.SGD(weight_decay=1e-4)).",
            f"{{'{name}': {value!r}}}",
        )
        with pytest.raises(ValueError, match=message):
            AdaScale(inner, **{name: value})
        assert isinstance(inner.learning_rate, keras.Variable)

    def test_argument_of_no_optimizer(self):
        message = three_parts(
            "AdaScale does not take the arguments ['scales'].",
            "settings of the optimizer on the inner one",
            "{'scales': 2}",
        )
        with pytest.raises(ValueError, match=message):
            AdaScale(SGD(0.1), scales=2)


class TestRefusedSteps:
    @staticmethod
    def built():
        optimizer = AdaScale(SGD(0.5, momentum=0.9))
        variables = weights(initial())
        optimizer.build(variables)
        optimizer.apply([tf.ones(shape) for shape in SHAPES], variables)
        return optimizer, variables

    @pytest.mark.parametrize(
        "grads, message",
        [
            (
                lambda: [tf.ones(SHAPES[0])],
                (
                    "The gradients do not match the variables.",
                    "a gradient of its shape, or None, for each of the "
                    "variables [(3, 2), (2,)].",
                    "gradients of shapes [(3, 2)]",
                ),
            ),
            (
                lambda: [tf.ones(SHAPES[1]), tf.ones(SHAPES[0])],
                (
                    "The gradients do not match the variables.",
                    "a gradient of its shape, or None, for each of the "
                    "variables [(3, 2), (2,)].",
                    "gradients of shapes [(2,), (3, 2)]",
                ),
            ),
            (
                lambda: [None, None],
                (
                    "There is no gradient to apply.",
                    "a gradient for at least one variable",
                    "grads=[None, None]",
                ),
            ),
        ],
        ids=["number", "shapes", "none"],
    )
    @pytest.mark.parametrize("given", [False, True])
    def test_gradients_that_do_not_match(self, grads, message, given):
        optimizer, variables = self.built()
        before = [v.numpy() for v in variables + optimizer.variables]
        with pytest.raises(ValueError, match=three_parts(*message)):
            optimizer.apply(grads(), variables if given else None)
        for v, old in zip(variables + optimizer.variables, before):
            assert np.array_equal(v.numpy(), old)

    def test_gradients_without_variables(self):
        optimizer = AdaScale(SGD(0.5))
        message = three_parts(
            "Gradients came without variables.",
            "`trainable_variables` in the first call, or a call of `build` "
            "before it.",
            "1 gradients",
        )
        with pytest.raises(ValueError, match=message):
            optimizer.apply([tf.ones(2)])
        assert not optimizer.built

    def test_variables_that_it_was_not_built_on(self):
        optimizer, _ = self.built()
        before = named(optimizer)
        other = keras.Variable([1.0])
        with pytest.raises(ValueError, match="Unknown variable"):
            optimizer.apply([tf.ones(1)], [other])
        assert_same(before, named(optimizer))
        assert other.numpy() == [1.0]

    @pytest.mark.parametrize(
        "grads, kwargs",
        [([None], {}), ([[1.0]], {"scale": 4})],
        ids=["no_gradient", "one_sample"],
    )
    def test_first_step_leaves_the_optimizer_unbuilt(self, grads, kwargs):
        optimizer = AdaScale(SGD(0.5, momentum=0.9), **kwargs)
        grads = [g if g is None else tf.constant(g) for g in grads]
        before = named(optimizer)
        with pytest.raises(ValueError, match=r"Expected .* Received: "):
            optimizer.apply(grads, [keras.Variable([1.0])])
        assert not optimizer.built
        assert not optimizer.inner_optimizer.built
        assert_same(before, named(optimizer))

    @pytest.mark.parametrize("graph", [False, True])
    def test_in_cross_replica_context(self, graph, strategy_of):
        strategy = strategy_of(2)
        with strategy.scope():
            weight = keras.Variable([1.0])
            optimizer = AdaScale(SGD(0.5))
            optimizer.build([weight])

        def step():
            with strategy.scope():
                optimizer.apply([tf.ones(1)], [weight])

        message = three_parts(
            "A step was asked for in cross-replica context.",
            "adascale.apply to be called inside strategy.run",
            "strategy=<tensorflow",
        )
        with pytest.raises(ValueError, match=message):
            (tf.function(step) if graph else step)()
        assert weight.value.numpy() == [1.0]
        assert optimizer.iterations.value.numpy() == 0

    @pytest.mark.parametrize("outside", ["both", "inner", "wrapper"])
    def test_of_an_optimizer_made_outside_the_scope(self, outside, strategy_of):
        strategy = strategy_of(2)
        inner = SGD(0.5)
        optimizer = AdaScale(inner) if outside == "both" else None
        with strategy.scope():
            weight = keras.Variable([1.0])
            if outside == "inner":
                optimizer = AdaScale(inner)
            if outside == "wrapper":
                inner = SGD(0.5)
        if outside == "wrapper":
            optimizer = AdaScale(inner)
        message = three_parts(
            "adascale or its inner optimizer was made outside the scope of the "
            "strategy that it is used in.",
            "both to be made in `with strategy.scope():`.",
            "optimizers made under {<tensorflow",
        )
        with pytest.raises(ValueError, match=message):
            strategy.run(lambda: optimizer.apply([tf.ones(1)], [weight]))
        assert not optimizer.built
        assert weight.value.numpy() == [1.0]

    def test_of_an_optimizer_made_under_another_strategy(self, strategy_of):
        """Made in a scope, used on the default strategy."""
        with strategy_of(2).scope():
            optimizer = AdaScale(SGD(0.5))
        with pytest.raises(ValueError, match="used under <tensorflow"):
            optimizer.apply([tf.ones(1)], [keras.Variable([1.0])])


class TestConfig:
    @pytest.mark.parametrize("name", sorted(set(INNER) - {"callable"}))
    def test_of_every_inner_optimizer(self, name):
        config = AdaScale(INNER[name]()).get_config()
        keras.backend.clear_session(free_memory=False)
        # As if it had never been wrapped.
        plain = keras.saving.serialize_keras_object(INNER[name]())
        assert config["optimizer"] == plain
        json.dumps(config)
        # Keras puts schedules into the dictionary that it is given.
        copied = AdaScale.from_config(copy.deepcopy(config))
        assert copied.get_config() == config
        assert type(copied.inner_optimizer) is type(INNER[name]())

    def test_of_a_loss_scale(self):
        rate = schedules.ExponentialDecay(0.5, 10, 0.25)
        optimizer = AdaScale(
            LossScaleOptimizer(
                SGD(rate, momentum=0.9),
                initial_scale=64.0,
                dynamic_growth_steps=7,
            )
        )
        config = json.loads(json.dumps(optimizer.get_config()))
        copied = AdaScale.from_config(config)
        assert copied.get_config() == optimizer.get_config()
        inner = copied.inner_optimizer
        assert isinstance(inner, LossScaleOptimizer)
        assert (inner.initial_scale, inner.dynamic_growth_steps) == (64.0, 7)
        assert inner.inner_optimizer.momentum == 0.9
        # 0.5 * 0.25^(0 / 10).
        assert float(copied.learning_rate) == 0.5

    def test_has_the_rate_as_it_was_set(self):
        optimizer = AdaScale(SGD(0.5))
        optimizer.learning_rate = 0.125
        copied = AdaScale.from_config(optimizer.get_config())
        assert float(copied.learning_rate.numpy()) == 0.125

    def test_through_keras(self):
        optimizer = AdaScale(
            SGD(schedules.CosineDecay(0.5, 10), momentum=0.9), name="mine"
        )
        config = keras.optimizers.serialize(optimizer)
        copied = keras.optimizers.deserialize(json.loads(json.dumps(config)))
        assert isinstance(copied, AdaScale)
        assert copied.name == "mine"
        assert copied.get_config() == optimizer.get_config()

    def test_of_an_inner_optimizer_that_keras_does_not_know(self):
        class Custom(SGD):
            pass

        optimizer = AdaScale(Custom(0.25))
        copied = AdaScale.from_config(
            optimizer.get_config(), custom_objects={"Custom": Custom}
        )
        assert isinstance(copied.inner_optimizer, Custom)
