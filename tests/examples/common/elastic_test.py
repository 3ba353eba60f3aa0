"""A scale that changes during training."""

import keras
import numpy as np
import pytest

from examples.common import elastic
from tests import harness
from tf_adascale import schedules

DECAY = keras.optimizers.schedules.PiecewiseConstantDecay(
    [150, 300], [1.0, 0.1, 0.01]
)


def test_parse():
    assert elastic.parse("0:4,0.25:8,0.5:16") == (
        (0.0, 4),
        (0.25, 8),
        (0.5, 16),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "0:4,0.5",
        "0:4:8",
        "0.1:4",  # Nothing before 0.1.
        "0:4,0:8",
        "0:4,0.5:8,0.25:4",
        "0:4,1:8",
        "0:0",
        "0:4.5",
        "0:4,nan:8",
    ],
)
def test_other_texts_are_refused(text):
    with harness.refused(
        "`elastic` must be pairs fraction:scale", f"elastic={text!r}"
    ):
        elastic.parse(text)


def test_iterations_of_the_paper():
    # Table 2, imagenet: T = 451k, S = 32, 64, 128 from 0, 1/4 and 1/2.
    # Up: 112.75k/32 + 112.75k/64 + 225.5k/128 = 3524 + 1762 + 1762 = 7.04k.
    up = elastic.fixed_phases(((0, 32), (0.25, 64), (0.5, 128)), 451_000)
    assert up[-1].last_iteration == pytest.approx(7040, abs=10)
    # Down: 112.75k/128 + 112.75k/64 + 225.5k/32 = 881 + 1762 + 7047 = 9.68k.
    down = elastic.fixed_phases(((0, 128), (0.25, 64), (0.5, 32)), 451_000)
    assert down[-1].last_iteration == pytest.approx(9680, abs=10)
    assert [phase.end for phase in up] == [112_750, 225_500, 451_000]


def test_rates_by_hand():
    # 400 base steps: 100 / 4 = 25 and 300 / 10 = 30 iterations, W = 3 (0.055 of
    # 55 is 3.025).
    schedule = elastic.LinearScalingWithWarmup(
        DECAY, ((0, 4), (0.25, 10)), total_steps=400
    )
    rates = {t: float(schedule(t)) for t in (0, 1, 3, 24, 25, 30, 31, 45, 46)}
    expected = {
        0: 1.0,
        1: 2.0,  # 1 + (4 - 1) / 3
        3: 4.0,
        24: 4.0,  # base step 96
        25: 10.0,  # base step 100
        30: 10.0,  # base step 150, the last one at the first rate
        31: 1.0,  # base step 160: 10 * 0.1
        45: 1.0,  # base step 300
        46: 0.1,
    }
    assert rates == pytest.approx(expected)


def test_one_scale_is_the_librarys_rule():
    ours = elastic.LinearScalingWithWarmup(DECAY, ((0, 8),), total_steps=400)
    fixed = schedules.LinearScalingWithWarmup(DECAY, scale=8, total_steps=400)
    assert ours.phases[-1].last_iteration == fixed.iterations
    np.testing.assert_allclose(
        [float(ours(t)) for t in range(50)],
        [float(fixed(t)) for t in range(50)],
        rtol=1e-6,
    )


def test_config_round_trip():
    schedule = elastic.LinearScalingWithWarmup(
        DECAY, ((0, 4), (0.5, 8)), total_steps=400
    )
    copy = type(schedule).from_config(schedule.get_config())
    assert [float(copy(t)) for t in range(0, 60, 7)] == [
        float(schedule(t)) for t in range(0, 60, 7)
    ]
