"""The algorithms: their schedules, iterations and optimizers."""

import keras
import numpy as np
import pytest

from examples.common import algorithms, figures, runs
from tests import harness
from tf_adascale import AdaScale, Adasum

# lr(t) = 0.1 * 0.01^(t / 100), T_1 = 100, S = 4 and so T_S = 25.
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.01)


def plan(algorithm, *, optimizer=keras.optimizers.SGD, **kwargs):
    return algorithms.plan(
        algorithm,
        SCHEDULE,
        **{"scales": ((0, 4),), "total_steps": 100, **kwargs},
        make_optimizer=optimizer,
    )


@pytest.mark.parametrize(
    "algorithm, kwargs, iterations, first, last",
    [
        ("identity", {}, 100, 0.1, 0.001),
        ("average", {}, 25, 0.1, 0.001),
        ("adasum", {}, 25, 0.1, 0.001),
        ("linear", {}, 25, 0.4, 0.004),  # 4 lr
        ("sqrt", {}, 25, 0.2, 0.002),  # sqrt(4) lr
        ("lsw", {}, 25, 0.1, 0.004),  # warms up from lr(0) to 4 lr(0)
        ("lsw_plus", {"iterations": 40}, 40, 0.1, 0.004),
    ],
)
def test_fixed_rules(algorithm, kwargs, iterations, first, last):
    fixed = plan(algorithm, **kwargs)
    assert fixed.iterations == iterations
    fixed.optimizer.build([keras.Variable(1.0)])
    rates = []
    for step in (0, iterations):
        fixed.optimizer.iterations.assign(step)
        rates.append(float(fixed.optimizer.learning_rate))
    np.testing.assert_allclose(rates, [first, last], rtol=1e-5)


def test_adascale_keeps_the_schedule_and_stops_by_tau():
    adascale = plan("adascale", smoothing=0.5)
    assert isinstance(adascale.optimizer, AdaScale)
    assert not adascale.optimizer.preconditioned
    assert adascale.optimizer.smoothing == 0.5
    assert float(adascale.optimizer.learning_rate) == pytest.approx(0.1)
    assert adascale.iterations == 100  # At most: the gain is at least 1.
    assert adascale.callbacks(adascale.phases[0])[-1].total_steps == 100


def test_adamscale_is_adascale_for_adam():
    scales = ((0, 4), (0.5, 8))
    adamscale = plan(
        "adamscale", scales=scales, optimizer=keras.optimizers.AdamW
    )
    optimizer = adamscale.optimizer
    assert (optimizer.power, optimizer.preconditioned) == (0.5, True)
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.AdamW)
    assert [phase[:2] for phase in adamscale.phases] == [(4, 50), (8, 100)]


def test_adasum_wraps_the_optimizer():
    adasum = plan("adasum").optimizer
    assert isinstance(adasum, Adasum)
    assert type(adasum.inner_optimizer) is keras.optimizers.SGD
    assert type(plan("average").optimizer) is keras.optimizers.SGD


@pytest.mark.parametrize(
    "algorithm, kwargs, rule, received",
    [
        ("adam", {}, "`algorithm` must be one of (", "algorithm='adam'"),
        (
            "lsw_plus",
            {},
            "`iterations` must be given for lsw_plus",
            "algorithm='lsw_plus', iterations=None",
        ),
        (
            "lsw",
            {"iterations": 40},
            "`iterations` must be given for lsw_plus, and for no other",
            "algorithm='lsw', iterations=40",
        ),
        (
            "sqrt",
            {"scales": ((0, 4), (0.5, 8))},
            "`algorithm` must be one of ('lsw', 'adascale', 'adamscale') if",
            "algorithm='sqrt', scales=((0, 4), (0.5, 8))",
        ),
    ],
)
def test_refused(algorithm, kwargs, rule, received):
    with harness.refused(rule, received):
        plan(algorithm, **kwargs)


def test_all_algorithms_have_a_title_and_a_color():
    assert runs.TITLES.keys() == set(algorithms.ALGORITHMS)
    assert figures.COLORS.keys() == set(algorithms.ALGORITHMS)
