"""Adasum as an optimizer, against stock optimizers and a tree in NumPy."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import golden, harness
from tf_adascale import Adasum
from tf_adascale.distribute import collectives
from tf_adascale.ops import adasum as adasum_ops

SGD = keras.optimizers.SGD

# A variable of many entries and two of few, which are combined in two ways.
SHAPES = ((8, 5), (3, 2), ())
both_ways = pytest.mark.parametrize("combine", ["updates", "gradients"])

# Epsilons are large, so that first steps differ in more than signs. Vectors of
# few signs are often opposite, and rounding would decide how they add up.
INNER = {
    "momentum": lambda: SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=0.1),
    "lamb": lambda: keras.optimizers.Lamb(0.01, epsilon=0.1),
    "nadam": lambda: keras.optimizers.Nadam(0.01, epsilon=0.1),
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, epsilon=0.1, weight_decay=0.1, clipnorm=0.5
    ),
    "global_clipnorm": lambda: SGD(0.05, momentum=0.9, global_clipnorm=1.0),
}


def initial():
    random = np.random.default_rng(7)
    return [random.normal(size=shape).astype("float32") for shape in SHAPES]


def random_gradients(count, steps=2):
    """Returns gradients of steps: an array per variable, replicas first."""
    random = np.random.default_rng(0)
    return [
        [random.normal(size=(count, *s)).astype("float32") for s in SHAPES]
        for _ in range(steps)
    ]


def tree(inputs):
    """Returns the Adasum of vectors in float64, by its definition."""
    nodes = [np.asarray(value, "float64") for value in inputs]
    # Updates are differences of rounded weights. Lamb's updates of a scalar all
    # have one length, so opposite ones leave a rounding error that counts as 0.
    nodes = [(value, np.linalg.norm(value)) for value in nodes]
    while len(nodes) > 1:
        odd_one = nodes[len(nodes) // 2 * 2 :]
        pairs = zip(nodes[::2], nodes[1::2])
        nodes = [tree_pair(left, right) for left, right in pairs] + odd_one
    return nodes[0][0]


def tree_pair(left, right):
    """Returns a node, and its length if nothing had cancelled."""
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
    """Returns the Adasum of the means of groups."""
    starts = range(0, len(inputs), size)
    return tree([np.mean(inputs[i : i + size], 0) for i in starts])


class Oracle:
    """Stock optimizers: one per replica, or one for all."""

    def __init__(self, count, make, combine, group_size=1):
        self.group_size = group_size
        self.separate = combine == "updates"
        self.optimizers = [make() for _ in range(count if self.separate else 1)]
        self.variables = [harness.variables(initial()) for _ in self.optimizers]
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


def run_of(
    count, make, values=None, *, dtype="float32", graph=False, **arguments
):
    return harness.Run(
        count,
        lambda: Adasum(make(), **arguments),
        initial() if values is None else values,
        dtype=dtype,
        graph=graph,
    )


class TestSeparateOptimizers:
    """Adasum equals an optimizer per replica, or one fed by the tree."""

    @pytest.mark.parametrize(
        ("combine", "count", "name"),
        [
            *[("updates", count, "momentum") for count in (2, 5)],
            *[("updates", 2, name) for name in ("lamb", "nadam", "adamw")],
            ("gradients", 5, "momentum"),
            ("gradients", 2, "global_clipnorm"),
        ],
    )
    def test_of_any_number_and_kind(self, combine, count, name):
        self.check(count, name, combine)

    @pytest.mark.parametrize(
        ("combine", "count", "size"), [("updates", 8, 2), ("gradients", 6, 2)]
    )
    def test_of_groups(self, combine, count, size):
        self.check(count, "momentum", combine, size)

    @staticmethod
    def check(count, name, combine, group_size=1):
        make = INNER[name]
        run = run_of(count, make, combine=combine, group_size=group_size)
        oracle = Oracle(count, make, combine, group_size)
        for gradients in random_gradients(count):
            expected = oracle.step(gradients)
            harness.assert_close(run.step(gradients).weights(), expected)
        # Each replica has its own slots, or all have those of one step.
        slots = run.optimizer.inner_optimizer.variables
        received = list(zip(*map(harness.copies, slots)))
        for i in range(count):
            stock = oracle.optimizers[i if oracle.separate else 0]
            expected = harness.values(stock.variables)
            harness.assert_close(received[i], expected, atol=1e-5)
        if oracle.separate:
            assert not np.allclose(received[0][2], received[1][2])


@both_ways
def test_average_of_weights_is_of_those_that_all_have(combine):
    run = run_of(
        2,
        lambda: SGD(0.05, use_ema=True, ema_momentum=0.75),
        combine=combine,
    )
    oracle = Oracle(2, lambda: SGD(0.05), combine)
    averages = None
    for gradients in random_gradients(2):
        run.step(gradients)
        new = oracle.step(gradients)
        averages = averages or new  # The first step starts the average.
        averages = [0.75 * a + 0.25 * w for a, w in zip(averages, new)]
    slots = run.optimizer.inner_optimizer._model_variables_moving_average
    for received in zip(*map(harness.copies, slots)):
        harness.assert_close(received, averages)


@both_ways
def test_constraint_acts_on_what_was_combined(combine):
    run = run_of(2, lambda: SGD(1.0), [np.zeros(2)], combine=combine)
    run.variables[0].constraint = keras.constraints.NonNeg()
    # -(1, -1) and -(1, 1) are orthogonal: (-2, 0), constrained to (0, 0).
    run.step([[[1, -1], [1, 1]]])
    assert run.weights()[0].tolist() == [0.0, 0.0]


@both_ways
def test_one_group_is_the_plain_mean(combine):
    run = run_of(4, lambda: SGD(0.05), combine=combine, group_size=4)
    plain, variables = SGD(0.05), harness.variables(initial())
    for gradients in random_gradients(4):
        run.step(gradients)
        plain.apply([tf.constant(g.mean(0)) for g in gradients], variables)
        harness.assert_close(run.weights(), harness.values(variables))


@pytest.mark.parametrize("row", golden.ADASUM_ROWS, ids=lambda row: row.name)
def test_golden_rows(row):
    """A step of SGD(1) is minus the combined gradients."""
    # Vectors padded with zeros make a variable of many entries.
    run = run_of(
        len(row.samples),
        lambda: SGD(1.0),
        [np.zeros(40), np.zeros(3)],
        combine="gradients",
    )
    wide = np.pad(row.samples, [(0, 0), (0, 37)])
    large, small = run.step([wide, row.samples]).weights()
    for received in (large[:3], small):
        np.testing.assert_allclose(-received, row.expected, atol=2e-6)
    assert not large[3:].any()


@both_ways
class TestTypes:
    def test_half_precision_is_combined_in_float32(self, combine):
        # Orthogonal, with squared norms of 100 * 64^2, over float16's 65504.
        gradients = np.zeros((2, 200), "float32")
        gradients[0, :100] = 64
        gradients[1, 100:] = 128
        run = run_of(
            2,
            lambda: SGD(1.0),
            [np.zeros(200)],
            dtype="float16",
            combine=combine,
        )
        [weight] = run.step([gradients]).weights()
        assert weight.dtype == "float16"
        assert np.array_equal(weight.astype("float32"), -gradients.sum(0))
        assert int(run.optimizer.skipped_steps) == 0

    @pytest.mark.parametrize("size", [2, 40])
    def test_float64_keeps_its_digits_beside_float32(self, size, combine):
        strategy = harness.strategy_of(2)
        with strategy.scope():
            narrow = keras.Variable(np.zeros(size), dtype="float32")
            wide = keras.Variable(np.zeros(size), dtype="float64")
            optimizer = Adasum(SGD(1.0), combine=combine)

        def step():
            one = tf.one_hot(collectives.index(), size, dtype=tf.float64)
            optimizer.apply(
                [tf.cast(one, "float32") / 2, one * (1 + 1e-12) / 2],
                [narrow, wide],
            )

        strategy.run(step)
        for value in harness.copies(wide):
            np.testing.assert_allclose(
                value[:2], [-1 - 1e-12] * 2, rtol=0, atol=1e-15
            )
        for value in harness.copies(narrow):
            assert value[:2].tolist() == [-1.0, -1.0]

    @pytest.mark.parametrize("count", [1, 2])
    def test_float64_has_its_range(self, count, combine):
        """A gradient is finite even if its square overflows float32."""
        run = run_of(
            count,
            lambda: SGD(1.0),
            [np.zeros(3), np.zeros(50)],
            dtype="float64",
            combine=combine,
        )
        gradients = [np.full((count, size), 1e100) for size in (3, 50)]
        for weight in run.step(gradients).weights():
            np.testing.assert_allclose(weight, -1e100, rtol=1e-12)


@both_ways
def test_sparse_gradients_of_unknown_shape(combine):
    shapes = [(20, 2), (3, 2)]
    dense, sparse = (
        run_of(
            2,
            lambda: SGD(0.05),
            harness.twos(shapes),
            graph=combine == "gradients",
            combine=combine,
        )
        for _ in range(2)
    )

    def slices(local):
        return [harness.slices(g, shape_known=False) for g in local]

    for gradients in harness.random_gradients(2, 2, shapes):
        dense.step(gradients)
        sparse.step(gradients, slices)
    harness.assert_close(dense.weights(), sparse.weights())


# With models.


def model_of(model_class, optimizer, num_replicas=1, **compiled):
    with harness.strategy_of(num_replicas).scope():
        model = harness.dense_model(model_class, units=16)
        model.compile(optimizer(), "mse", **compiled)
        model.optimizer.build(model.trainable_variables)
    return model


def check_fit(model, samples):
    """Fits one step of samples of two rows each, and checks the weights."""
    x, y = harness.regression(2 * samples)
    gradients = []
    for rows in np.arange(2 * samples).reshape(samples, 2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[rows]) - y[rows]) ** 2)
        gradients.append(
            [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]
        )
    expected = [
        weight - 0.1 * tree(g)
        for weight, g in zip(model.get_weights(), zip(*gradients))
    ]
    harness.fit(model, x, y, batch_size=2 * samples)
    harness.assert_close(model.get_weights(), expected)


class TestFit:
    """An update of plain SGD is the gradient times the rate."""

    def test_micro_batches_are_inputs_of_the_tree(self):
        model = model_of(
            tf_adascale.Model,
            lambda: Adasum(SGD(0.1)),
            2,
            microbatches=2,
            run_eagerly=True,
        )
        check_fit(model, 4)

    def test_of_a_stock_model(self):
        model = model_of(
            keras.Model, lambda: Adasum(SGD(0.1), combine="gradients"), 2
        )
        check_fit(model, 2)


class TestMicrobatches:
    @pytest.mark.parametrize("bad", [np.inf, np.nan])
    def test_one_that_is_not_finite_is_not_hidden(self, bad):
        merge = Adasum(SGD()).merge_samples
        for left, right in [(bad, 1.0), (1.0, bad)]:
            [merged] = merge(
                [tf.constant([left, 1.0])], [tf.constant([right, 2.0])]
            )
            assert not np.all(np.isfinite(merged))

    def test_of_a_group_are_averaged(self):
        """Each of two groups is two replicas of two samples each."""
        run = harness.Run(
            4,
            lambda: Adasum(SGD(0.05), combine="gradients", group_size=4),
            initial(),
            microbatches=2,
        )
        assert run.optimizer.merge_samples is None
        [gradients] = random_gradients(8, steps=1)
        expected = [
            value - 0.05 * tree_of_groups(g, 4)
            for value, g in zip(initial(), gradients)
        ]
        harness.assert_close(run.step(gradients).weights(), expected)


@pytest.mark.parametrize("kind", ["model", "weights"])
def test_a_file_has_the_slots_of_the_first_replica_for_all(kind, tmp_path):
    def make(num_replicas):
        return model_of(
            keras.Model, lambda: Adasum(INNER["adam"]()), num_replicas
        )

    model = make(2)

    def step():
        factor = tf.cast(1 + collectives.index(), tf.float32)
        weights = model.trainable_variables
        model.optimizer.apply([factor * tf.ones(v.shape) for v in weights])

    harness.strategy_of(2).run(step)
    velocity = model.optimizer.inner_optimizer._velocities[0]
    assert not np.array_equal(*harness.copies(velocity))
    if kind == "model":
        model.save(tmp_path / "model.keras")
        with harness.strategy_of(2).scope():
            loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = make(3)
        loaded.load_weights(tmp_path / "model.weights.h5")
    for saved, received in zip(
        [*model.variables, *model.optimizer.variables],
        [*loaded.variables, *loaded.optimizer.variables],
        strict=True,
    ):
        for copy in harness.copies(received):
            assert np.array_equal(copy, harness.first(saved))


class TestRefused:
    @pytest.mark.parametrize("combine", ["sum", None, "Updates"])
    def test_to_combine_anything_else(self, combine):
        rule = "`combine` must be one of ('updates', 'gradients')"
        with harness.refused(rule, f"combine={combine!r}"):
            Adasum(SGD(), combine=combine)

    @pytest.mark.parametrize("size", [0, -1, 2.0, True, False, None, "2"])
    def test_groups_of(self, size):
        rule = "`group_size` must be an int >= 1: the samples averaged"
        with harness.refused(rule, f"group_size={size!r}"):
            Adasum(SGD(), group_size=size)

    @pytest.mark.parametrize(
        ("count", "microbatches", "size"),
        [(1, 1, 2), (1, 4, 2), (2, 1, 4), (3, 1, 2), (2, 2, 3), (2, 3, 2)],
    )
    def test_groups_that_do_not_fit(self, count, microbatches, size):
        run = run_of(count, SGD, group_size=size)
        run.optimizer.microbatches = microbatches
        [gradients] = random_gradients(count, steps=1)
        with (
            harness.untouched(*run.variables, run.optimizer),
            harness.refused(
                "`group_size` must be 1, or a multiple of the micro-batches",
                f"group_size={size}, replicas={count}, "
                f"microbatches={microbatches}",
            ),
        ):
            run.step(gradients)


# The graph of a step.


def outputs_of(graph):
    """Returns all tensors of a graph and of the functions it calls."""
    functions = getattr(graph, "_functions", {})
    graphs = [graph, *(f.graph for f in functions.values())]
    return [x for g in graphs for op in g.get_operations() for x in op.outputs]


@both_ways
def test_memory_is_bounded(combine, monkeypatch):
    """A replica holds one piece of each other replica at a time."""
    entries = 64
    monkeypatch.setattr(collectives, "BYTES_PER_GATHER", 4 * entries)
    gathered = []
    stock = tf.distribute.ReplicaContext.all_gather

    def all_gather(context, value, *args, **kwargs):
        gathered.append(value.shape.num_elements())
        return stock(context, value, *args, **kwargs)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_gather", all_gather)
    strategy = harness.strategy_of(3)
    with strategy.scope():
        variables = harness.variables([np.zeros((20, 25)), np.zeros((7, 11))])
        optimizer = Adasum(SGD(1.0), combine=combine)
        optimizer.build(variables)

    @tf.function
    def step():
        strategy.run(
            lambda: optimizer.apply([tf.ones(v.shape) for v in variables])
        )

    graph = step.get_concrete_function().graph
    # 577 entries on each of three replicas: 9 pieces of 64, and a last of 1.
    # The replica's index goes with each.
    assert collections.Counter(gathered) == {64 + 1: 27, 1 + 1: 3}
    # No tensor has the size of all replicas' values.
    sizes = [x.shape.num_elements() or 0 for x in outputs_of(graph)]
    assert max(sizes) == 500


def test_module_agrees_with_the_oracle_of_this_file():
    inputs = random_gradients(5, steps=1)[0][0]
    received = adasum_ops.combine([tf.constant(x, "float64") for x in inputs])
    np.testing.assert_allclose(received, tree(inputs), rtol=0, atol=1e-12)
