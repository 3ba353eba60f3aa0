"""Golden cases: gradient samples with moments and gain computed by hand.

The same rows drive the tests of the pure functions, the replicas and `fit`.
Every sample is a list of two gradients of the shapes in `SHAPES`, so one model
of two variables serves all rows. A loss that is linear in the weights, with a
sample's entries as coefficients, has that sample as its gradient. All entries
are small integers, so every sum below is exact in float32.

The moments are the ones that an optimizer shows after one step, with their
floors applied; a variance of 0 stands for its floor, 1e-30. In the comments,
"raw" is an estimate before its floor.

    A = mean of |g_i|^2,    T = |mean of g_i|^2
    variance = S / (n - 1) (A - T),    sqnorm = T - variance / S
    gain = (variance + sqnorm) / (variance / S + sqnorm)
"""

from typing import NamedTuple

import numpy as np

SHAPES = ((2,), (1, 1))


class Row(NamedTuple):
    """Gradient samples of one step and what follows from them.

    Attributes:
        name: str, an identifier for `pytest.mark.parametrize`.
        samples: list of n samples, each a list of arrays of shapes `SHAPES`.
        scale: number, S, or None for S = n.
        variance: float, sigma^2 at the base batch, after its floor.
        sqnorm: float, mu^2, after its floor.
        gain: float, r.
    """

    name: str
    samples: list
    scale: float | None
    variance: float
    sqnorm: float
    gain: float

    @property
    def num_samples(self):
        """int, n."""
        return len(self.samples)

    @property
    def resolved_scale(self):
        """Number, S. Default: n."""
        return self.num_samples if self.scale is None else self.scale

    @property
    def mean_gradient(self):
        """List of arrays of shapes `SHAPES`."""
        return [np.mean(entries, axis=0) for entries in zip(*self.samples)]


def _sample(first, second, third):
    return [
        np.array([first, second], "float32"),
        np.array([[third]], "float32"),
    ]


_OPPOSITE = [_sample(1, 2, 2), _sample(-1, -2, -2)]
_ORTHOGONAL = [_sample(4, 0, 0), _sample(0, 2, 2)]
_EQUAL = [_sample(1, 2, 2), _sample(1, 2, 2)]
_BETWEEN = [_sample(4, 0, 0), _sample(4, 4, 0)]
_ORTHOGONAL_THREE = [_sample(3, 0, 0), _sample(0, 3, 0), _sample(0, 0, 3)]
_AROUND = [
    _sample(2, 2, 0),
    _sample(2, -2, 0),
    _sample(2, 0, 2),
    _sample(2, 0, -2),
]
_TWO_OPPOSITE_PAIRS = [
    _sample(3, 0, 0),
    _sample(-3, 0, 0),
    _sample(0, 0, 1),
    _sample(0, 0, -1),
]

ROWS = [
    # A = 9, T = 0: variance = 2 (9 - 0) = 18, sqnorm raw = 0 - 18/2 = -9.
    # Nothing but noise: gain = 18 / (18/2) = 2 = S.
    Row("opposite", _OPPOSITE, None, 18.0, 0.0, 2.0),
    # A = (16 + 8)/2 = 12, mean = (2, 1, 1), T = 6: variance = 2 (12 - 6) = 12,
    # sqnorm = 6 - 12/2 = 0, which is the inner product of the two samples.
    # gain = 12 / (12/2) = 2 = S.
    Row("orthogonal", _ORTHOGONAL, None, 12.0, 0.0, 2.0),
    # A = T = 9: variance raw = 0, sqnorm = 9. No noise: gain = 9 / 9 = 1.
    Row("equal", _EQUAL, None, 0.0, 9.0, 1.0),
    # A = (16 + 32)/2 = 24, mean = (4, 2, 0), T = 20:
    # variance = 2 (24 - 20) = 8, sqnorm = 20 - 8/2 = 16.
    # gain = (8 + 16) / (4 + 16) = 24/20 = A/T = 1.2.
    Row("between", _BETWEEN, None, 8.0, 16.0, 1.2),
    # A = 9, mean = (1, 1, 1), T = 3: variance = 3/2 (9 - 3) = 9,
    # sqnorm = 3 - 9/3 = 0. gain = 9 / (9/3) = 3 = S.
    Row("three_orthogonal", _ORTHOGONAL_THREE, None, 9.0, 0.0, 3.0),
    # A = 8, mean = (2, 0, 0), T = 4: variance = 4/3 (8 - 4) = 16/3,
    # sqnorm = 4 - 4/3 = 8/3. gain = (24/3) / (4/3 + 8/3) = 8/4 = A/T = 2.
    Row("four_around", _AROUND, None, 16 / 3, 8 / 3, 2.0),
    # A = (9 + 9 + 1 + 1)/4 = 5, T = 0: variance = 4/3 (5 - 0) = 20/3,
    # sqnorm raw = 0 - 5/3. gain = (20/3) / (5/3) = 4 = S.
    Row("four_in_opposite_pairs", _TWO_OPPOSITE_PAIRS, None, 20 / 3, 0.0, 4.0),
    # No noise: variance raw = 4/3 (9 - 9) = 0, sqnorm = 9, gain = 9 / 9 = 1.
    Row("four_equal", _EQUAL + _EQUAL, None, 0.0, 9.0, 1.0),
    # "opposite" with 8 base batches in each sample, S = 16:
    # variance = 16 (9 - 0) = 144, sqnorm raw = 0 - 144/16 = -9.
    # gain = 144 / (144/16) = 16 = S.
    Row("opposite_at_16", _OPPOSITE, 16, 144.0, 0.0, 16.0),
    # "equal" at S = 16: still no noise, gain 1.
    Row("equal_at_16", _EQUAL, 16, 0.0, 9.0, 1.0),
    # "between" at S = 6: variance = 6 (24 - 20) = 24, sqnorm = 20 - 24/6 = 16.
    # gain = (24 + 16) / (4 + 16) = 2.
    Row("between_at_6", _BETWEEN, 6, 24.0, 16.0, 2.0),
    # "four_around" at S = 8: variance = 8/3 (8 - 4) = 32/3,
    # sqnorm = 4 - 4/3 = 8/3. gain = (40/3) / (4/3 + 8/3) = 10/3.
    Row("four_around_at_8", _AROUND, 8, 32 / 3, 8 / 3, 10 / 3),
    # "three_orthogonal" at S = 1.5: variance = 1.5/2 (9 - 3) = 4.5,
    # sqnorm = 3 - 4.5/1.5 = 0. gain = 4.5 / 3 = 1.5 = S.
    Row("three_orthogonal_at_1.5", _ORTHOGONAL_THREE, 1.5, 4.5, 0.0, 1.5),
    # "between" at S = 1, the base batch split in two: variance = 24 - 20 = 4,
    # sqnorm = 20 - 4 = 16. gain = 20 / 20 = 1, whatever the gradients.
    Row("between_at_1", _BETWEEN, 1, 4.0, 16.0, 1.0),
    # "opposite" at S = 1: variance = 9, sqnorm raw = -9. gain = 9 / 9 = 1.
    Row("opposite_at_1", _OPPOSITE, 1, 9.0, 0.0, 1.0),
    # "between" at S = 1/2, half a base batch: variance = 1/2 (24 - 20) = 2,
    # sqnorm = 20 - 2/(1/2) = 16. gain = (2 + 16) / (4 + 16) = 0.9.
    Row("between_at_half", _BETWEEN, 0.5, 2.0, 16.0, 0.9),
    # "opposite" at S = 1/2: variance = 1/2 (9 - 0) = 4.5, sqnorm raw = -9.
    # gain = 4.5 / (4.5/(1/2)) = 0.5 = S.
    Row("opposite_at_half", _OPPOSITE, 0.5, 4.5, 0.0, 0.5),
    # "equal" at S = 1/2: no noise, gain 1.
    Row("equal_at_half", _EQUAL, 0.5, 0.0, 9.0, 1.0),
]


