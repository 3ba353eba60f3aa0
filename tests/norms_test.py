"""Squared norms of gradients of every kind against dense ones and NumPy."""

import re

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tf_adascale import norms

DTYPES = ["float16", "bfloat16", "float32", "float64"]

# Ways to the same number, the last being XLA's by the function's own option.
MODES = {
    "eager": norms.squared_norm,
    "function": tf.function(norms.squared_norm),
    "xla": tf.function(norms.squared_norm, jit_compile=True),
    "jit_compile": lambda g: norms.squared_norm(g, jit_compile=True),
}


def slices(values, indices, num_rows, dtype="float32", index_dtype="int32"):
    return tf.IndexedSlices(
        tf.constant(values, dtype),
        tf.constant(indices, index_dtype),
        tf.constant([num_rows, *np.shape(values)[1:]]),
    )


def oracle(gradients):
    """The sum of squares in float64, duplicates of an index added first."""
    total = 0.0
    for gradient in gradients:
        if isinstance(gradient, tf.IndexedSlices):
            dense = np.zeros(gradient.dense_shape.numpy())
            values = tf.cast(gradient.values, tf.float64)
            np.add.at(dense, gradient.indices.numpy(), values.numpy())
        elif gradient is not None:
            dense = tf.cast(gradient, tf.float64).numpy()
        else:
            continue
        total += np.sum(dense**2)
    return total


