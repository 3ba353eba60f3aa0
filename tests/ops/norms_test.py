"""Squared norms of gradients of every kind against dense ones and NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tests import harness
from tf_adascale.ops import norms

DTYPES = ["float16", "bfloat16", "float32", "float64"]

# Ways to compute the same number.
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
    """Returns the sum of squares in float64, of slices added by index."""
    total = 0.0
    for gradient in filter(lambda g: g is not None, gradients):
        if isinstance(gradient, tf.IndexedSlices):
            dense = np.zeros(gradient.dense_shape.numpy())
            values = tf.cast(gradient.values, tf.float64)
            np.add.at(dense, gradient.indices.numpy(), values.numpy())
        else:
            dense = tf.cast(gradient, tf.float64).numpy()
        total += np.sum(dense**2)
    return total


@pytest.mark.parametrize("mode", MODES)
class TestSquaredNorm:
    def test_of_gradients_of_any_shape(self, mode):
        random = np.random.default_rng(0)
        shapes = [(), (0,), (7,), (3, 4), (2, 3, 4), (1, 1, 1, 5)]
        gradients = [tf.constant(random.normal(size=s)) for s in shapes]
        rows = random.normal(size=(50, 3, 2, 4))
        indices = random.integers(0, 20, size=50)
        gradients += [slices(rows, indices, 20, "float64"), None]
        result = MODES[mode](gradients)
        assert result.shape == ()
        assert result.dtype == tf.float64
        np.testing.assert_allclose(result, oracle(gradients), rtol=1e-12)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_small_integers_is_exact(self, mode, dtype):
        # Row 4: (1, 2) + (2, 0) + (-1, 1) = (2, 3); row 0: (5, 1) + (-5, 1) =
        # (0, 2); row 2: (1, 1). Squares: 4 + 9 + 0 + 4 + 1 + 1 = 19. Beside it
        # 1 + 4 + 9 + 16 = 30.
        values = [[1, 2], [5, 1], [2, 0], [1, 1], [-1, 1], [-5, 1]]
        gradients = [
            slices(values, [4, 0, 4, 2, 4, 0], 6, dtype, "int64"),
            tf.constant([1, -2], dtype),
            tf.constant([[3], [4]], dtype),
        ]
        result = MODES[mode](gradients)
        assert float(result) == 49.0
        assert result.dtype == ("float64" if dtype == "float64" else "float32")

    def test_of_half_precision_neither_overflows_nor_vanishes(self, mode):
        # 300^2 = 90000 is over float16's 65504; 4 of them are 360000.
        gradient = tf.fill([4], tf.constant(300.0, tf.float16))
        assert float(MODES[mode]([gradient])) == 360000.0
        # 1e-4^2 = 1e-8 is under float16's smallest number, 6e-8. float16 holds
        # 1e-4 itself to 3 digits.
        gradient = tf.fill([100], tf.constant(1e-4, tf.float16))
        np.testing.assert_allclose(MODES[mode]([gradient]), 1e-6, rtol=1e-3)

    def test_of_half_precision_adds_in_float32(self, mode):
        # bfloat16 has 8 bits: 256 + 1 = 256. 1000 ones have squared norm 1000,
        # and 1000 ones of one index 1000^2.
        gradients = [
            tf.ones([1000], tf.bfloat16),
            slices(np.ones([1000, 1]), [2] * 1000, 4, "bfloat16"),
        ]
        assert float(MODES[mode](gradients)) == 1000 + 1000.0**2

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

    def test_of_few_rows(self, mode):
        none = slices(np.zeros([0, 2]), [], 5)
        assert float(MODES[mode]([none])) == 0.0
        one = slices([[3.0, 4.0]], [4], 5)
        assert float(MODES[mode]([none, one, None])) == 25.0

    def test_of_indices_near_the_ends_of_their_type(self, mode):
        # A table of 2^31 - 1 rows is never made dense: (1 + 2)^2 + 3^2 = 18.
        last = 2**31 - 2
        gradient = slices([[1.0], [3.0], [2.0]], [last, 0, last], 2**31 - 1)
        assert float(MODES[mode]([gradient])) == 18.0

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_shows_what_is_not_finite(self, mode, bad):
        for gradient in (
            tf.constant([1.0, bad]),
            slices([[1.0], [bad], [1.0]], [1, 0, 1], 3),
        ):
            result = float(MODES[mode]([tf.constant([2.0]), gradient]))
            assert not np.isfinite(result)


@pytest.mark.parametrize("gradients", [[], [None, None]])
def test_no_gradient_is_refused(gradients):
    for jit_compile in (False, True):
        with harness.refused("`gradients` must", f"gradients={gradients}"):
            norms.squared_norm(gradients, jit_compile=jit_compile)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_of_an_unknown_number_of_rows(outer, jit_compile):
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
    for num_rows in (0, 1, 40):
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
        # XLA adds in fewer partial sums than Eigen.
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
def test_the_squared_norm_of_any_gradients_is_numpys(gradients):
    result = norms.squared_norm(gradients)
    # Rows that cancel leave rounding errors of sums of up to 6 * 1e3.
    np.testing.assert_allclose(result, oracle(gradients), rtol=1e-5, atol=1e-4)


class TestDot:
    def test_by_hand(self):
        # 1 * 5 + 2 * -6 + 3 * 7 = 14.
        left = [tf.constant([1.0, 2.0]), tf.constant([[3.0]])]
        right = [tf.constant([5.0, -6.0]), tf.constant([[7.0]])]
        assert float(norms.dot(left, right)) == 14.0

    def test_is_numpys_in_every_mode(self):
        random = np.random.default_rng(3)
        shapes = [(), (5,), (3, 4)]
        left, right = (
            [random.normal(size=shape) for shape in shapes] for _ in range(2)
        )
        expected = sum(np.sum(a * b) for a, b in zip(left, right))
        left, right = ([tf.constant(x) for x in xs] for xs in (left, right))
        compiled = tf.function(norms.dot, jit_compile=True)
        for dot in (norms.dot, tf.function(norms.dot), compiled):
            result = dot(left, right)
            assert result.dtype == tf.float64
            np.testing.assert_allclose(result, expected, rtol=1e-12)

    def test_of_half_precision_neither_overflows_nor_rounds(self):
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


def test_deduplicated_slices_keep_their_number_and_their_sums():
    # Index 3: 1 + 4 = 5; index 0: 2; and a slice of 0 at index 0 is left over.
    gradient = norms.deduplicated(slices([[1.0], [2.0], [4.0]], [3, 0, 3], 5))
    assert gradient.indices.numpy().tolist() == [0, 3, 0]
    assert gradient.values.numpy().tolist() == [[2.0], [5.0], [0.0]]
    assert gradient.dense_shape.numpy().tolist() == [5, 1]