class AdasumRow(NamedTuple):
    """Vectors and their Adasum.

    Attributes:
        name: str, an identifier for `pytest.mark.parametrize`.
        samples: list of n vectors of three entries.
        expected: list of three entries.
    """

    name: str
    samples: list
    expected: list

    @property
    def largest(self):
        """float, the largest magnitude of an entry."""
        return float(np.max(np.abs(self.samples)))


ADASUM_ROWS = [
    # a.b = 0: a + b.
    AdasumRow("orthogonal", [[4, 0, 0], [0, 2, 2]], [4, 2, 2]),
    # 1 - 9 / (2 * 9) = 1/2 each: the mean.
    AdasumRow("equal", [[1, 2, 2], [1, 2, 2]], [1, 2, 2]),
    # a and 3 a: (1 - 3/2) a + (1 - 3/18) 3 a = -a/2 + 5a/2 = 2 a: the mean.
    AdasumRow("parallel", [[1, 2, 2], [3, 6, 6]], [2, 4, 4]),
    # 1 + 1/2 each, which cancel.
    AdasumRow("opposite", [[1, 2, 2], [-1, -2, -2]], [0, 0, 0]),
    # a.b = 16, |a|^2 = 16, |b|^2 = 32: a/2 + 3b/4.
    AdasumRow("between", [[4, 0, 0], [4, 4, 0]], [5, 3, 0]),
    # Two levels, and the odd one: 3 + 3 + 3.
    AdasumRow(
        "three_orthogonal",
        [[3, 0, 0], [0, 3, 0], [0, 0, 3]],
        [3, 3, 3],
    ),
    # (a + a)/2 = a, and again.
    AdasumRow("three_equal", [[1, 2, 2]] * 3, [1, 2, 2]),
    # The two that cancel leave the third alone.
    AdasumRow(
        "two_opposite_and_one",
        [[1, 2, 2], [-1, -2, -2], [0, 4, 0]],
        [0, 4, 0],
    ),
    # (3, 0, 0) and its opposite, (0, 0, 1) and its opposite.
    AdasumRow(
        "four_in_opposite_pairs",
        [[3, 0, 0], [-3, 0, 0], [0, 0, 1], [0, 0, -1]],
        [0, 0, 0],
    ),
    # The pair (2, 2, 0), (2, -2, 0) is orthogonal and makes (4, 0, 0), and so
    # does the pair (2, 0, 2), (2, 0, -2). Equal nodes make their mean,
    # (4, 0, 0). The mean of all four is (2, 0, 0).
    AdasumRow(
        "four_around",
        [[2, 2, 0], [2, -2, 0], [2, 0, 2], [2, 0, -2]],
        [4, 0, 0],
    ),
    # The same in another order: (2, 2, 0) and (2, 0, 2) have the product 4 and
    # squared norms of 8, so 3/4 each: (3, 1.5, 1.5); the others make
    # (3, -1.5, -1.5). Product 4.5, squared norms 13.5, so 5/6 each.
    AdasumRow(
        "four_around_in_another_order",
        [[2, 2, 0], [2, 0, 2], [2, -2, 0], [2, 0, -2]],
        [5, 0, 0],
    ),
    AdasumRow("one", [[1, -2, 3]], [1, -2, 3]),
    AdasumRow("one_of_two_is_zero", [[0, 0, 0], [1, -2, 3]], [1, -2, 3]),
]