@pytest.mark.parametrize("mode", MODES)
class TestSquaredNorm:
    def test_of_dense_gradients_of_any_shape(self, mode):
        random = np.random.default_rng(0)
        shapes = [(), (0,), (7,), (3, 4), (2, 3, 4), (1, 1, 1, 5)]
        gradients = [tf.constant(random.normal(size=s)) for s in shapes]
        result = MODES[mode](gradients)
        assert result.shape == ()
        assert result.dtype == tf.float64
        np.testing.assert_allclose(result, oracle(gradients), rtol=1e-12)

    def test_counts_none_as_zero(self, mode):
        gradients = [None, tf.constant([3.0]), None, tf.constant([[4.0]])]
        assert float(MODES[mode](gradients)) == 25.0

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_small_integers_is_exact(self, mode, dtype):
        # 1 + 4 + 9 + 16 = 30, in any type.
        gradients = [
            tf.constant([1, -2], dtype),
            tf.constant([[3], [4]], dtype),
        ]
        result = MODES[mode](gradients)
        assert float(result) == 30.0
        wide = tf.float64 if dtype == "float64" else tf.float32
        assert result.dtype == wide

    def test_squares_that_overflow_half_precision(self, mode):
        # 300^2 = 90000 is over float16's 65504; 4 of them are 360000.
        gradient = tf.fill([4], tf.constant(300.0, tf.float16))
        assert float(MODES[mode]([gradient])) == 360000.0
        # 1e-4^2 = 1e-8 is under float16's smallest number, 6e-8. Half holds
        # 1e-4 itself to 3 digits.
        gradient = tf.fill([100], tf.constant(1e-4, tf.float16))
        np.testing.assert_allclose(MODES[mode]([gradient]), 1e-6, rtol=1e-3)

    def test_sums_that_half_precision_rounds_away(self, mode):
        # bfloat16 has 8 bits: 256 + 1 = 256. 1000 ones have squared norm 1000.
        gradient = tf.ones([1000], tf.bfloat16)
        assert float(MODES[mode]([gradient])) == 1000.0
        gradient = slices(np.ones([1000, 1]), [2] * 1000, 4, "bfloat16")
        assert float(MODES[mode]([gradient])) == 1000.0**2

    def test_of_mixed_types_is_float32(self, mode):
        # 1 + 4 + 9 + 16 + (2 + 3)^2 = 55.
        gradients = [
            tf.constant([1.0], tf.float16),
            tf.constant([2.0], tf.float64),
            tf.constant([3.0], tf.bfloat16),
            tf.constant([4.0], tf.float32),
            slices([[2.0], [3.0]], [1, 1], 3, "float64"),
        ]
        result = MODES[mode](gradients)
        assert result.dtype == tf.float32
        assert float(result) == 55.0

    @pytest.mark.parametrize("index_dtype", ["int32", "int64"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_repeated_indices(self, mode, dtype, index_dtype):
        # Row 4: (1, 2) + (2, 0) + (-1, 1) = (2, 3); row 0: (5, 1) + (-5, 1) =
        # (0, 2); row 2: (1, 1). Squares: 4 + 9 + 0 + 4 + 1 + 1 = 19.
        gradient = slices(
            [[1, 2], [5, 1], [2, 0], [1, 1], [-1, 1], [-5, 1]],
            [4, 0, 4, 2, 4, 0],
            6,
            dtype,
            index_dtype,
        )
        assert float(MODES[mode]([gradient])) == 19.0
        dense = tf.convert_to_tensor(gradient)
        assert float(MODES[mode]([dense])) == 19.0

    @pytest.mark.parametrize("index_dtype", ["int32", "int64"])
    def test_of_few_rows(self, mode, index_dtype):
        none = slices(np.zeros([0, 2]), [], 5, index_dtype=index_dtype)
        assert float(MODES[mode]([none])) == 0.0
        one = slices([[3.0, 4.0]], [4], 5, index_dtype=index_dtype)
        assert float(MODES[mode]([one])) == 25.0
        assert float(MODES[mode]([none, one, None])) == 25.0

    def test_of_rows_of_higher_rank(self, mode):
        random = np.random.default_rng(1)
        gradient = slices(
            random.normal(size=(50, 3, 2, 4)),
            random.integers(0, 20, size=50),
            20,
            "float64",
        )
        expected = oracle([gradient])
        np.testing.assert_allclose(
            MODES[mode]([gradient]), expected, rtol=1e-12
        )

    def test_of_indices_near_the_ends_of_their_type(self, mode):
        # A table of 2^31 - 1 rows is never made dense: (1 + 2)^2 + 3^2 = 18.
        last = 2**31 - 2
        gradient = slices([[1.0], [3.0], [2.0]], [last, 0, last], 2**31 - 1)
        assert float(MODES[mode]([gradient])) == 18.0

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_shows_what_is_not_finite(self, mode, bad):
        for gradient in (
            tf.constant([1.0, bad]),
            tf.constant([1.0, bad], tf.float16),
            slices([[1.0], [bad], [1.0]], [1, 0, 1], 3),
        ):
            result = float(MODES[mode]([tf.constant([2.0]), gradient]))
            assert not np.isfinite(result)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("gradients", [[], [None], [None, None]])
def test_refuses_no_gradient(gradients, jit_compile):
    message = (
        "The squared norm of no gradient was asked for. "
        "Expected at least one gradient that is not None. "
        f"Received: gradients={gradients}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        norms.squared_norm(gradients, jit_compile=jit_compile)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_unknown_number_of_rows(outer, jit_compile):
    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 2]),
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([None, None]),
        ],
        jit_compile=outer,
    )
    def square(values, indices, dense):
        shape = tf.constant([9, 2])
        gradient = tf.IndexedSlices(values, indices, shape)
        return norms.squared_norm([gradient, dense], jit_compile=jit_compile)

    random = np.random.default_rng(2)
    for num_rows in (0, 1, 2, 40):
        values = random.integers(-5, 6, size=(num_rows, 2)).astype("float32")
        indices = random.integers(0, 9, size=num_rows)
        dense = random.integers(-5, 6, size=(num_rows, 3)).astype("float32")
        expected = oracle([slices(values, indices, 9), tf.constant(dense)])
        assert float(square(values, indices, dense)) == expected


def test_of_the_gradient_of_an_embedding():
    # Each of ids 1, 1, 1, 3 has gradient (2, 2): rows (6, 6) and (2, 2), so
    # 36 + 36 + 4 + 4 = 80, where values that are not added give 4 * 8 = 32.
    table = tf.Variable(tf.ones([5, 2]))
    with tf.GradientTape() as tape:
        loss = 2 * tf.reduce_sum(tf.gather(table, [1, 1, 1, 3]))
    gradient = tape.gradient(loss, table)
    assert isinstance(gradient, tf.IndexedSlices)
    assert float(norms.squared_norm([gradient])) == 80.0


