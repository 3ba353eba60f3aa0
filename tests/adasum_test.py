"""The arithmetic of Adasum against a walk up the tree in NumPy."""

import golden
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tf_adascale import adasum

MODES = {
    "eager": lambda function: function,
    "function": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}
COUNTS = range(1, 18)
SHAPES = [(), (1,), (2,), (9,), (3, 5), (2, 3, 4), (1000,)]
# Relative to the largest entry of the inputs. In float32 a sum that is a
# hundred times smaller than what it sums loses as much of its direction.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def walked(inputs):
    """Adasum in float64, by what its definition says of vectors."""
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


def combined(inputs, dtype="float64"):
    result = adasum.combined([tf.constant(value, dtype) for value in inputs])
    assert result.dtype == dtype
    return result.numpy()


def by_coefficients(inputs, dtype="float64"):
    """The same from the inner products, of vectors."""
    rows = np.asarray(inputs, dtype)
    factors = adasum.coefficients(tf.constant(rows @ rows.T)).numpy()
    assert factors.dtype == rows.dtype
    return factors @ rows


# Ways to combine vectors, which agree.
WAYS = {"combined": combined, "coefficients": by_coefficients}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def assert_close(received, expected, inputs, tolerance=1e-12):
    assert np.shape(received) == np.shape(expected)
    atol = tolerance * np.max(np.abs(inputs))
    np.testing.assert_allclose(received, expected, rtol=0, atol=atol)


class TestOracle:
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_combined_of_any_number(self, shape, dtype):
        for count in COUNTS:
            inputs = normal(count, *shape, seed=count).astype(dtype)
            assert_close(
                combined(inputs, dtype),
                walked(inputs),
                inputs,
                TOLERANCE[dtype],
            )

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_coefficients_of_any_number(self, dtype):
        for count in COUNTS:
            inputs = normal(count, 40, seed=count).astype(dtype)
            assert_close(
                by_coefficients(inputs, dtype),
                walked(inputs),
                inputs,
                TOLERANCE[dtype],
            )

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_pair(self, dtype):
        for shape in SHAPES:
            inputs = normal(2, *shape).astype(dtype)
            a, b = map(tf.constant, inputs)
            assert_close(
                adasum.pair(a, b), walked(inputs), inputs, TOLERANCE[dtype]
            )

    @pytest.mark.parametrize("mode", ["function", "xla"])
    def test_in_a_graph(self, mode):
        inputs = normal(7, 3, 4)
        received = MODES[mode](adasum.combined)(list(map(tf.constant, inputs)))
        assert received.shape == (3, 4)
        assert_close(received, walked(inputs), inputs)
        rows = inputs.reshape(7, -1)
        products = tf.constant(rows @ rows.T)
        factors = MODES[mode](adasum.coefficients)(products).numpy()
        assert_close(factors @ rows, walked(rows), rows)

    @pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
    @pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
    def test_coefficients_of_several_layers(self, leading, known):
        rows = normal(*leading, 5, 30)
        products = tf.constant(rows @ np.swapaxes(rows, -1, -2))
        shape = products.shape if known else [None] * len(leading) + [5, 5]
        function = tf.function(
            adasum.coefficients,
            input_signature=[tf.TensorSpec(shape, tf.float64)],
        )
        factors = function(products).numpy()
        assert factors.shape == (*leading, 5)
        for place in np.ndindex(*leading):
            layer = rows[place]
            assert_close(factors[place] @ layer, walked(layer), layer)

    def test_coefficients_are_of_the_tree(self):
        """They say where an odd one goes: not through all levels."""
        # Orthogonal but for x_4 = x_0, of five. x_0 to x_3 are added, and their
        # sum s, |s|^2 = 4, meets x_4: s.x_4 = 1, so that s counts
        # 1 - 1/8 = 7/8 and x_4 counts 1 - 1/2 = 1/2.
        products = np.eye(5)
        products[0, 4] = products[4, 0] = 1
        factors = adasum.coefficients(tf.constant(products))
        np.testing.assert_allclose(factors, [7 / 8] * 4 + [1 / 2], rtol=1e-15)


