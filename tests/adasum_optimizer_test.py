"""Adasum as an optimizer, against stock optimizers and a tree in NumPy."""

import collections
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tf_adascale import Adasum, adasum, replicas

Adam = keras.optimizers.Adam
SGD = keras.optimizers.SGD
LossScaleOptimizer = keras.optimizers.LossScaleOptimizer

# One variable of many entries and others of few: they are combined in two ways.
SHAPES = ((8, 5), (3, 2), ())
COMBINE = ("updates", "gradients")
COUNTS = (1, 2, 3, 5, 8)

# Epsilons so large that the first steps differ in more than signs: vectors of
# few signs are often opposite, and rounding would decide which way they add up.
INNER = {
    "momentum": lambda: SGD(0.05, momentum=0.9),
    "adam": lambda: Adam(0.01, epsilon=0.1),
    "lamb": lambda: keras.optimizers.Lamb(0.01, epsilon=0.1),
}
SETTINGS = {
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, epsilon=0.1, weight_decay=0.1, clipnorm=0.5
    ),
    "global_clipnorm": lambda: SGD(0.05, momentum=0.9, global_clipnorm=1.0),
    "nadam": lambda: keras.optimizers.Nadam(0.01, epsilon=0.1),
    "nesterov": lambda: SGD(0.05, momentum=0.9, nesterov=True),
}


def initial():
    random = np.random.default_rng(7)
    return [random.normal(size=shape).astype("float32") for shape in SHAPES]


def random_gradients(count, steps=3, seed=0, shapes=SHAPES):
    """Gradients of steps: for each variable an array, replicas first."""
    random = np.random.default_rng(seed)
    return [
        [random.normal(size=(count, *s)).astype("float32") for s in shapes]
        for _ in range(steps)
    ]


def weights(values, dtype="float32"):
    return [
        keras.Variable(value, dtype=dtype, name=f"weight_{number}")
        for number, value in enumerate(values)
    ]