def test_large_gradients_lose_no_digits():
    # Twenty million squares of 0.1: one float32 sum in order would stop
    # growing near 2^24 * 0.01 = 167772. 0.1 itself is 1.5e-8 off in float32.
    gradient = tf.fill([20_000_000], tf.constant(0.1))
    for jit_compile in (False, True):
        result = norms.squared_norm([gradient], jit_compile=jit_compile)
        # XLA adds in fewer partial sums than Eigen's tree.
        np.testing.assert_allclose(
            result, 200_000.0, rtol=1e-3 if jit_compile else 1e-6
        )


entries = st.floats(-1e3, 1e3, width=16)


@st.composite
def gradient_lists(draw):
    gradients = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        rows = draw(st.integers(0, 6))
        values = np.array(
            draw(st.lists(entries, min_size=2 * rows, max_size=2 * rows))
        ).reshape(rows, 2)
        kind = draw(st.sampled_from(["dense", "slices", "none"]))
        if kind == "dense":
            gradients.append(tf.constant(values, dtype))
        elif kind == "slices":
            row = st.integers(0, 3)
            indices = draw(st.lists(row, min_size=rows, max_size=rows))
            gradients.append(slices(values, indices, 4, dtype))
        else:
            gradients.append(None)
    return [*gradients, tf.constant([1.0])]


@given(gradients=gradient_lists())
def test_equals_numpy(gradients):
    result = norms.squared_norm(gradients)
    # Rows that cancel leave the rounding of sums of up to 6 * 1e3.
    np.testing.assert_allclose(result, oracle(gradients), rtol=1e-5, atol=1e-4)


class TestDot:
    def test_by_hand(self):
        # 1 * 5 + 2 * -6 + 3 * 7 = 14.
        left = [tf.constant([1.0, 2.0]), tf.constant([[3.0]])]
        right = [tf.constant([5.0, -6.0]), tf.constant([[7.0]])]
        assert float(norms.dot(left, right)) == 14.0

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_equals_numpy(self, jit_compile):
        random = np.random.default_rng(3)
        left, right = (
            [tf.constant(random.normal(size=s)) for s in ((), (5,), (3, 4))]
            for _ in range(2)
        )
        expected = sum(
            np.sum(a.numpy() * b.numpy()) for a, b in zip(left, right)
        )
        dot = tf.function(norms.dot, jit_compile=jit_compile)
        for result in (norms.dot(left, right), dot(left, right)):
            assert result.dtype == tf.float64
            np.testing.assert_allclose(result, expected, rtol=1e-12)

    def test_of_a_list_with_itself_is_its_squared_norm(self):
        random = np.random.default_rng(4)
        gradients = [tf.constant(random.normal(size=s)) for s in (5, (3, 4))]
        np.testing.assert_allclose(
            norms.dot(gradients, gradients),
            norms.squared_norm(gradients),
            rtol=1e-12,
        )

    def test_half_precision_neither_overflows_nor_rounds(self):
        # 4 * 300 * 300 = 360000 > 65504; 300 ones: bfloat16 stops at 256.
        half = tf.fill([4], tf.constant(300.0, tf.float16))
        result = norms.dot([half], [half])
        assert result.dtype == tf.float32
        assert float(result) == 360000.0
        ones = tf.ones([300], tf.bfloat16)
        assert float(norms.dot([ones], [ones])) == 300.0

    def test_of_mixed_types_is_float32(self):
        left = [tf.constant([2.0], tf.float64), tf.constant([1.0], tf.float64)]
        right = [tf.constant([3.0], tf.float64), tf.constant([4.0], tf.float16)]
        result = norms.dot(left, right)
        assert result.dtype == tf.float32
        assert float(result) == 10.0
