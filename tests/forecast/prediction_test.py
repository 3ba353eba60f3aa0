"""Predictions: closed forms, simulated runs, laws.

With sigma^2 = a mu^2 throughout, r_S = (a + 1) / (a / S + 1), so that
T(S) = T_SI (a / S + 1) / (a + 1).
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import harness
from tf_adascale import forecast

SCALES = [1e-20, 0.5, 1, 1.5, 3, 64, 2**20]


def gain_of(variance, sqnorm, scale):
    return (variance + sqnorm) / (variance / scale + sqnorm)


def constant(variance, sqnorm, *, total=90.0, rows=9):
    """Returns the record of a run with constant moments."""
    tau = np.linspace(total / rows, total, rows)
    moments = (np.full(rows, float(x)) for x in (variance, sqnorm))
    return forecast.Record(tau, *moments)


def decaying(progress):
    """Returns moments whose noise scale grows from 10 to 550."""
    return 5 * math.exp(-2 * progress), 0.5 * math.exp(-6 * progress)


def simulated(scale, *, total, rows_every=1):
    """Runs AdaScale, step by step, on decaying moments.

    Returns:
        Record, and the number of steps.
    """
    averages, tau, steps, rows = np.zeros(2), 0.0, 0, []
    while tau < total:
        steps += 1
        weight = max(min(scale / 1000, 1), 1 / steps)
        averages += weight * (decaying(tau / total) - averages)
        tau += gain_of(*averages, scale)
        if steps % rows_every == 0 or tau >= total:
            rows.append((tau, *averages))
    return forecast.Record(*np.array(rows).T), steps


class TestIterations:
    @pytest.mark.parametrize("scale", SCALES)
    def test_closed_forms(self, scale):
        # As much signal as noise: r_S = 2 / (1/S + 1) = 2 S / (S + 1). All
        # noise: r_S = S. All signal: 1.
        for moments, expected in [
            ((1, 1), 90 * (scale + 1) / (2 * scale)),
            ((3, 0), 90 / scale),
            ((0, 3), 90),
        ]:
            result = forecast.iterations(constant(*moments), scale)
            assert result == pytest.approx(expected, rel=1e-9)

    def test_of_moments_that_vary(self):
        # r_4: 2 / (1/4 + 1) = 8/5, then 3 / (2/4 + 1) = 2, then 1.
        record = forecast.Record(
            *np.array([[8.0, 20.0, 25.0], [1, 2, 0], [1, 1, 1]])
        )
        # 8 / 1.6 + 12 / 2 + 5 / 1.
        assert forecast.iterations(record, 4) == pytest.approx(16, rel=1e-12)

    def test_of_negative_averages(self):
        # estimator="ratio" allows them. r_S = S where sigma^2/S + mu^2 < 0:
        # 5/16 - 2 < 0.
        result = forecast.iterations(constant(5, -2), 16)
        assert result == pytest.approx(90 / 16)

    @pytest.mark.parametrize("total_steps", [0.5, 10, 15, 90, 1234.5])
    def test_total_steps_cut_or_prolong_the_record(self, total_steps):
        record = constant(1, 1)
        before = np.copy(record)
        # r_4 = 2 / (1/4 + 1) = 8/5 everywhere.
        result = forecast.iterations(record, 4, total_steps=total_steps)
        assert result == pytest.approx(total_steps / 1.6, rel=1e-9)
        np.testing.assert_array_equal(record, before)

    def test_total_steps_cut_a_row_where_the_gain_changes(self):
        record, _ = simulated(4, total=100)
        tau = record.scale_invariant_step
        # Ten steps, and a third of the eleventh.
        total_steps = tau[9] + (tau[10] - tau[9]) / 3
        result = forecast.iterations(record, 4, total_steps=total_steps)
        assert result == pytest.approx(10 + 1 / 3, rel=1e-9)

    def test_the_last_gain_holds_beyond_the_record(self):
        record, _ = simulated(4, total=100)
        last, *averages = (column[-1] for column in record)
        result = forecast.iterations(record, 4, total_steps=last + 30)
        beyond = 30 / gain_of(*averages, 4)
        expected = forecast.iterations(record, 4) + beyond
        assert result == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize(
        "scale, rows_every, tolerance",
        # A row stands for the stretch that ends with it. Rows of several steps
        # are less exact if the gain changes within them.
        [(4, 1, 1e-9), (2000, 1, 1e-9), (16, 7, 0.01)],
    )
    def test_at_the_own_scale_are_the_steps_taken(
        self, scale, rows_every, tolerance
    ):
        record, steps = simulated(scale, total=5000, rows_every=rows_every)
        result = forecast.iterations(record, scale)
        assert result == pytest.approx(steps, rel=tolerance)

    @pytest.mark.parametrize("scale", [2, 64])
    def test_equal_the_integral_of_moments_that_change(self, scale):
        tau = np.linspace(0.1, 1500, 15000)
        record = forecast.Record(
            tau, *np.array([decaying(t / 1500) for t in tau]).T
        )
        middle = [decaying(t / 1500) for t in tau - 0.05]
        expected = sum(0.1 / gain_of(*moments, scale) for moments in middle)
        result = forecast.iterations(record, scale)
        assert result == pytest.approx(expected, rel=1e-4)


class TestLaws:
    moments = st.floats(1e-6, 1e6)

    @given(st.floats(0.01, 1e6), st.floats(0.01, 1e6), moments, moments)
    def test_more_hardware_is_never_slower_nor_more_efficient(
        self, one, other, variance, sqnorm
    ):
        at_less, at_more = forecast.rows(
            constant(variance, sqnorm), sorted([one, other])
        )
        rounding = 1 + 1e-9
        assert at_more.iterations <= at_less.iterations * rounding
        assert at_more.efficiency <= at_less.efficiency * rounding

    @given(
        st.lists(
            st.tuples(
                st.floats(0, 1e3), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)
            ),
            min_size=1,
            max_size=20,
        ),
        st.floats(1, 1e6),
    )
    def test_gains_lie_between_one_and_the_scale(self, steps, scale):
        """The bounds hold for all averages, even those that no run has."""
        gains, *averages = np.array(steps).T
        tau = np.cumsum(gains + 0.1)
        result = forecast.iterations(forecast.Record(tau, *averages), scale)
        assert tau[-1] / scale * (1 - 1e-9) <= result <= tau[-1] * (1 + 1e-9)

    @settings(max_examples=20)
    @given(moments, moments, st.floats(1e-3, 0.999))
    def test_the_scale_at_an_efficiency_has_it(
        self, variance, sqnorm, efficiency
    ):
        # r / S = (a + 1) / (a + S) = e at S = (a + 1) / e - a.
        ratio = variance / sqnorm
        expected = (ratio + 1) / efficiency - ratio
        result = forecast.scale_at_efficiency(
            constant(variance, sqnorm), efficiency
        )
        # Bisected to 1e-9 in log2 S; (a + 1) / e - a cancels digits.
        rounding = 1e-9 * max(1, ratio)
        assert result == pytest.approx(expected, rel=1e-8, abs=rounding)


def test_rows_have_the_speedup_over_one_whatever_the_scales():
    rows = forecast.rows(constant(1, 1), [8, 2], total_steps=900)
    # 900 * 9/16 and 900 * 3/4, of 900.
    expected = [(8, 506.25, 16 / 9, 2 / 9), (2, 675, 4 / 3, 2 / 3)]
    np.testing.assert_allclose(rows, expected, rtol=1e-9)
    # 90 * 5/8 = 56.25 of the record's 90.
    (row,) = forecast.rows(constant(1, 1), [4])
    assert row == pytest.approx((4.0, 56.25, 1.6, 0.4), rel=1e-9)


def test_the_scale_at_efficiency_1_is_the_base_batch():
    scale = forecast.scale_at_efficiency(constant(1, 1), 1)
    assert scale == pytest.approx(1, rel=1e-8)


def test_nothing_but_noise_is_efficient_at_every_scale():
    assert forecast.scale_at_efficiency(constant(3, 0), 1) == math.inf


@pytest.mark.parametrize(
    "function, bad",
    [
        *[(forecast.iterations, {"scale": bad}) for bad in (0, math.nan, "4")],
        (forecast.iterations, {"scale": 4, "total_steps": 0}),
        (forecast.rows, {"scales": []}),
        (forecast.scale_at_efficiency, {"efficiency": 0}),
        (forecast.scale_at_efficiency, {"efficiency": 1.1}),
        (forecast.scale_at_efficiency, {"efficiency": "half"}),
    ],
)
def test_arguments_out_of_range_are_refused(function, bad):
    *_, (name, value) = bad.items()
    with harness.refused(f"`{name}` must be", f"{name}={value!r}"):
        function(constant(1, 1), **bad)