def tree(inputs):
    """Adasum in float64, by what its definition says of vectors."""
    nodes = [np.asarray(value, "float64") for value in inputs]
    # Updates are differences of rounded weights: those of opposite signs and
    # one length, which Lamb makes of a scalar, leave a rest that counts as 0.
    nodes = [(value, np.linalg.norm(value)) for value in nodes]
    while len(nodes) > 1:
        odd_one = nodes[len(nodes) // 2 * 2 :]
        pairs = zip(nodes[::2], nodes[1::2])
        nodes = [tree_pair(left, right) for left, right in pairs] + odd_one
    return nodes[0][0]


def tree_pair(left, right):
    """Returns a node, and how long it would be if nothing had cancelled."""
    product = np.sum(left[0] * right[0])
    factors = [
        1 - product / (2 * np.sum(value**2))
        if np.linalg.norm(value) > 2e-5 * bound
        else 1.0
        for value, bound in (left, right)
    ]
    values, bounds = zip(left, right)
    return (
        factors[0] * values[0] + factors[1] * values[1],
        np.abs(factors) @ bounds,
    )


def tree_of_groups(inputs, size=1):
    """The same of the means of groups."""
    starts = range(0, len(inputs), size)
    return tree([np.mean(inputs[i : i + size], 0) for i in starts])


class Oracle:
    """Stock optimizers side by side: one for each replica, or one."""

    def __init__(self, count, make, combine, group_size=1):
        self.group_size = group_size
        self.separate = combine == "updates"
        self.optimizers = [make() for _ in range(count if self.separate else 1)]
        self.variables = [weights(initial()) for _ in self.optimizers]
        self.weights = initial()
        for optimizer, variables in zip(self.optimizers, self.variables):
            optimizer.build(variables)

    def step(self, gradients):
        """Takes a step and returns the weights."""
        if not self.separate:
            gradients = [
                np.float32(tree_of_groups(g, self.group_size))[None]
                for g in gradients
            ]
        updates = []
        for i, optimizer in enumerate(self.optimizers):
            for variable, weight in zip(self.variables[i], self.weights):
                variable.assign(weight)
            optimizer.apply(
                [tf.constant(g[i]) for g in gradients], self.variables[i]
            )
            updates.append(
                [v.numpy() - w for v, w in zip(self.variables[i], self.weights)]
            )
        size = self.group_size if self.separate else 1
        self.weights = [
            np.float32(weight + tree_of_groups(update, size))
            for weight, update in zip(self.weights, zip(*updates))
        ]
        return self.weights


class Run:
    """Weights and their optimizer on the replicas of a strategy."""

    def __init__(self, strategy, make, values=None, dtype="float32"):
        self.strategy = strategy
        with strategy.scope():
            self.variables = weights(
                initial() if values is None else values, dtype
            )
            self.optimizer = make()
            self.optimizer.build(self.variables)
        self._step = tf.function(self._run)

    def step(self, gradients, prepare=lambda gradients: gradients):
        """Takes a step; `prepare` changes what a replica gives to `apply`."""
        dtypes = [v.dtype for v in self.variables]
        gradients = [tf.constant(g, d) for g, d in zip(gradients, dtypes)]
        self._step(gradients, prepare)
        return self

    def _run(self, gradients, prepare):
        def replica():
            context = tf.distribute.get_replica_context()
            index = context.replica_id_in_sync_group
            # As Keras has it: the loss is divided by the number of replicas.
            local = [g[index] / context.num_replicas_in_sync for g in gradients]
            local = [self.optimizer.scale_loss(g) for g in local]
            self.optimizer.apply(prepare(local), self.variables)

        self.strategy.run(replica)

    def of_replicas(self, variables):
        """Values of variables, a list for each replica."""
        return [
            [x.numpy() for x in parts]
            for parts in zip(
                *(
                    self.strategy.experimental_local_results(v.value)
                    for v in variables
                )
            )
        ]

    def weights(self):
        """The weights, which all replicas must have to the bit."""
        first, *others = self.of_replicas(self.variables)
        for other in others:
            for x, y in zip(first, other):
                assert x.tobytes() == y.tobytes()
        return first

    def slots(self):
        """The optimizer's variables, on each replica."""
        return self.of_replicas(self.optimizer.variables)

    def state(self):
        """By name, the bytes on every replica."""
        variables = self.variables + self.optimizer.variables
        values = zip(*self.of_replicas(variables))
        return {
            variable.path: [x.tobytes() for x in of_replicas]
            for variable, of_replicas in zip(variables, values)
        }


def assert_close(received, expected, atol=1e-6):
    assert len(received) == len(expected)
    for x, y in zip(received, expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def values_of(optimizer):
    return [variable.numpy() for variable in optimizer.variables]


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("name", [*INNER, *SETTINGS])
def test_one_sample_is_the_inner_optimizer_to_the_bit(name, combine):
    make = {**INNER, **SETTINGS}[name]
    plain, wrapped = make(), Adasum(make(), combine=combine)
    both = [weights(initial()), weights(initial())]

    @tf.function
    def step(*gradients):
        plain.apply(gradients, both[0])
        wrapped.apply(gradients, both[1])

    plain.build(both[0])
    wrapped.build(both[1])
    for gradients in random_gradients(1, steps=20):
        step(*(tf.constant(g[0]) for g in gradients))
    for x, y in zip(*both):
        assert np.array_equal(x.numpy(), y.numpy())
    inner = wrapped.inner_optimizer
    for x, y in zip(values_of(plain), values_of(inner), strict=True):
        assert np.array_equal(x, y)
    assert int(wrapped.iterations) == 20
    assert int(wrapped.skipped_steps) == 0


class TestSeparateOptimizers:
    # Tracing eight replicas takes seconds: one optimizer shows the gradients.
    @pytest.mark.parametrize("count", COUNTS[1:])
    @pytest.mark.parametrize(
        ("combine", "name"),
        [*[("updates", name) for name in INNER], ("gradients", "momentum")],
    )
    def test_and_the_tree(self, name, count, combine, strategy_of):
        self.check(strategy_of(count), INNER[name], combine)

    @pytest.mark.parametrize("name", ["adam", "lamb"])
    def test_and_the_tree_of_gradients(self, name, strategy_of):
        self.check(strategy_of(3), INNER[name], "gradients")

    @pytest.mark.parametrize("combine", COMBINE)
    @pytest.mark.parametrize("name", SETTINGS)
    def test_with_their_settings(self, name, combine, strategy_of):
        self.check(strategy_of(2), SETTINGS[name], combine)

    @pytest.mark.parametrize(
        ("combine", "count", "size"),
        [
            ("updates", 8, 2),
            ("updates", 8, 4),
            ("gradients", 8, 2),
            ("gradients", 6, 2),
        ],
    )
    def test_and_the_tree_of_groups(self, count, size, combine, strategy_of):
        self.check(strategy_of(count), INNER["momentum"], combine, size)

    def check(self, strategy, make, combine, group_size=1):
        count = strategy.num_replicas_in_sync
        run = Run(
            strategy,
            lambda: Adasum(make(), combine=combine, group_size=group_size),
        )
        oracle = Oracle(count, make, combine, group_size)
        for gradients in random_gradients(count):
            expected = oracle.step(gradients)
            assert_close(run.step(gradients).weights(), expected)
        # Each replica has its own slots, or all have those of the one step.
        inner = run.optimizer.inner_optimizer
        received = run.of_replicas(inner.variables)
        for i in range(count):
            stock = oracle.optimizers[i if oracle.separate else 0]
            assert_close(received[i], values_of(stock), atol=1e-5)
        if oracle.separate:
            assert not np.allclose(received[0][2], received[1][2])

    @pytest.mark.parametrize("combine", COMBINE)
    def test_average_of_weights(self, combine, strategy_of):
        """The average is of the weights that all replicas have."""

        def make():
            return SGD(0.05, use_ema=True, ema_momentum=0.75)

        run = Run(strategy_of(2), lambda: Adasum(make(), combine=combine))
        oracle = Oracle(2, lambda: SGD(0.05), combine)
        averages = None
        for gradients in random_gradients(2):
            run.step(gradients)
            new = oracle.step(gradients)
            averages = averages or new  # The first step starts them.
            averages = [0.75 * a + 0.25 * w for a, w in zip(averages, new)]
        stock = run.optimizer.inner_optimizer._model_variables_moving_average
        for received in run.of_replicas(stock):
            assert_close(received, averages)

    @pytest.mark.parametrize("combine", COMBINE)
    def test_constraint_on_what_was_combined(self, combine, strategy_of):
        strategy = strategy_of(2)
        with strategy.scope():
            weight = keras.Variable(np.zeros(2, "float32"))
            weight.constraint = keras.constraints.NonNeg()
            optimizer = Adasum(SGD(1.0), combine=combine)
        gradients = tf.constant([[1.0, -1.0], [1.0, 1.0]])

        @tf.function
        def step():
            index = replicas.index()
            optimizer.apply([tf.gather(gradients, index) / 2], [weight])

        strategy.run(step)
        # -(1, -1) and -(1, 1) are orthogonal: (-2, 0), of which (0, 0) is left.
        for value in strategy.experimental_local_results(weight.value):
            assert value.numpy().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("combine", COMBINE)
def test_one_group_is_the_plain_mean(combine, strategy_of):
    run = Run(
        strategy_of(4),
        lambda: Adasum(SGD(0.05), combine=combine, group_size=4),
    )
    plain, variables = SGD(0.05), weights(initial())
    for gradients in random_gradients(4):
        run.step(gradients)
        plain.apply([tf.constant(g.mean(0)) for g in gradients], variables)
        assert_close(run.weights(), [v.numpy() for v in variables])


@pytest.mark.parametrize("combine", COMBINE)
class TestObviousSteps:
    """With SGD(1) a step is minus the combined gradients, in both modes."""

    def step(self, strategy, combine, samples, width=40):
        samples = np.array(samples, "float32")
        samples = np.pad(samples, [(0, 0), (0, width - samples.shape[1])])
        run = Run(
            strategy,
            lambda: Adasum(SGD(1.0), combine=combine),
            [np.zeros(width, "float32"), np.zeros(2, "float32")],
        )
        run.step([samples, samples[:, :2]])
        large, small = run.weights()
        np.testing.assert_allclose(large[:2], small, rtol=0, atol=2e-6)
        assert not large[2:].any()
        return -small

    @pytest.mark.parametrize(
        ("samples", "expected"),
        [
            ([[4, 0], [0, 2]], [4, 2]),
            ([[1, 2], [1, 2]], [1, 2]),
            ([[1, 2], [3, 6]], [2, 4]),
            ([[1, 2], [-1, -2]], [0, 0]),
            # The odd one moves up: (1, 1) and (1, 1), not 3 orthogonal ones.
            ([[1, 0], [0, 1], [1, 1]], [1, 1]),
            # Neighbours first: (2, 0) + (0, 2) and (1, 1): their mean.
            ([[2, 0], [0, 2], [1, 0], [0, 1]], [1.5, 1.5]),
            ([[1, 2], [-1, -2], [0, 4]], [0, 4]),
            ([[0, 0], [3, 4]], [3, 4]),
        ],
        ids=str,
    )
    def test_of_a_row(self, samples, expected, combine, strategy_of):
        received = self.step(strategy_of(len(samples)), combine, samples)
        np.testing.assert_allclose(received, expected, rtol=0, atol=2e-6)


class TestLearningRate:
    @pytest.mark.parametrize("combine", COMBINE)
    def test_schedule_advances_by_iterations(self, combine, strategy_of):
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
            [0, 1], [1.0, 0.25, 0.125]
        )
        run = Run(
            strategy_of(2),
            lambda: Adasum(SGD(schedule), combine=combine),
            [np.zeros(3, "float32")],
        )
        seen = []
        for _ in range(4):
            before = run.weights()[0][0]
            seen.append(float(run.optimizer.learning_rate))
            # Equal gradients: their mean, 1.
            run.step([np.ones((2, 3), "float32")])
            step = before - run.weights()[0][0]
            np.testing.assert_allclose(step, seen[-1], rtol=1e-6)
        assert seen == [1.0, 0.25, 0.125, 0.125]

    @pytest.mark.parametrize("combine", COMBINE)
    def test_set_between_steps(self, combine, strategy_of):
        run = Run(
            strategy_of(2),
            lambda: Adasum(SGD(1.0), combine=combine),
            [np.zeros(3, "float32")],
        )
        ones = [np.ones((2, 3), "float32")]
        assert_close(run.step(ones).weights(), [[-1.0] * 3])
        run.optimizer.learning_rate = 0.5
        assert_close(run.step(ones).weights(), [[-1.5] * 3])
        assert float(run.optimizer.effective_learning_rate) == 0.5


@pytest.mark.parametrize("combine", COMBINE)
class TestGradients:
    def test_none_leaves_its_variable_and_slots_alone(
        self, combine, strategy_of
    ):
        run = Run(
            strategy_of(2), lambda: Adasum(INNER["adam"](), combine=combine)
        )
        before = run.state()
        [gradients] = random_gradients(2, steps=1)
        run.step(gradients, lambda local: [None, *local[1:]])
        after = run.state()
        kept = {path for path in before if before[path] == after[path]}
        # The weight and its two moments; besides, what no step changes.
        assert {path for path in kept if "weight_0" in path} == {
            path for path in before if "weight_0" in path
        }
        assert not {path for path in kept if "weight_1" in path}
        oracle = Oracle(2, INNER["adam"], combine).step(gradients)
        assert_close(run.weights()[1:], oracle[1:])

    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("shape", ["known", "missing"])
    def test_sparse_equal_dense(self, shape, count, combine, strategy_of):
        def sparse(local):
            return [
                tf.IndexedSlices(
                    tf.concat([0.25 * g, 0.75 * g], 0),
                    tf.concat([tf.range(g.shape[0])] * 2, 0),
                    tf.shape(g) if shape == "known" else None,
                )
                for g in local[:2]
            ] + local[2:]

        runs = [
            Run(
                strategy_of(count),
                # Keras's momentum needs the shape.
                lambda: Adasum(
                    SGD(0.05, momentum=0.9 if shape == "known" else 0.0),
                    combine=combine,
                ),
            )
            for _ in range(2)
        ]
        for gradients in random_gradients(count, steps=2):
            runs[0].step(gradients)
            runs[1].step(gradients, sparse)
        assert_close(runs[0].weights(), runs[1].weights())

    def test_of_unknown_shapes(self, combine, strategy_of):
        strategy = strategy_of(2)
        with strategy.scope():
            variables = weights(initial())
            optimizer = Adasum(SGD(1.0), combine=combine)
            optimizer.build(variables)

        @tf.function(input_signature=[tf.TensorSpec(None)] * 3)
        def step(*gradients):
            strategy.run(lambda: optimizer.apply(list(gradients), variables))

        # Equal ones, divided by 2: a step of 2.
        step(*(tf.ones(shape) for shape in SHAPES))
        for variable, value in zip(variables, initial()):
            parts = strategy.experimental_local_results(variable.value)
            assert_close([x.numpy() for x in parts], [value - 2] * 2)


@pytest.mark.parametrize("combine", COMBINE)
class TestNotFinite:
    @pytest.mark.parametrize(
        ("count", "replica", "variable", "bad"),
        [
            (1, 0, 0, np.nan),
            (3, 0, 1, np.inf),
            (3, 2, 0, -np.inf),
            (3, 2, 1, np.nan),
        ],
    )
    def test_is_skipped_on_all_replicas(
        self, count, replica, variable, bad, combine, strategy_of
    ):
        def make():
            return Adam(0.01, epsilon=0.1, use_ema=True)

        run = Run(strategy_of(count), lambda: Adasum(make(), combine=combine))
        good, spoilt, after = random_gradients(count)
        spoilt[variable][replica, 1, 1] = bad
        run.step(good)
        before = run.state()
        skipped = run.step(spoilt).state()
        changed = {path for path in before if before[path] != skipped[path]}
        assert changed == {"adasum/skipped_steps"}
        assert int(run.optimizer.skipped_steps) == 1
        # The next step is as if it had not been.
        oracle = Oracle(count, make, combine)
        oracle.step(good)
        assert_close(run.step(after).weights(), oracle.step(after))
        assert int(run.optimizer.skipped_steps) == 1

    def test_halves_the_loss_scale(self, combine, strategy_of):
        run = Run(
            strategy_of(2),
            lambda: Adasum(
                LossScaleOptimizer(SGD(0.05), initial_scale=2.0**10),
                combine=combine,
            ),
        )
        good, spoilt, _ = random_gradients(2)
        spoilt[0][1, 0, 0] = np.inf
        run.step(good)
        before = run.weights()
        run.step(spoilt)
        assert_close(run.weights(), before, atol=0)
        inner = run.optimizer.inner_optimizer
        assert run.of_replicas([inner.dynamic_scale]) == [[2.0**9]] * 2
        assert int(run.optimizer.skipped_steps) == 1
        assert int(tf.convert_to_tensor(run.optimizer.iterations)) == 1
        assert not np.array_equal(run.step(good).weights()[0], before[0])


@pytest.mark.parametrize("combine", COMBINE)
def test_loss_scale_changes_nothing_else(combine, strategy_of):
    """Clipping, which is not linear, sees unscaled gradients."""
    settings = {"momentum": 0.9, "clipnorm": 1.0}
    runs = [
        Run(
            strategy_of(2),
            lambda make=make: Adasum(make(), combine=combine),
        )
        for make in (
            lambda: SGD(0.05, **settings),
            lambda: LossScaleOptimizer(
                SGD(0.05, **settings), initial_scale=2.0**12
            ),
            lambda: SGD(0.05, **settings, loss_scale_factor=2.0**12),
        )
    ]
    for gradients in random_gradients(2, steps=2):
        for run in runs:
            run.step(gradients)
    for run in runs[1:]:
        # Powers of two: nothing is rounded otherwise.
        assert_close(run.weights(), runs[0].weights(), atol=0)


@pytest.mark.parametrize("combine", COMBINE)
class TestTypes:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_is_combined_in_float32(
        self, dtype, combine, strategy_of
    ):
        # Orthogonal ones whose squared norms, 100 * 64^2, float16 has not.
        gradients = np.zeros((2, 200), "float32")
        gradients[0, :100] = 64
        gradients[1, 100:] = 128
        run = Run(
            strategy_of(2),
            lambda: Adasum(SGD(1.0), combine=combine),
            [np.zeros(200, "float32")],
            dtype,
        )
        [weight] = run.step([gradients]).weights()
        assert weight.dtype == dtype
        assert np.array_equal(weight.astype("float32"), -gradients.sum(0))
        assert int(run.optimizer.skipped_steps) == 0

    @pytest.mark.parametrize("size", [2, 40])
    def test_float64_keeps_its_digits_beside_float32(
        self, size, combine, strategy_of
    ):
        strategy = strategy_of(2)
        with strategy.scope():
            narrow = keras.Variable(np.zeros(size), dtype="float32")
            wide = keras.Variable(np.zeros(size), dtype="float64")
            optimizer = Adasum(SGD(1.0), combine=combine)

        @tf.function
        def step():
            one = tf.one_hot(replicas.index(), size, dtype=tf.float64)
            optimizer.apply(
                [tf.cast(one, "float32") / 2, one * (1 + 1e-12) / 2],
                [narrow, wide],
            )

        strategy.run(step)
        for value in strategy.experimental_local_results(wide.value):
            np.testing.assert_allclose(
                value[:2], [-1 - 1e-12] * 2, rtol=0, atol=1e-15
            )
        for value in strategy.experimental_local_results(narrow.value):
            assert value[:2].numpy().tolist() == [-1.0, -1.0]

    @pytest.mark.parametrize("count", [1, 2])
    def test_float64_has_its_range(self, count, combine, strategy_of):
        """A gradient is not infinite for having no square in float32."""
        run = Run(
            strategy_of(count),
            lambda: Adasum(SGD(1.0), combine=combine),
            [np.zeros(3), np.zeros(50)],
            "float64",
        )
        gradients = [np.full((count, size), 1e100) for size in (3, 50)]
        for weight in run.step(gradients).weights():
            np.testing.assert_allclose(weight, -1e100, rtol=1e-12)


# Through models.


def model_of(
    model_class, optimizer, strategy=None, *, inputs=3, loss="mse", **arguments
):
    with (strategy or tf.distribute.get_strategy()).scope():
        keras.utils.set_random_seed(1)
        x = keras.Input((inputs,))
        hidden = keras.layers.Dense(16, activation="tanh")(x)
        model = model_class(x, keras.layers.Dense(2)(hidden))
        model.compile(optimizer(), loss, metrics=["mae"], **arguments)
    return model


def data(size):
    random = np.random.default_rng(3)
    x = random.normal(size=(size, 3)).astype("float32")
    return x, random.normal(size=(size, 2)).astype("float32")


def batches(x, y, size):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def fit(model, dataset, **arguments):
    return model.fit(
        dataset, **{"verbose": 0, "shuffle": False, **arguments}
    ).history


def stepped(weights, samples, *, rate=0.1, group_size=1):
    """Weights after one SGD step by the tree of each sample's gradient."""
    model = model_of(keras.Model, SGD)
    model.set_weights(weights)
    gradients = []
    for x, y in samples:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        gradients.append(
            [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]
        )
    return [
        weight - rate * tree_of_groups(g, group_size)
        for weight, g in zip(weights, zip(*gradients))
    ]


STEPS = 2


def check_fit(model, samples, *, group_size=1, **arguments):
    """Fits two steps of so many samples of two rows each; checks weights."""
    x, y = data(2 * samples * STEPS)
    expected = model.get_weights()
    fit(model, batches(x, y, 2 * samples), **arguments)
    parts = list(
        zip(np.split(x, samples * STEPS), np.split(y, samples * STEPS))
    )
    for step in range(STEPS):
        expected = stepped(
            expected,
            parts[samples * step : samples * (step + 1)],
            group_size=group_size,
        )
    assert_close(model.get_weights(), expected)
    assert int(tf.convert_to_tensor(model.optimizer.iterations)) == STEPS


class TestFit:
    @pytest.mark.parametrize("microbatches", [3, 4, 5, 6, 7])
    def test_micro_batches_are_inputs_of_the_tree(self, microbatches):
        check_fit(
            model_of(
                tf_adascale.Model,
                lambda: Adasum(SGD(0.1)),
                microbatches=microbatches,
            ),
            microbatches,
        )

    @pytest.mark.parametrize(
        ("combine", "arguments"),
        [
            ("updates", {}),
            ("gradients", {}),
            ("updates", {"jit_compile": True}),
            ("updates", {"steps_per_execution": 2}),
            ("gradients", {"run_eagerly": True}),
        ],
        ids=str,
    )
    def test_replicas_times_micro_batches(
        self, combine, arguments, strategy_of
    ):
        """With plain SGD an update is the gradient times the rate."""
        check_fit(
            model_of(
                tf_adascale.Model,
                lambda: Adasum(SGD(0.1), combine=combine),
                strategy_of(2),
                microbatches=2,
                **arguments,
            ),
            4,
        )

    @pytest.mark.parametrize("combine", COMBINE)
    @pytest.mark.parametrize(
        ("count", "microbatches", "group_size"),
        [(4, 2, 4), (2, 3, 3), (1, 4, 4)],
    )
    def test_groups_of_micro_batches(
        self, count, microbatches, group_size, combine, strategy_of
    ):
        check_fit(
            model_of(
                tf_adascale.Model,
                lambda: Adasum(
                    SGD(0.1), combine=combine, group_size=group_size
                ),
                strategy_of(count),
                microbatches=microbatches,
            ),
            count * microbatches,
            group_size=group_size,
        )

    @pytest.mark.parametrize("combine", COMBINE)
    def test_of_a_stock_model(self, combine, strategy_of):
        model = model_of(
            keras.Model,
            lambda: Adasum(SGD(0.1), combine=combine),
            strategy_of(2),
        )
        check_fit(model, 2)
        x, y = data(4)
        values = model.evaluate(batches(x, y, 4), verbose=0, return_dict=True)
        predicted = model.predict(batches(x, y, 4), verbose=0)
        loss = np.mean((predicted - y) ** 2)
        np.testing.assert_allclose(values["loss"], loss, rtol=1e-5)

    def test_mixed_float16(self, strategy_of):
        """An overflow in one micro-batch of one replica skips the step."""
        keras.config.set_dtype_policy("mixed_float16")
        model = model_of(
            tf_adascale.Model,
            lambda: Adasum(INNER["adam"]()),
            strategy_of(2),
            microbatches=2,
        )
        assert isinstance(model.optimizer.inner_optimizer, LossScaleOptimizer)
        x, y = data(16)
        before = model.get_weights()
        history = fit(model, batches(x, y, 8), epochs=3)
        assert history["loss"][-1] < history["loss"][0]
        after = model.get_weights()
        assert not np.array_equal(after[0], before[0])
        x[-1] = 1e5  # Infinite in float16.
        skipped = int(model.optimizer.skipped_steps)
        fit(model, batches(x[8:], y[8:], 8))
        assert int(model.optimizer.skipped_steps) == skipped + 1
        assert_close(model.get_weights(), after, atol=0)


@pytest.mark.parametrize("combine", COMBINE)
class TestSaving:
    def trained(self, combine, strategy, model_class=tf_adascale.Model):
        model = model_of(
            model_class,
            lambda: Adasum(INNER["adam"](), combine=combine),
            strategy,
        )
        fit(model, batches(*data(16), 8))
        return model

    def of_replicas(self, model):
        variables = [*model.variables, *model.optimizer.variables]
        strategy = model.distribute_strategy
        return [
            [x.numpy() for x in strategy.experimental_local_results(v.value)]
            for v in variables
        ]

    @pytest.mark.parametrize(
        ("model_class", "count"), [(keras.Model, 2), (tf_adascale.Model, 1)]
    )
    def test_model(self, model_class, count, combine, strategy_of, tmp_path):
        strategy = strategy_of(count)
        model = self.trained(combine, strategy, model_class)
        model.save(tmp_path / "model.keras")
        with strategy.scope():
            loaded = keras.models.load_model(tmp_path / "model.keras")
        assert type(loaded.optimizer) is Adasum
        assert loaded.optimizer.combine == combine
        self.check(model, loaded)
        fit(loaded, batches(*data(16), 8))

    def test_weights(self, combine, strategy_of, tmp_path):
        model = self.trained(combine, strategy_of(2))
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = model_of(
            tf_adascale.Model,
            lambda: Adasum(INNER["adam"](), combine=combine),
            strategy_of(3),
        )
        loaded.load_weights(tmp_path / "model.weights.h5")
        self.check(model, loaded)

    def check(self, model, loaded):
        """All replicas get what the first had."""
        pairs = list(
            zip(self.of_replicas(model), self.of_replicas(loaded), strict=True)
        )
        for saved, received in pairs:
            for value in received:
                assert np.array_equal(value, saved[0])


class TestConfig:
    def test_round_trip(self):
        optimizer = Adasum(
            SGD(0.5, momentum=0.9),
            combine="gradients",
            group_size=4,
            name="another",
        )
        config = keras.optimizers.serialize(optimizer)
        other = keras.optimizers.deserialize(config)
        assert type(other) is Adasum
        assert other.combine == "gradients"
        assert other.group_size == 4
        assert other.name == "another"
        assert other.inner_optimizer.momentum == 0.9
        assert float(other.learning_rate) == 0.5
        assert keras.optimizers.serialize(other) == config

    def test_defaults(self):
        optimizer = Adasum(SGD())
        assert optimizer.combine == "updates"
        assert optimizer.group_size == 1

    @pytest.mark.parametrize("combine", ["sum", None, "Updates"])
    def test_refuses_to_combine_anything_else(self, combine):
        with pytest.raises(
            ValueError,
            match=r"no such thing to combine\. Expected one of .*updates.*"
            rf"gradients.*\. Received: combine={combine!r}",
        ):
            Adasum(SGD(), combine=combine)

    @pytest.mark.parametrize("size", [0, -1, 2.0, True, False, None, "2"])
    def test_refuses_groups_of(self, size):
        with pytest.raises(
            ValueError,
            match=r"no group of this size\. Expected an int >= 1, .* "
            rf"Received: group_size={re.escape(repr(size))}",
        ):
            Adasum(SGD(), group_size=size)

    def test_refuses_settings_of_the_inner_optimizer(self):
        with pytest.raises(ValueError, match="does not take the arguments"):
            Adasum(SGD(), clipnorm=1.0)
        with pytest.raises(ValueError, match="a wrapper already"):
            Adasum(tf_adascale.AdaScale(SGD()))

    @pytest.mark.parametrize(
        ("count", "microbatches", "size"),
        [(1, 1, 2), (1, 4, 2), (2, 1, 4), (3, 1, 2), (2, 2, 3), (2, 3, 2)],
    )
    def test_refuses_groups_that_do_not_fit(
        self, count, microbatches, size, strategy_of
    ):
        run = Run(strategy_of(count), lambda: Adasum(SGD(), group_size=size))
        run.optimizer.microbatches = microbatches
        before = run.state()
        [gradients] = random_gradients(count, steps=1)
        with pytest.raises(
            ValueError,
            match=r"do not make up groups of this size\. Expected 1, or a "
            r"multiple of the micro-batches that divides .* Received: "
            rf"group_size={size}, replicas={count}, "
            rf"microbatches={microbatches}",
        ):
            run.step(gradients)
        assert run.state() == before

    def test_callbacks_of_a_gain_refuse_it(self):
        model = model_of(keras.Model, lambda: Adasum(SGD()))
        for callback in (
            tf_adascale.callbacks.StopAtScaleInvariantStep(3),
            tf_adascale.callbacks.ScalingLog(),
        ):
            with pytest.raises(
                ValueError,
                match=r"without a gain\. Expected a model compiled with "
                r"tf_adascale\.AdaScale\. Received: optimizer=",
            ):
                model.fit(*data(4), verbose=0, callbacks=[callback])


# What a step's graph holds.


def outputs_of(graph):
    """All tensors of a graph and of the functions it calls."""
    functions = getattr(graph, "_functions", {})
    graphs = [graph, *(f.graph for f in functions.values())]
    return [x for g in graphs for op in g.get_operations() for x in op.outputs]


@pytest.mark.parametrize("combine", COMBINE)
def test_memory_is_bounded(combine, strategy_of, monkeypatch):
    """No replica holds more than a piece of all replicas at a time."""
    entries = 64
    monkeypatch.setattr(replicas, "BYTES_PER_GATHER", 4 * entries)
    gathered = []
    stock = tf.distribute.ReplicaContext.all_gather

    def all_gather(context, value, *args, **kwargs):
        gathered.append(value.shape.num_elements())
        return stock(context, value, *args, **kwargs)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_gather", all_gather)
    strategy = strategy_of(3)
    with strategy.scope():
        variables = weights([np.zeros((20, 25)), np.zeros((7, 11))])
        optimizer = Adasum(SGD(1.0), combine=combine)
        optimizer.build(variables)

    @tf.function
    def step():
        strategy.run(
            lambda: optimizer.apply([tf.ones(v.shape) for v in variables])
        )

    graph = step.get_concrete_function().graph
    # 577 entries on each of three replicas: 9 pieces of 64, and a last of 1.
    assert collections.Counter(gathered) == {64: 27, 1: 3}
    # Nor is anything made of all replicas' whole values.
    sizes = [x.shape.num_elements() or 0 for x in outputs_of(graph)]
    assert max(sizes) == 500


def test_module_agrees_with_the_oracle_of_this_file():
    inputs = random_gradients(5, steps=1)[0][0]
    received = adasum.combined([tf.constant(x, "float64") for x in inputs])
    assert_close([received], [tree(inputs)], atol=1e-12)
