"""Tests of `schedules`: closed forms, an oracle, Keras's contract."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_adascale import schedules
from tf_adascale.schedules import (
    LegwScaling,
    LinearScaling,
    LinearScalingWithWarmup,
    SqrtScaling,
    TimeScaling,
)

# Keras evaluates its schedules in float32. The exponent's rounding, 6e-8 of up
# to log(1000), and that of pow and two products stay below it.
TOLERANCE = 1e-6

SCALES = (1, 2.5, 7, 64)
DURATIONS = (1500, 1501)  # 1501 is divisible by none of the scales but 1.


def exponential(total_steps, rate=0.08, decay=0.0133):
    """Table 3's family: rate decay^(t / total_steps)."""
    return keras.optimizers.schedules.ExponentialDecay(rate, total_steps, decay)


def step_decay(total_steps, rate=0.08, decay=0.1):
    """Table 3's family: rate decay^(number of boundaries below t)."""
    boundaries = [total_steps // 2, total_steps * 4 // 5]
    values = [rate, rate * decay, rate * decay**2]
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)


def oracle_rate(family, total_steps, t):
    """`exponential` and `step_decay` at real steps t, in float64."""
    if family == "exponential":
        return 0.08 * 0.0133 ** (t / total_steps)
    drops = np.sum([t > total_steps // 2, t > total_steps * 4 // 5], axis=0)
    return 0.08 * 0.1**drops


def oracle_lsw(family, total_steps, scale, t, warmup=0.055):
    """Appendix B.2 at real iterations t, in float64."""
    iterations = math.ceil(total_steps / scale)
    start = round(warmup * iterations)
    initial = oracle_rate(family, total_steps, 0.0)
    warming = initial * (1 + (scale - 1) * t / max(start, 1))
    if family == "step":
        base_step = scale * t
    else:
        base_step = total_steps * (t - start) / (iterations - start)
    scaled = scale * oracle_rate(family, total_steps, base_step)
    return np.where(t < start, warming, scaled)


FAMILIES = {"exponential": exponential, "step": step_decay}


def run(schedule, iterations):
    """Returns the rates of a whole run, as a graph gives them."""
    rates = tf.function(
        lambda ts: tf.map_fn(schedule, ts, fn_output_signature=tf.float32)
    )
    return rates(tf.range(iterations, dtype=tf.int64)).numpy()


class TestScaledIterations:
    @pytest.mark.parametrize(
        ("total_steps", "scale", "expected"),
        [
            (1500, 1, 1500),
            (1500, 4, 375),  # divides
            (1500, 64, 24),  # 23.4
            (10, 64, 1),
            (10, 2.5, 4),
            (10, 0.5, 20),
            (21, 0.7, 30),  # in floats 30.000000000000004
            (2**60 + 1, 2, 2**59 + 1),  # float64 has no 2^60 + 1
        ],
    )
    def test_is_ceiling(self, total_steps, scale, expected):
        assert schedules.scaled_iterations(total_steps, scale=scale) == expected

    @pytest.mark.parametrize("total_steps", [0, -3, 1.5, None])
    def test_refuses_total_steps(self, total_steps):
        message = (
            r"There is no training to schedule in total_steps\. Expected a "
            rf"whole number of at least 1\. Received: total_steps={total_steps}"
        )
        with pytest.raises(ValueError, match=message):
            schedules.scaled_iterations(total_steps, scale=2)
        with pytest.raises(ValueError, match=message):
            LinearScalingWithWarmup(0.1, scale=2, total_steps=total_steps)

    def test_refuses_scale(self):
        with pytest.raises(ValueError, match="Received: scale=0"):
            schedules.scaled_iterations(10, scale=0)


class TestClosedForms:
    def test_linear(self):
        # lr drops after base step 8: 4 t > 8 from t = 3 on; 4 * 0.5, 4 * 0.25.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [8], [0.5, 0.25]
        )
        rates = run(LinearScaling(decay, scale=4), 5)
        np.testing.assert_array_equal(rates, [2, 2, 2, 1, 1])

    def test_linear_between_base_steps(self):
        # 2.5 t = 0, 2.5, 5, 7.5; lr halves every 5: 2.5 2^(-t / 2).
        decay = exponential(5, rate=1.0, decay=0.5)
        rates = run(LinearScaling(decay, scale=2.5), 4)
        expected = 2.5 * 0.5 ** (np.arange(4) / 2)
        np.testing.assert_allclose(rates, expected, rtol=TOLERANCE)

    def test_fraction_of_base_step_meets_boundary(self):
        # 0.1 t > 3 from t = 31 on; in floats 30 * 0.1 is 3.0000000000000004.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [3], [1.0, 0.0]
        )
        rates = run(LinearScaling(decay, scale=0.1), 40)
        assert np.flatnonzero(rates == 0)[0] == 31

    def test_sqrt(self):
        # sqrt(16) = 4; 16 t > 16 from t = 2 on.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [16], [0.5, 0.25]
        )
        rates = run(SqrtScaling(decay, scale=16), 3)
        np.testing.assert_array_equal(rates, [2, 2, 1])

    def test_legw(self):
        # sqrt(16) 0.5 = 2 times t / 4; 16 t > 16 halves it from t = 2 on.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [16], [0.5, 0.25]
        )
        rates = run(LegwScaling(decay, scale=16, warmup_steps=4), 6)
        np.testing.assert_array_equal(rates, [0, 0.5, 0.5, 0.75, 1, 1])

    def test_legw_without_warmup_is_sqrt(self):
        legw = LegwScaling(exponential(100), scale=5, warmup_steps=0)
        sqrt = SqrtScaling(exponential(100), scale=5)
        np.testing.assert_array_equal(run(legw, 20), run(sqrt, 20))

    def test_lsw_step(self):
        # T_S = 32 / 4 = 8, W = 0.25 * 8 = 2: 0.5 (1 + 3 t / 2) = 0.5, 1.25;
        # then 4 lr(4 t), with 4 t > 20 from t = 6 on.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [20], [0.5, 0.25]
        )
        lsw = LinearScalingWithWarmup(
            decay, scale=4, total_steps=32, warmup=0.25
        )
        rates = run(lsw, lsw.iterations)
        np.testing.assert_array_equal(rates, [0.5, 1.25, 2, 2, 2, 2, 1, 1])

    def test_lsw_exponential(self):
        # T_S = 8, W = 2, lr(t) = 2^(-t / 32): 1, 2.5, then 4 2^(-(t - 2) / 6).
        lsw = LinearScalingWithWarmup(
            exponential(32, rate=1.0, decay=0.5),
            scale=4,
            total_steps=32,
            warmup=0.25,
        )
        expected = [1, 2.5, *(4 * 0.5 ** (np.arange(6) / 6))]
        np.testing.assert_allclose(
            run(lsw, lsw.iterations), expected, rtol=TOLERANCE
        )

    def test_lsw_constant(self):
        # T_S = 4, W = 2: 0.5, 0.5 (1 + 7 / 2), then 8 * 0.5.
        lsw = LinearScalingWithWarmup(0.5, scale=8, total_steps=32, warmup=0.5)
        np.testing.assert_array_equal(run(lsw, 4), [0.5, 2.25, 4, 4])

    def test_lsw_plus_leaves_out_stretched_warmup(self):
        # test_lsw_step over 16 iterations: every rate's position twice as far,
        # W = 4: 0.5 (1 + 3 t / 4); 4 t / 2 > 20 from t = 11 on.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [20], [0.5, 0.25]
        )
        lsw = LinearScalingWithWarmup(
            decay, scale=4, total_steps=32, iterations=16, warmup=0.25
        )
        expected = [0.5, 0.875, 1.25, 1.625] + [2] * 7 + [1] * 5
        assert lsw.iterations == 16
        np.testing.assert_array_equal(run(lsw, 16), expected)

    def test_lsw_plus_of_a_scale_with_sixteen_digits(self):
        # S T_S / iterations is 0.3333333333333333 * 45001 / 90001, a fraction
        # whose numerator, 1.5e20, no integer type holds. Times t it is
        # 14999.999996 at t = 89999 and 15000.17 at t = 90000.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [15000], [3.0, 0.0]
        )
        lsw = LinearScalingWithWarmup(
            decay, scale=1 / 3, total_steps=15000, iterations=90001
        )
        assert schedules.scaled_iterations(15000, scale=1 / 3) == 45001
        np.testing.assert_allclose(lsw(89999), 1.0, rtol=TOLERANCE)
        assert lsw(90000) == 0

    def test_lsw_leaves_out_a_drop_within_the_warmup(self):
        # T_S = 8, W = 2: 4 t > 4 at t = 2, where the warm-up would reach 2.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [4], [0.5, 0.25]
        )
        lsw = LinearScalingWithWarmup(
            decay, scale=4, total_steps=32, warmup=0.25
        )
        np.testing.assert_array_equal(run(lsw, 4), [0.5, 1.25, 1, 1])

    def test_warmup_to_the_end(self):
        # T_S = 1 and W = round(0.9) = 1: one iteration at lr(0), then S lr(0).
        lsw = LinearScalingWithWarmup(
            exponential(8), scale=8, total_steps=8, warmup=0.9
        )
        np.testing.assert_allclose(run(lsw, 2), [0.08, 0.64], rtol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
class TestOracle:
    @pytest.mark.parametrize("total_steps", DURATIONS)
    @pytest.mark.parametrize("scale", SCALES)
    def test_linear_and_sqrt(self, family, total_steps, scale):
        base = FAMILIES[family](total_steps)
        iterations = schedules.scaled_iterations(total_steps, scale=scale)
        t = np.arange(iterations, dtype=np.float64)
        rates = oracle_rate(family, total_steps, scale * t)
        for rule, factor in (
            (LinearScaling, scale),
            (SqrtScaling, scale**0.5),
            (TimeScaling, 1),
        ):
            np.testing.assert_allclose(
                run(rule(base, scale=scale), iterations),
                factor * rates,
                rtol=TOLERANCE,
            )

    @pytest.mark.parametrize("total_steps", DURATIONS)
    @pytest.mark.parametrize("scale", SCALES)
    def test_lsw(self, family, total_steps, scale):
        lsw = LinearScalingWithWarmup(
            FAMILIES[family](total_steps), scale=scale, total_steps=total_steps
        )
        assert lsw.iterations == math.ceil(total_steps / scale)
        t = np.arange(lsw.iterations, dtype=np.float64)
        np.testing.assert_allclose(
            run(lsw, lsw.iterations),
            oracle_lsw(family, total_steps, scale, t),
            rtol=TOLERANCE,
        )

    @pytest.mark.parametrize("iterations", [17, 24, 68, 700])
    def test_lsw_plus(self, family, iterations):
        # T_S = 24, so position t 24 / iterations; 17 is a shrunk schedule.
        lsw_plus = LinearScalingWithWarmup(
            FAMILIES[family](1500),
            scale=64,
            total_steps=1500,
            iterations=iterations,
        )
        assert lsw_plus.iterations == iterations
        positions = np.arange(iterations) * 24 / iterations
        np.testing.assert_allclose(
            run(lsw_plus, iterations),
            oracle_lsw(family, 1500, 64, positions),
            rtol=TOLERANCE,
        )


@pytest.mark.parametrize("family", FAMILIES)
class TestShape:
    @pytest.mark.parametrize("scale", [2, 7, 64])
    def test_warmup_ends_where_linear_scaling_starts(self, family, scale):
        # The last warm-up rate is S lr(0) less one of W equal rises.
        lsw = LinearScalingWithWarmup(
            FAMILIES[family](6401), scale=scale, total_steps=6401
        )
        start = round(0.055 * lsw.iterations)
        rates = run(lsw, start + 1)
        top = 0.08 * scale
        rise = (top - 0.08) / start
        np.testing.assert_allclose(rates[0], 0.08, rtol=TOLERANCE)
        np.testing.assert_allclose(rates[-2], top - rise, rtol=TOLERANCE)
        np.testing.assert_allclose(rates[-1], top, rtol=TOLERANCE)

    @pytest.mark.parametrize("factor", [2, 3, 10])
    def test_lsw_plus_at_proportional_positions_is_lsw(self, family, factor):
        arguments = {"scale": 10, "total_steps": 1500}
        base = FAMILIES[family](1500)
        lsw = LinearScalingWithWarmup(base, **arguments)
        lsw_plus = LinearScalingWithWarmup(
            base, iterations=factor * lsw.iterations, **arguments
        )
        np.testing.assert_allclose(
            run(lsw_plus, lsw_plus.iterations)[::factor],
            run(lsw, lsw.iterations),
            rtol=TOLERANCE,
        )

    @pytest.mark.parametrize("iterations", [None, 68])
    def test_ends_with_the_wrapped_schedule(self, family, iterations):
        # 1536 = 24 * 64, so the last rate is S lr(T_1) in the step family too.
        lsw = LinearScalingWithWarmup(
            FAMILIES[family](1536),
            scale=64,
            total_steps=1536,
            iterations=iterations,
        )
        np.testing.assert_allclose(
            lsw(lsw.iterations),
            64 * oracle_rate(family, 1536, 1536.0),
            rtol=TOLERANCE,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_1_is_the_wrapped_schedule(family):
    base = FAMILIES[family](100)
    expected = run(base, 101)
    for schedule in (
        LinearScaling(base, scale=1),
        SqrtScaling(base, scale=1),
        TimeScaling(base, scale=1),
        LegwScaling(base, scale=1, warmup_steps=0),
        LinearScalingWithWarmup(base, scale=1, total_steps=100, warmup=0),
    ):
        np.testing.assert_array_equal(run(schedule, 101), expected)


def test_lsw_at_scale_1_starts_constant():
    # W = round(5.5) = 6 iterations from lr(0) to 1 lr(0), then compressed.
    lsw = LinearScalingWithWarmup(exponential(100), scale=1, total_steps=100)
    rates = run(lsw, 8)
    np.testing.assert_array_equal(rates[:7], [rates[0]] * 7)
    np.testing.assert_allclose(
        rates[7], 0.08 * 0.0133 ** (1 / 94), rtol=TOLERANCE
    )


EXAMPLES = {
    "linear": LinearScaling(step_decay(1500), scale=64),
    "linear, fraction": LinearScaling(exponential(1500), scale=2.5),
    "sqrt": SqrtScaling(exponential(1500), scale=7),
    "sqrt, constant": SqrtScaling(0.1, scale=7),
    "time": TimeScaling(exponential(1500), scale=7),
    "legw": LegwScaling(exponential(1500), scale=8, warmup_steps=20),
    "lsw, step": LinearScalingWithWarmup(
        step_decay(1500), scale=8, total_steps=1500
    ),
    "lsw, exponential": LinearScalingWithWarmup(
        exponential(1500), scale=8, total_steps=1500, warmup=0.1
    ),
    "lsw+, step": LinearScalingWithWarmup(
        step_decay(1500), scale=8, total_steps=1500, iterations=300
    ),
    "lsw+, other": LinearScalingWithWarmup(
        keras.optimizers.schedules.CosineDecay(0.1, 1500),
        scale=8,
        total_steps=1500,
        iterations=300,
        family="exponential",
    ),
    "nested": SqrtScaling(LinearScaling(exponential(1500), scale=3), scale=2),
}


@pytest.mark.parametrize(
    "schedule", EXAMPLES.values(), ids=EXAMPLES, scope="class"
)
class TestKerasContract:
    def test_round_trip(self, schedule):
        config = keras.optimizers.schedules.serialize(schedule)
        assert config["registered_name"].startswith("tf_adascale>")
        restored = keras.optimizers.schedules.deserialize(config)
        assert type(restored) is type(schedule)
        assert restored.get_config() == schedule.get_config()
        np.testing.assert_array_equal(run(restored, 300), run(schedule, 300))

    def test_from_config_leaves_config_alone(self, schedule):
        config = schedule.get_config()
        type(schedule).from_config(config)
        assert config == schedule.get_config()

    def test_eager_graph_and_xla_agree(self, schedule):
        graph = tf.function(schedule)
        compiled = tf.function(schedule, jit_compile=True)
        for t in (0, 3, 20, 187, 10**6):
            step = tf.constant(t, tf.int64)
            eager = schedule(step)
            assert eager.dtype == tf.float32
            assert eager.shape == ()
            np.testing.assert_array_equal(schedule(t), eager)
            np.testing.assert_array_equal(schedule(float(t)), eager)
            # Graphs reorder constant factors, and XLA has a pow of its own.
            np.testing.assert_allclose(graph(step), eager, rtol=TOLERANCE)
            np.testing.assert_allclose(compiled(step), eager, rtol=TOLERANCE)

    def test_takes_int32(self, schedule):
        np.testing.assert_array_equal(
            schedule(tf.constant(150, tf.int32)), schedule(150)
        )

    def test_drives_optimizer(self, schedule):
        optimizer = keras.optimizers.SGD(schedule)
        weight = keras.Variable(0.0)
        optimizer.build([weight])
        for _ in range(3):
            optimizer.apply([tf.constant(-1.0)])
        np.testing.assert_allclose(
            weight, run(schedule, 3).sum(), rtol=TOLERANCE
        )
        np.testing.assert_array_equal(optimizer.learning_rate, schedule(3))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_drives_optimizer_under_strategy(strategy_of, num_replicas):
    schedule = EXAMPLES["lsw+, step"]
    with strategy_of(num_replicas).scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(
            keras.optimizers.SGD(schedule),
            loss=lambda y_true, y_pred: -y_pred,
        )
    before = model.get_weights()[1]
    ones = np.ones((12, 1), np.float32)
    model.fit(ones, ones, batch_size=4, verbose=0)
    # The bias's gradient is -1 at every step, so it moves by the rates.
    np.testing.assert_allclose(
        model.get_weights()[1] - before,
        [run(schedule, 3).sum()],
        rtol=TOLERANCE,
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_saved_model_trains_on(tmp_path, jit_compile):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(
        keras.optimizers.SGD(EXAMPLES["lsw+, step"]),
        loss="mse",
        jit_compile=jit_compile,
    )
    x, y = np.ones((4, 3), np.float32), np.ones((4, 1), np.float32)
    model.fit(x, y, epochs=5, verbose=0)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        restored.optimizer.learning_rate, EXAMPLES["lsw+, step"](5)
    )
    model.fit(x, y, verbose=0)
    restored.fit(x, y, verbose=0)
    np.testing.assert_allclose(
        restored.get_weights()[0], model.get_weights()[0], rtol=TOLERANCE
    )


class TestExactness:
    """Steps far beyond 2^24, where float32 counts by more than one."""

    @pytest.mark.parametrize(
        "rule",
        [LinearScaling, SqrtScaling, TimeScaling],
        ids=["linear", "sqrt", "time"],
    )
    @pytest.mark.parametrize("scale", [3, 1.5])
    def test_boundary(self, rule, scale):
        # S t meets the boundary at t = 2^27 and exceeds it an iteration later.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [int(scale * 2**27)], [1.0, 0.0]
        )
        schedule = rule(decay, scale=scale)
        for call in (schedule, tf.function(schedule, jit_compile=True)):
            assert call(tf.constant(2**27, tf.int64)) > 0
            assert call(tf.constant(2**27 + 1, tf.int64)) == 0

    @pytest.mark.parametrize("stretch", [1, 3])
    def test_lsw(self, stretch):
        # T_S = 2^28 whatever W; S t / stretch meets 2^29 at t = 2^27 stretch.
        decay = keras.optimizers.schedules.PiecewiseConstantDecay(
            [2**29], [1.0, 0.0]
        )
        lsw = LinearScalingWithWarmup(
            decay, scale=4, total_steps=2**30, iterations=stretch * 2**28
        )
        assert lsw(stretch * 2**27) == 4
        assert lsw(stretch * 2**27 + 1) == 0

    def test_wrapped_schedule_gets_whole_steps(self):
        @keras.saving.register_keras_serializable(package="tf_adascale_test")
        class LastBits(keras.optimizers.schedules.LearningRateSchedule):
            def __call__(self, step):
                assert step.dtype == tf.int64
                return tf.cast(step % 1000, tf.float32)

        schedule = LinearScaling(LastBits(), scale=3)
        # 3 (3 (2^40 + 1) mod 1000), from 2^40 = 1099511627776: 331.
        assert schedule(2**40 + 1) == 3 * 331


class TestFamily:
    def test_is_told_by_the_schedule(self):
        def family(schedule):
            return LinearScalingWithWarmup(
                schedule, scale=2, total_steps=10
            ).family

        assert family(0.1) == "step"
        assert family(step_decay(10)) == "step"
        assert family(exponential(10)) == "exponential"
        staircase = keras.optimizers.schedules.ExponentialDecay(
            0.1, 5, 0.5, staircase=True
        )
        assert family(staircase) == "step"

    def test_can_be_passed(self):
        lsw = LinearScalingWithWarmup(
            exponential(10), scale=2, total_steps=10, family="step"
        )
        assert lsw.family == "step"

    @pytest.mark.parametrize("family", [None, "cosine"])
    def test_refuses_unknown(self, family):
        message = (
            r"The schedule's family .* is not known\. Expected family=\"step\" "
            r"or family=\"exponential\" to be passed\. Received: "
            rf"family={family}, schedule="
        )
        with pytest.raises(ValueError, match=message):
            LinearScalingWithWarmup(
                keras.optimizers.schedules.CosineDecay(0.1, 10),
                scale=2,
                total_steps=10,
                family=family,
            )


class TestBadInput:
    @pytest.mark.parametrize(
        "rule",
        [
            LinearScaling,
            SqrtScaling,
            TimeScaling,
            lambda *a, **k: LegwScaling(*a, warmup_steps=1, **k),
            lambda *a, **k: LinearScalingWithWarmup(*a, total_steps=1, **k),
        ],
        ids=["linear", "sqrt", "time", "legw", "lsw"],
    )
    @pytest.mark.parametrize(
        "scale", [0, -1, math.inf, math.nan, None, "4"], ids=str
    )
    def test_scale(self, rule, scale):
        message = (
            r"The scale is no ratio of two batches\. Expected a finite number "
            rf"above 0\. Received: scale={scale}"
        )
        with pytest.raises(ValueError, match=message):
            rule(0.1, scale=scale)

    @pytest.mark.parametrize("schedule", [None, "cosine", math.nan], ids=str)
    def test_schedule(self, schedule):
        message = (
            r"The schedule to scale cannot be called at a step\. Expected a "
            r"keras.optimizers.schedules.LearningRateSchedule, or a finite "
            rf"number for a constant rate\. Received: schedule={schedule}"
        )
        with pytest.raises(ValueError, match=message):
            LinearScaling(schedule, scale=2)

    @pytest.mark.parametrize("iterations", [0, -1, 2.5])
    def test_iterations(self, iterations):
        message = (
            r"There is no training to schedule in iterations\. Expected a "
            rf"whole number of at least 1\. Received: iterations={iterations}"
        )
        with pytest.raises(ValueError, match=message):
            LinearScalingWithWarmup(
                0.1, scale=2, total_steps=10, iterations=iterations
            )

    @pytest.mark.parametrize("warmup", [-0.1, 1, 5.5, math.nan, None])
    def test_warmup(self, warmup):
        message = (
            r"The warm-up is no part of the iterations\. Expected a number of "
            rf"at least 0 and below 1\. Received: warmup={warmup}"
        )
        with pytest.raises(ValueError, match=message):
            LinearScalingWithWarmup(0.1, scale=2, total_steps=10, warmup=warmup)

    @pytest.mark.parametrize("warmup_steps", [-1, math.inf, math.nan, None])
    def test_warmup_steps(self, warmup_steps):
        message = (
            r"The length of the warm-up is no number of iterations\. Expected "
            r"a finite number of at least 0\. Received: "
            rf"warmup_steps={warmup_steps}"
        )
        with pytest.raises(ValueError, match=message):
            LegwScaling(0.1, scale=2, warmup_steps=warmup_steps)
