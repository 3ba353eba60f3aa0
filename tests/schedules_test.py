"""Schedules of fixed scaling rules: closed forms, an oracle, use in Keras."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale import schedules
from tf_adascale.schedules import (
    LegwScaling,
    LinearScaling,
    LinearScalingWithWarmup,
    SqrtScaling,
    TimeScaling,
)

# Keras evaluates its schedules in float32. The rounding of the exponent (6e-8
# of up to log(1000)), of pow and of two products stays below 1e-6.
TOLERANCE = 1e-6

TOTAL_STEPS = 1501  # Not a multiple of the scales, except 1.
SCALES = (1, 2.5, 64)


def drop(boundary, rates=(0.5, 0.25)):
    """A schedule that drops after a step."""
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [boundary], list(rates)
    )


def exponential(total_steps, rate=0.08, decay=0.0133):
    """The exponential family of table 3: rate decay^(t / total_steps)."""
    return keras.optimizers.schedules.ExponentialDecay(rate, total_steps, decay)


def step_decay(total_steps, rate=0.08, decay=0.1):
    """The step family of table 3: rate decay^(number of boundaries below t)."""
    boundaries = [total_steps // 2, total_steps * 4 // 5]
    values = [rate, rate * decay, rate * decay**2]
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)


FAMILIES = {"exponential": exponential, "step": step_decay}


def run(schedule, iterations):
    """Returns the rates of a whole run, computed in a graph."""
    rates = tf.function(
        lambda ts: tf.map_fn(schedule, ts, fn_output_signature=tf.float32)
    )
    return rates(tf.range(iterations, dtype=tf.int64)).numpy()


@pytest.mark.parametrize(
    "total_steps, scale, expected",
    [
        (1500, 1, 1500),
        (1500, 4, 375),  # Divides.
        (1500, 64, 24),  # 23.4.
        (10, 64, 1),
        (10, 2.5, 4),
        (10, 0.5, 20),
        (21, 0.7, 30),  # In floats 30.000000000000004.
        (2**60 + 1, 2, 2**59 + 1),  # float64 has no 2^60 + 1.
    ],
)
def test_scaled_iterations_are_rounded_up(total_steps, scale, expected):
    assert schedules.scaled_iterations(total_steps, scale=scale) == expected


def lsw(schedule, *, total_steps=32, scale=4, warmup=0.25, **arguments):
    """Returns LSW; by default T_S = 32 / 4 = 8 and W = 0.25 * 8 = 2."""
    return LinearScalingWithWarmup(
        schedule,
        scale=scale,
        total_steps=total_steps,
        warmup=warmup,
        **arguments,
    )


@pytest.mark.parametrize(
    "schedule, expected",
    [
        # lr drops after base step 8: 4 t > 8 from t = 3 on; 4 / 2, 4 / 4.
        (LinearScaling(drop(8), scale=4), [2, 2, 2, 1, 1]),
        # 2.5 t = 0, 2.5, 5, 7.5; lr halves every 5: 2.5 2^(-t / 2).
        (
            LinearScaling(exponential(5, rate=1.0, decay=0.5), scale=2.5),
            2.5 * 0.5 ** (np.arange(4) / 2),
        ),
        # 0.1 t > 3 from t = 31 on; in floats 30 * 0.1 is 3.0000000000000004.
        (LinearScaling(drop(3, [1.0, 0.0]), scale=0.1), [0.1] * 31 + [0] * 3),
        (TimeScaling(drop(8), scale=4), [0.5, 0.5, 0.5, 0.25]),
        # sqrt(16) = 4; 16 t > 16 from t = 2 on.
        (SqrtScaling(drop(16), scale=16), [2, 2, 1]),
        # The same times t / 4.
        (
            LegwScaling(drop(16), scale=16, warmup_steps=4),
            [0, 0.5, 0.5, 0.75, 1, 1],
        ),
        (LegwScaling(drop(16), scale=16, warmup_steps=0), [2, 2, 1]),
        # 0.5 (1 + 3 t / 2) = 0.5, 1.25; then 4 lr(4 t), 4 t > 20 at t = 6.
        (lsw(drop(20)), [0.5, 1.25, 2, 2, 2, 2, 1, 1]),
        # 4 t > 4 at t = 2, where the warm-up would reach 2.
        (lsw(drop(4)), [0.5, 1.25, 1, 1]),
        # lr(t) = 2^(-t / 32): 1, 2.5, then 4 2^(-(t - 2) / 6), to 4 lr(32).
        (
            lsw(exponential(32, rate=1.0, decay=0.5)),
            [1, 2.5, *(4 * 0.5 ** (np.arange(7) / 6))],
        ),
        # T_S = 4, W = 2: 0.5, 0.5 (1 + 7 / 2), then 8 * 0.5.
        (lsw(0.5, scale=8, warmup=0.5), [0.5, 2.25, 4, 4]),
        # T_S = 1 and W = round(0.9) = 1: an iteration at lr(0), then S lr(0).
        (lsw(exponential(8), scale=8, total_steps=8, warmup=0.9), [0.08, 0.64]),
        # At S = 1 W = round(5.5) = 6 iterations at lr(0), then compressed.
        (
            lsw(exponential(100), scale=1, total_steps=100, warmup=0.055),
            [0.08] * 7 + [0.08 * 0.0133 ** (1 / 94)],
        ),
        # LSW of drop(20) stretched to 16 iterations, twice as many, so W = 4:
        # 0.5 (1 + 3 t / 4); 4 t / 2 > 20 from t = 11 on.
        (
            lsw(drop(20), iterations=16),
            [0.5, 0.875, 1.25, 1.625] + [2] * 7 + [1] * 5,
        ),
    ],
)
def test_closed_forms(schedule, expected):
    np.testing.assert_allclose(
        run(schedule, len(expected)), expected, rtol=TOLERANCE
    )


def test_lsw_plus_of_a_scale_with_sixteen_digits():
    # S T_S / iterations is 0.3333333333333333 * 45001 / 90001, a fraction whose
    # numerator, 1.5e20, no integer type holds. Times t it is 14999.999996 at
    # t = 89999 and 15000.17 at t = 90000.
    schedule = lsw(
        drop(15000, [3.0, 0.0]),
        scale=1 / 3,
        total_steps=15000,
        iterations=90001,
    )
    assert schedules.scaled_iterations(15000, scale=1 / 3) == 45001
    np.testing.assert_allclose(schedule(89999), 1.0, rtol=TOLERANCE)
    assert schedule(90000) == 0


@pytest.mark.parametrize("family", FAMILIES)
class TestOracle:
    def rate(self, family, t, total_steps=TOTAL_STEPS):
        """The schedules of `FAMILIES` at real steps t, in float64."""
        if family == "exponential":
            return 0.08 * 0.0133 ** (t / total_steps)
        return 0.08 * 0.1 ** (
            1.0 * (t > total_steps // 2) + (t > total_steps * 4 // 5)
        )

    def lsw_rate(self, family, scale, t):
        """Appendix B.2 at real iterations t, in float64."""
        iterations = math.ceil(TOTAL_STEPS / scale)
        start = round(0.055 * iterations)
        warming = self.rate(family, 0.0) * (1 + (scale - 1) * t / start)
        base_step = scale * t
        if family == "exponential":
            base_step = TOTAL_STEPS * (t - start) / (iterations - start)
        scaled = scale * self.rate(family, base_step)
        return np.where(t < start, warming, scaled)

    @pytest.mark.parametrize("scale", SCALES)
    def test_rules_without_a_warmup(self, family, scale):
        base = FAMILIES[family](TOTAL_STEPS)
        t = np.arange(math.ceil(TOTAL_STEPS / scale))
        for rule, factor in (
            (LinearScaling, scale),
            (SqrtScaling, scale**0.5),
            (TimeScaling, 1),
        ):
            np.testing.assert_allclose(
                run(rule(base, scale=scale), len(t)),
                factor * self.rate(family, scale * t),
                rtol=TOLERANCE,
            )

    @pytest.mark.parametrize(
        "scale, iterations",
        [
            *[(scale, None) for scale in SCALES],
            # LSW+: T_S = 24, so position is t 24 / iterations. 17 shrinks.
            (64, 17),
            (64, 68),
        ],
    )
    def test_linear_scaling_with_warmup(self, family, scale, iterations):
        schedule = LinearScalingWithWarmup(
            FAMILIES[family](TOTAL_STEPS),
            scale=scale,
            total_steps=TOTAL_STEPS,
            iterations=iterations,
        )
        unstretched = math.ceil(TOTAL_STEPS / scale)
        assert schedule.iterations == (iterations or unstretched)
        t = np.arange(schedule.iterations) * unstretched / schedule.iterations
        np.testing.assert_allclose(
            run(schedule, schedule.iterations),
            self.lsw_rate(family, scale, t),
            rtol=TOLERANCE,
        )

    def test_scale_1_is_the_wrapped_schedule_to_the_bit(self, family):
        base = FAMILIES[family](100)
        for schedule in (
            LinearScaling(base, scale=1),
            SqrtScaling(base, scale=1),
            TimeScaling(base, scale=1),
            LegwScaling(base, scale=1, warmup_steps=0),
            lsw(base, scale=1, total_steps=100, warmup=0),
        ):
            np.testing.assert_array_equal(run(schedule, 20), run(base, 20))


EXAMPLES = {
    "linear": LinearScaling(exponential(1500), scale=2.5),
    "sqrt, constant": SqrtScaling(0.1, scale=7),
    "time": TimeScaling(exponential(1500), scale=7),
    "legw": LegwScaling(exponential(1500), scale=8, warmup_steps=20),
    "lsw": LinearScalingWithWarmup(
        step_decay(1500), scale=8, total_steps=1500, warmup=0.1
    ),
    "lsw+": LinearScalingWithWarmup(
        keras.optimizers.schedules.CosineDecay(0.1, 1500),
        scale=8,
        total_steps=1500,
        iterations=300,
        family="exponential",
    ),
    "nested": SqrtScaling(LinearScaling(exponential(1500), scale=3), scale=2),
}


@pytest.mark.parametrize("name", EXAMPLES)
class TestKerasContract:
    def test_round_trip(self, name):
        schedule = EXAMPLES[name]
        config = keras.optimizers.schedules.serialize(schedule)
        assert config["registered_name"].startswith("tf_adascale>")
        restored = keras.optimizers.schedules.deserialize(config)
        assert config == keras.optimizers.schedules.serialize(schedule)
        assert type(restored) is type(schedule)
        assert restored.get_config() == schedule.get_config()
        for t in (0, 3, 187):
            assert restored(t) == schedule(t)

    def test_eager_graph_and_xla_agree(self, name):
        schedule = EXAMPLES[name]
        graph = tf.function(schedule)
        compiled = tf.function(schedule, jit_compile=True)
        for t in (0, 3, 187, 10**6):
            step = tf.constant(t, tf.int64)
            eager = schedule(step)
            assert eager.dtype == tf.float32
            assert eager.shape == ()
            for same in (t, float(t), tf.constant(t, tf.int32)):
                np.testing.assert_array_equal(schedule(same), eager)
            # Graphs reorder constant factors, and XLA has its own pow.
            np.testing.assert_allclose(graph(step), eager, rtol=TOLERANCE)
            np.testing.assert_allclose(compiled(step), eager, rtol=TOLERANCE)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_schedule_drives_an_optimizer_also_of_a_saved_model(
    num_replicas, tmp_path
):
    schedule = EXAMPLES["lsw"]
    with harness.strategy_of(num_replicas).scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(schedule), "mae")
    before = model.get_weights()[1]
    ones = np.ones((12, 1), np.float32)
    harness.fit(model, ones, 1000 * ones, batch_size=4)
    # The bias's gradient is -1 at every step, so it moves by the rates.
    moved = model.get_weights()[1] - before
    np.testing.assert_allclose(moved, [run(schedule, 3).sum()], rtol=TOLERANCE)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    assert restored.optimizer.learning_rate == schedule(3)


class TestExactness:
    """Steps far beyond 2^24, where float32 skips whole numbers."""

    @pytest.mark.parametrize("scale", [3, 1.5])
    def test_of_a_boundary(self, scale):
        # S t meets the boundary at t = 2^27 and exceeds it an iteration later.
        decay = drop(int(scale * 2**27), [1.0, 0.0])
        schedule = LinearScaling(decay, scale=scale)
        for call in (schedule, tf.function(schedule, jit_compile=True)):
            assert call(tf.constant(2**27, tf.int64)) > 0
            assert call(tf.constant(2**27 + 1, tf.int64)) == 0

    @pytest.mark.parametrize("stretch", [1, 3])
    def test_of_a_boundary_after_a_warmup(self, stretch):
        # T_S = 2^28 for any W. S t / stretch meets 2^29 at t = 2^27 stretch.
        schedule = lsw(
            drop(2**29, [1.0, 0.0]),
            total_steps=2**30,
            iterations=stretch * 2**28,
        )
        assert schedule(stretch * 2**27) == 4
        assert schedule(stretch * 2**27 + 1) == 0

    def test_of_the_steps_that_a_wrapped_schedule_gets(self):
        class LastBits(keras.optimizers.schedules.LearningRateSchedule):
            def __call__(self, step):
                assert step.dtype == tf.int64
                return tf.cast(step % 1000, tf.float32)

        schedule = LinearScaling(LastBits(), scale=3)
        # 3 (3 (2^40 + 1) mod 1000), from 2^40 = 1099511627776: 331.
        assert schedule(2**40 + 1) == 3 * 331


@pytest.mark.parametrize(
    "schedule, passed, family",
    [
        (0.1, None, "step"),
        (step_decay(10), None, "step"),
        (exponential(10), None, "exponential"),
        (
            keras.optimizers.schedules.ExponentialDecay(
                0.1, 5, 0.5, staircase=True
            ),
            None,
            "step",
        ),
        (exponential(10), "step", "step"),
    ],
)
def test_the_family_is_told_by_the_schedule_or_passed(schedule, passed, family):
    assert lsw(schedule, family=passed).family == family


BAD = [
    *[(rule, {"scale": 0}) for rule in (LinearScaling, SqrtScaling)],
    (TimeScaling, {"scale": math.nan}),
    (LegwScaling, {"scale": -1, "warmup_steps": 1}),
    (LegwScaling, {"warmup_steps": -1}),
    (lsw, {"scale": "4"}),
    (lsw, {"total_steps": 1.5}),
    (lsw, {"iterations": 0}),
    (lsw, {"warmup": 1}),
    (lsw, {"family": "cosine"}),
    *[(LinearScaling, {"schedule": bad}) for bad in (None, "x", math.nan)],
    (lambda _, **a: schedules.scaled_iterations(**a), {"total_steps": 0}),
    (
        lambda _, **a: schedules.scaled_iterations(total_steps=10, **a),
        {"scale": 0},
    ),
]


@pytest.mark.parametrize("rule, bad", BAD)
def test_arguments_out_of_range_are_refused(rule, bad):
    name, value = next(iter(bad.items()))
    arguments = {"scale": 2, **bad}
    schedule = arguments.pop("schedule", 0.1)
    with harness.refused(f"`{name}` must be", f"{name}={value!r}"):
        rule(schedule, **arguments)


def test_a_schedule_of_no_known_family_is_refused():
    cosine = keras.optimizers.schedules.CosineDecay(0.1, 10)
    with harness.refused("`family` must be", "family=None, schedule="):
        lsw(cosine)