class TestHalfPrecision:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [("float16", 2**-10), ("bfloat16", 2**-7)]
    )
    @pytest.mark.parametrize("mode", MODES)
    def test_is_combined_in_float32(self, mode, dtype, tolerance):
        # Squared norms of 300 * 300^2 = 2.7e7, where float16 ends at 65504.
        inputs = [
            tf.cast(300 + 30 * normal(300, seed=seed), dtype)
            for seed in range(3)
        ]
        expected = walked([tf.cast(x, "float64").numpy() for x in inputs])
        received = MODES[mode](adasum.combined)(inputs)
        assert received.dtype == dtype
        np.testing.assert_allclose(
            tf.cast(received, "float64"), expected, rtol=tolerance
        )

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_pair_keeps_the_type(self, dtype):
        a, b = tf.constant([300.0] * 300, dtype), tf.zeros(300, dtype)
        result = adasum.pair(a, b)
        assert result.dtype == dtype
        assert np.array_equal(tf.cast(result, "float32"), [300.0] * 300)


@pytest.mark.parametrize("way", WAYS)
class TestObviousCases:
    @pytest.mark.parametrize(
        "case", golden.ADASUM_ROWS, ids=lambda case: case.name
    )
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_golden(self, case, dtype, way):
        received = WAYS[way](case.samples, dtype)
        # Small numbers and powers of two: exact but for thirds.
        np.testing.assert_allclose(
            received, case.expected, rtol=0, atol=1e-6 * case.largest
        )

    def test_one_is_itself_to_the_bit(self, way):
        inputs = normal(1, 50)
        assert np.array_equal(WAYS[way](inputs), inputs[0])

    def test_regrouping_changes_the_result(self, way):
        """The operation is symmetric, but not associative."""
        a, b, c, d = ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0])
        combine = WAYS[way]
        # ab = (1, 1); with c it is their mean, c.
        assert_close(combine([a, b, c]), [1.0, 1.0], [c], 1e-15)
        # cb = (1 - 1/4) c + (1 - 1/2) b = (3/4, 5/4); its product with a is
        # 3/4, its squared norm 34/16: (1 - 3/17) cb + (1 - 3/8) a.
        assert_close(
            combine([c, b, a]),
            [0.75 * 14 / 17 + 5 / 8, 1.25 * 14 / 17],
            [a, b, c],
            1e-15,
        )
        # ab = (1, 1) and cd = (2, 0): 1 - 2/4 = 1/2 and 1 - 2/8 = 3/4.
        assert_close(combine([a, b, c, d]), [2.0, 0.5], [c, d], 1e-15)
        # ac = (1 - 1/2) a + (1 - 1/4) c = (5/4, 3/4) and, as b.d = -1,
        # bd = (1 + 1/2) b + (1 + 1/4) d = (5/4, 1/4). Their product is 7/4,
        # the squared norms are 17/8 and 13/8: 1 - 7/17 and 1 - 7/13.
        assert_close(
            combine([a, c, b, d]),
            [10 / 17 * 5 / 4 + 6 / 13 * 5 / 4, 10 / 17 * 3 / 4 + 6 / 13 / 4],
            [c, d],
            1e-15,
        )
        # Neighbours may change places, and pairs of them.
        for order in ([b, a, c, d], [a, b, d, c], [c, d, a, b]):
            assert_close(combine(order), [2.0, 0.5], [c, d], 1e-15)


def vectors(count, size):
    return st.lists(
        st.lists(
            st.floats(-8, 8).map(lambda value: round(value, 3)),
            min_size=size,
            max_size=size,
        ),
        min_size=count,
        max_size=count,
    ).map(np.array)


def longer_than(rows, length):
    return np.min(np.linalg.norm(rows, axis=1)) > length


