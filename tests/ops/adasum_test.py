"""The arithmetic of Adasum against a walk up the tree in NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tests import golden, harness
from tf_adascale.ops import adasum as adasum_ops

COMPILED = {
    "function": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}
# Relative to the largest entry of the inputs. A float32 sum that is a hundred
# times smaller than its terms has a direction a hundred times less exact.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def walked(inputs):
    """Returns the Adasum of vectors in float64, by its definition."""
    nodes = [np.asarray(value, "float64") for value in inputs]
    while len(nodes) > 1:
        pairs = zip(nodes[::2], nodes[1::2])
        odd_one = nodes[len(nodes) // 2 * 2 :]
        nodes = [walked_pair(a, b) for a, b in pairs] + odd_one
    return nodes[0]


def walked_pair(a, b):
    product, squares = np.sum(a * b), (np.sum(a * a), np.sum(b * b))
    of_a, of_b = (1 - product / (2 * s) if s else 1.0 for s in squares)
    return of_a * a + of_b * b


def combine(inputs, dtype="float64"):
    result = adasum_ops.combine([tf.constant(value, dtype) for value in inputs])
    assert result.dtype == dtype
    return result.numpy()


def by_coefficients(inputs, dtype="float64"):
    """Returns the Adasum of vectors, from their inner products."""
    rows = np.asarray(inputs, dtype)
    # In float64, because the error of a float32 sum depends on the processor.
    products = (rows.astype("float64") @ rows.T).astype(dtype)
    factors = adasum_ops.coefficients(tf.constant(products)).numpy()
    assert factors.dtype == rows.dtype
    return factors @ rows


WAYS = {"combine": combine, "coefficients": by_coefficients}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def assert_close(received, expected, inputs, tolerance=1e-12):
    assert np.shape(received) == np.shape(expected)
    atol = tolerance * np.max(np.abs(inputs))
    np.testing.assert_allclose(received, expected, rtol=0, atol=atol)


class TestOracle:
    @each_way
    @each_dtype
    def test_any_number(self, dtype, way):
        for count in range(1, 18):
            inputs = normal(count, 30, seed=count).astype(dtype)
            expected, tolerance = walked(inputs), TOLERANCE[dtype]
            assert_close(way(inputs, dtype), expected, inputs, tolerance)

    @pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (1000,)], ids=str)
    def test_any_shape(self, shape):
        inputs = normal(3, *shape)
        assert_close(combine(inputs), walked(inputs), inputs)

    @each_dtype
    def test_pair(self, dtype):
        inputs = normal(2, 3, 5).astype(dtype)
        received = adasum_ops.pair(*map(tf.constant, inputs))
        assert_close(received, walked(inputs), inputs, TOLERANCE[dtype])

    @pytest.mark.parametrize("mode", COMPILED)
    def test_in_a_graph(self, mode):
        inputs = normal(7, 3, 4)
        function = COMPILED[mode](adasum_ops.combine)
        received = function(list(map(tf.constant, inputs)))
        assert received.shape == (3, 4)
        assert_close(received, walked(inputs), inputs)
        rows = inputs.reshape(7, -1)
        function = COMPILED[mode](adasum_ops.coefficients)
        factors = function(tf.constant(rows @ rows.T)).numpy()
        assert_close(factors @ rows, walked(rows), rows)

    @pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
    def test_coefficients_of_several_layers(self, known):
        rows = normal(2, 3, 5, 30)
        products = tf.constant(rows @ np.swapaxes(rows, -1, -2))
        shape = products.shape if known else [None, None, 5, 5]
        function = tf.function(
            adasum_ops.coefficients,
            input_signature=[tf.TensorSpec(shape, tf.float64)],
        )
        factors = function(products).numpy()
        assert factors.shape == (2, 3, 5)
        for place in np.ndindex(2, 3):
            layer = rows[place]
            assert_close(factors[place] @ layer, walked(layer), layer)

    def test_coefficients_are_those_of_the_tree(self):
        """A left-over input skips levels, which changes the factors."""
        # Five inputs, orthogonal except for x_4 = x_0. The tree adds x_0 to x_3
        # and combines their sum s, |s|^2 = 4, with x_4. As s.x_4 = 1, s has
        # the factor 1 - 1/8 = 7/8, and x_4 has 1 - 1/2 = 1/2.
        products = np.eye(5)
        products[0, 4] = products[4, 0] = 1
        factors = adasum_ops.coefficients(tf.constant(products))
        np.testing.assert_allclose(factors, [7 / 8] * 4 + [1 / 2], rtol=1e-15)


@pytest.mark.parametrize(
    "mode, dtype, tolerance",
    [("function", "float16", 2**-10), ("xla", "bfloat16", 2**-7)],
)
def test_half_precision_is_combined_in_float32(mode, dtype, tolerance):
    # Squared norms are 300 * 300^2 = 2.7e7, over float16's 65504.
    inputs = [
        tf.cast(300 + 30 * normal(300, seed=seed), dtype) for seed in range(3)
    ]
    expected = walked([tf.cast(x, "float64").numpy() for x in inputs])
    received = COMPILED[mode](adasum_ops.combine)(inputs)
    assert received.dtype == dtype
    np.testing.assert_allclose(
        tf.cast(received, "float64"), expected, rtol=tolerance
    )


@each_way
class TestObviousCases:
    @pytest.mark.parametrize(
        "case", golden.ADASUM_ROWS, ids=lambda case: case.name
    )
    def test_golden_rows(self, case, way):
        for dtype in TOLERANCE:
            # Small numbers and powers of two: exact but for thirds.
            np.testing.assert_allclose(
                way(case.samples, dtype),
                case.expected,
                rtol=0,
                atol=1e-6 * case.largest,
            )

    def test_one_is_itself_to_the_bit(self, way):
        inputs = normal(1, 50)
        assert np.array_equal(way(inputs), inputs[0])

    def test_regrouping_changes_the_result(self, way):
        """The operation is symmetric, but not associative."""
        a, b, c, d = ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0])
        # ab = (1, 1); with c it is their mean, c.
        assert_close(way([a, b, c]), [1.0, 1.0], [c], 1e-15)
        # cb = (1 - 1/4) c + (1 - 1/2) b = (3/4, 5/4); its product with a is
        # 3/4, its squared norm 34/16: (1 - 3/17) cb + (1 - 3/8) a.
        assert_close(
            way([c, b, a]),
            [0.75 * 14 / 17 + 5 / 8, 1.25 * 14 / 17],
            [a, b, c],
            1e-15,
        )
        # ac = (1 - 1/2) a + (1 - 1/4) c = (5/4, 3/4) and, as b.d = -1,
        # bd = (1 + 1/2) b + (1 + 1/4) d = (5/4, 1/4). Their product is 7/4,
        # the squared norms are 17/8 and 13/8: 1 - 7/17 and 1 - 7/13.
        assert_close(
            way([a, c, b, d]),
            [10 / 17 * 5 / 4 + 6 / 13 * 5 / 4, 10 / 17 * 3 / 4 + 6 / 13 / 4],
            [c, d],
            1e-15,
        )
        # ab = (1, 1) and cd = (2, 0): 1 - 2/4 = 1/2 and 1 - 2/8 = 3/4.
        # Neighbours may change places, and so may pairs of neighbours.
        for order in (
            [a, b, c, d],
            [b, a, c, d],
            [a, b, d, c],
            [c, d, a, b],
        ):
            assert_close(way(order), [2.0, 0.5], [c, d], 1e-15)


class TestLaws:
    """Properties of Adasum, for 50 layers at a time in float64."""

    counts = pytest.mark.parametrize("count", [2, 3, 8, 13])

    def assert_combines_to(self, inputs, expected):
        received = adasum_ops.combine_rows(tf.constant(inputs))
        assert_close(received, expected, inputs)

    @counts
    def test_turns_and_scales_with_its_inputs(self, count):
        inputs = normal(50, count, 12, seed=count)
        rotation, _ = np.linalg.qr(normal(12, 12))
        turned = -7.5 * inputs @ rotation
        expected = adasum_ops.combine_rows(tf.constant(inputs)).numpy()
        self.assert_combines_to(turned, -7.5 * expected @ rotation)

    @counts
    def test_of_orthogonal_inputs_is_the_sum(self, count):
        basis, _ = np.linalg.qr(normal(50, 24, count, seed=count))
        inputs = np.swapaxes(basis, 1, 2) * normal(50, count, 1, seed=1)
        self.assert_combines_to(inputs, inputs.sum(1))

    @pytest.mark.parametrize("count", [2, 4, 16])
    def test_of_parallel_inputs_is_the_mean(self, count):
        """Parallel inputs are averaged: a and c a make (1/2 + c/2) a."""
        lengths = np.random.default_rng(0).uniform(0.1, 3, (50, count, 1))
        inputs = lengths * normal(50, 1, 24, seed=count)
        self.assert_combines_to(inputs, inputs.mean(1))

    @given(st.lists(st.integers(-3, 3), min_size=16, max_size=16))
    def test_is_the_walk_also_where_inputs_are_special(self, entries):
        """Small integer vectors are often equal, opposite, orthogonal or 0."""
        inputs = np.reshape(entries, (2, 4, 2)).astype("float64")
        self.assert_combines_to(inputs, [walked(rows) for rows in inputs])


class TestTooSmallToDivideBy:
    @each_way
    @each_dtype
    def test_zeros_leave_the_others_alone(self, dtype, way):
        for place in range(3):
            inputs = normal(3, 20).astype(dtype)
            inputs[place] = 0
            others = [x for i, x in enumerate(inputs) if i != place]
            expected, tolerance = walked(others), TOLERANCE[dtype]
            assert_close(way(inputs, dtype), expected, inputs, tolerance)
        for count in (1, 2, 3, 8):
            zeros = np.zeros((count, 10))
            assert np.array_equal(way(zeros, dtype), zeros[0])

    def test_horovods_threshold_in_float64(self):
        """An input whose squared norm is under 1.5e-154 has the factor 1."""
        # Factors of a and a: 1 - 1/2 above, 1 below; |a| 1.26e-77, 1.18e-77.
        for square, factor in [(1.6e-154, 0.5), (1.4e-154, 1.0)]:
            products = tf.constant(np.full((2, 2), square))
            factors = adasum_ops.coefficients(products).numpy()
            assert factors.tolist() == [factor, factor]
            length = np.sqrt(square)
            received = combine([[length], [length]])
            np.testing.assert_allclose(
                received, [2 * factor * length], rtol=1e-12
            )

    def test_tiny_beside_huge_in_float64(self):
        # 1e-80 counts as 0: its factor is 1, and that of (1, 1) is
        # 1 - 1e-80/4 = 1.
        received = combine([[1e-80, 0.0], [1.0, 1.0]])
        assert received.tolist() == [1.0, 1.0]
        # Orthogonal inputs are added, whatever their lengths.
        received = combine([[1e-80, 0.0], [0.0, 1e150]])
        assert received.tolist() == [1e-80, 1e150]
        # Squared norms are 1e300. Equal inputs make their mean.
        assert combine([[1e150, 0.0]] * 2).tolist() == [1e150, 0.0]

    @each_way
    @pytest.mark.parametrize(
        "dtype, least, most, tolerance",
        [("float32", 1e-16, 1e15, 2e-6), ("float64", 1e-70, 1e70, 1e-12)],
    )
    def test_parallel_over_the_range_is_the_mean(
        self, dtype, least, most, tolerance, way
    ):
        """Lengths cover the whole range, as in Horovod's tests."""
        for count in (2, 4):
            powers = np.arange(1, count + 1) / count
            lengths = most**powers * least ** (1 - powers)
            np.random.default_rng(2).shuffle(lengths)
            inputs = (lengths[:, None] * normal(1024)).astype(dtype)
            expected = inputs.astype("float64").mean(0)
            assert_close(way(inputs, dtype), expected, expected, tolerance)

    @each_way
    @each_dtype
    @pytest.mark.parametrize("size", [1, 2, 33, 10_000])
    def test_cancelling_in_the_middle_of_the_tree(self, size, dtype, way):
        """A node whose parts are opposite counts as zero, not as noise."""
        a, b, c, d = normal(4, size).astype(dtype)
        # `coefficients` is inexact for inputs with fewer than 8 entries.
        coarse = size < 8 and dtype == "float32"
        tolerance = 1e-3 if coarse else TOLERANCE[dtype]
        for inputs, left in [
            ([a, -a, b, c], [b, c]),
            ([b, c, a, -a], [b, c]),
            ([a, -a, b], [b]),
            ([a, b, -a, -b, c], [c]),
            ([a, b, -a, -b, c, d], [c, d]),
            ([a, -a, b, -b, c], [c]),
        ]:
            received = way(inputs, dtype)
            assert_close(received, walked(left), inputs, tolerance)

    @each_dtype
    def test_cancelling_up_to_rounding(self, dtype):
        """Updates are differences of rounded weights and cancel in part."""
        weights = 1 + 0.1 * normal(30).astype(dtype)
        step = 0.01 * normal(30, seed=1).astype(dtype)
        up, down = (weights + step) - weights, (weights - step) - weights
        assert not np.array_equal(up, -down)
        c = 0.01 * normal(30, seed=2).astype(dtype)
        assert_close(combine([up, down, c], dtype), c, c, 1e-4)