class TestLaws:
    """Properties, of `combined` in float64."""

    @given(vectors(3, 12), st.floats(1e-3, 1e3), st.booleans())
    def test_scales_with_its_inputs(self, inputs, scale, negative):
        scale = -scale if negative else scale
        assert_close(
            combined(scale * inputs),
            scale * combined(inputs),
            [*(scale * inputs).ravel(), 1e-9],
        )

    @given(st.integers(2, 9), st.integers(0, 99))
    def test_turns_with_its_inputs(self, count, seed):
        inputs = normal(count, 12, seed=seed)
        rotation, _ = np.linalg.qr(normal(12, 12, seed=seed + 1))
        assert_close(
            combined(inputs @ rotation), combined(inputs) @ rotation, inputs
        )

    @given(vectors(2, 6))
    def test_is_symmetric(self, inputs):
        assert_close(
            combined(inputs), combined(inputs[::-1]), [1, *inputs.flat]
        )

    @given(st.integers(2, 16), st.integers(0, 99))
    def test_of_orthogonal_inputs_is_the_sum(self, count, seed):
        basis, _ = np.linalg.qr(normal(24, count, seed=seed))
        inputs = basis.T * normal(count, 1, seed=seed)
        assert_close(combined(inputs), inputs.sum(0), inputs)

    @given(st.sampled_from([2, 4, 8, 16]), st.integers(0, 99))
    def test_of_parallel_inputs_is_the_mean(self, count, seed):
        """Of any lengths: (1/2 + c/2) a for a and c a."""
        lengths = np.random.default_rng(seed).uniform(0.1, 3, (count, 1))
        inputs = lengths * normal(1, 24, seed=seed)
        assert_close(combined(inputs), inputs.mean(0), inputs)

    @given(vectors(2, 6))
    def test_of_two_is_no_shorter_than_half_their_sum(self, inputs):
        """And the factors of acute angles lie between the mean and the sum."""
        a, b = inputs
        if a @ b < 0 or not longer_than(inputs, 0.01):
            return
        total = combined(inputs)
        assert total @ total >= (a + b) @ (a + b) / 4 - 1e-9
        assert total @ total <= (a + b) @ (a + b) + 1e-9


class TestTooSmallToDivideBy:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("place", range(3))
    def test_zeros_leave_the_others_alone(self, place, dtype, way):
        inputs = normal(3, 20).astype(dtype)
        inputs[place] = 0
        others = [x for i, x in enumerate(inputs) if i != place]
        assert_close(
            WAYS[way](inputs, dtype),
            walked(others),
            inputs,
            TOLERANCE[dtype],
        )

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_nothing_but_zeros(self, dtype, way):
        for count in (1, 2, 3, 8):
            zeros = np.zeros((count, 10))
            assert np.array_equal(WAYS[way](zeros, dtype), zeros[0])

    def test_horovods_threshold_in_float64(self):
        """A squared norm under 1.5e-154 has the factor 1."""
        # Of a and a: 1 - 1/2 each above, 1 below; lengths 1.26e-77, 1.18e-77.
        for square, factor in [(1.6e-154, 0.5), (1.4e-154, 1.0)]:
            products = tf.constant(np.full((2, 2), square))
            factors = adasum.coefficients(products).numpy()
            assert factors.tolist() == [factor, factor]
            length = np.sqrt(square)
            received = combined([[length], [length]])
            np.testing.assert_allclose(
                received, [2 * factor * length], rtol=1e-12
            )

    def test_tiny_beside_huge_in_float64(self):
        # 1e-80 is as good as 0: its factor is 1, and that of (1, 1) is
        # 1 - 1e-80/4 = 1.
        received = combined([[1e-80, 0.0], [1.0, 1.0]])
        assert received.tolist() == [1.0, 1.0]
        # Orthogonal ones are added whatever their lengths.
        received = combined([[1e-80, 0.0], [0.0, 1e150]])
        assert received.tolist() == [1e-80, 1e150]
        # Squared norms of 1e300; equal ones make their mean.
        assert combined([[1e150, 0.0]] * 2).tolist() == [1e150, 0.0]

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("dtype", "least", "most", "tolerance"),
        [("float32", 1e-16, 1e15, 2e-6), ("float64", 1e-70, 1e70, 1e-12)],
    )
    def test_parallel_over_the_range_is_the_mean(
        self, dtype, least, most, tolerance, way
    ):
        """What Horovod's tests of stability ask for."""
        direction = normal(1024)
        for count in (2, 4):
            powers = np.arange(1, count + 1) / count
            lengths = most**powers * least ** (1 - powers)
            np.random.default_rng(2).shuffle(lengths)
            inputs = (lengths[:, None] * direction).astype(dtype)
            expected = inputs.astype("float64").mean(0)
            assert_close(
                WAYS[way](inputs, dtype), expected, expected, tolerance
            )

    @pytest.mark.parametrize("size", [1, 2, 33, 10_000])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("way", WAYS)
    def test_cancelling_in_the_middle_of_the_tree(self, way, dtype, size):
        """A node whose parts are opposite is nothing, not noise."""
        a, b, c, d = normal(4, size).astype(dtype)
        for inputs, left in [
            ([a, -a, b, c], [b, c]),
            ([b, c, a, -a], [b, c]),
            ([a, -a, b], [b]),
            ([a, b, -a, -b, c], [c]),
            ([a, b, -a, -b, c, d], [c, d]),
            ([a, -a, b, -b, c], [c]),
        ]:
            assert_close(
                WAYS[way](inputs, dtype),
                walked(left),
                inputs,
                # Scalars that follow from squares, see `coefficients`.
                1e-3 if size < 8 and dtype == "float32" else TOLERANCE[dtype],
            )

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_cancelling_up_to_rounding(self, dtype):
        """As updates do, which are differences of rounded weights."""
        weights = 1 + 0.1 * normal(30).astype(dtype)
        step = 0.01 * normal(30, seed=1).astype(dtype)
        up, down = (weights + step) - weights, (weights - step) - weights
        assert not np.array_equal(up, -down)
        c = 0.01 * normal(30, seed=2).astype(dtype)
        assert_close(combined([up, down, c], dtype), c, c, 1e-4)


class TestRefused:
    @pytest.mark.parametrize(
        "shape", [(2, 3), (4,), (), (5, 2, 3), (0, 1)], ids=str
    )
    def test_products_that_are_not_square(self, shape):
        with pytest.raises(
            ValueError,
            match=r"no inner products .* Expected square matrices.* "
            r"Received: inner_products of shape",
        ):
            adasum.coefficients(tf.zeros(shape))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
    def test_products_of_other_types(self, dtype):
        with pytest.raises(
            ValueError,
            match=r"Expected square matrices of float32 or float64.* "
            rf"Received: .*{dtype}",
        ):
            adasum.coefficients(tf.ones((2, 2), dtype))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
    def test_rows_of_other_types(self, dtype):
        with pytest.raises(
            ValueError,
            match=rf"Expected float32 or float64\. Received: rows of .*{dtype}",
        ):
            adasum.combined_rows(tf.ones((2, 2), dtype))

    @pytest.mark.parametrize("shape", [(None, None), (3, None), None], ids=str)
    def test_products_between_unknown_numbers(self, shape):
        function = tf.function(
            adasum.coefficients, input_signature=[tf.TensorSpec(shape)]
        )
        with pytest.raises(ValueError, match="Expected square matrices"):
            function(tf.eye(3))

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
        message = (
            r"cannot be combined\. Expected one or more of one floating type "
            r"and one shape\. Received: inputs="
        )
        with pytest.raises(ValueError, match=message):
            adasum.combined(inputs)
        if inputs:
            with pytest.raises(ValueError, match=message):
                adasum.pair(*inputs)