class TestRefused:
    @pytest.mark.parametrize(
        "shape, dtype",
        [
            *[(shape, "float32") for shape in [(2, 3), (4,), (), (0, 1)]],
            *[((2, 2), dtype) for dtype in ("float16", "bfloat16", "int32")],
        ],
        ids=str,
    )
    def test_what_are_no_inner_products(self, shape, dtype):
        with harness.refused("`inner_products` must") as raised:
            adasum_ops.coefficients(tf.zeros(shape, dtype))
        assert dtype in str(raised.value)
        assert str(shape) in str(raised.value)

    @pytest.mark.parametrize("shape", [(None, None), (3, None), None], ids=str)
    def test_inner_products_between_an_unknown_number(self, shape):
        function = tf.function(
            adasum_ops.coefficients, input_signature=[tf.TensorSpec(shape)]
        )
        with harness.refused("`inner_products` must"):
            function(tf.eye(3))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
    def test_rows_of_other_types(self, dtype):
        with harness.refused("`rows` must") as raised:
            adasum_ops.combine_rows(tf.ones((2, 2), dtype))
        assert dtype in str(raised.value)

    @pytest.mark.parametrize(
        "inputs",
        [
            [],
            [tf.constant([1, 2]), tf.constant([1, 2])],
            [tf.zeros((3, 1)), tf.zeros((1, 3))],
            [tf.zeros(3), tf.zeros(3, "float64")],
        ],
        ids=["none", "integers", "shapes", "types"],
    )
    def test_tensors_that_do_not_match(self, inputs):
        with harness.refused("`inputs` must", "inputs="):
            adasum_ops.combine(inputs)
