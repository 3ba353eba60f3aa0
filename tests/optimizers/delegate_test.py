"""What users pass to and read from a wrapper, as from any Keras optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness
from tf_adascale import AdaScale, Adasum

SGD = keras.optimizers.SGD

WRAPPERS = {
    "adascale": lambda inner: AdaScale(inner, scale=1),
    "adasum": Adasum,
}
every = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule written by a user: a function of the step."""

    def __init__(self, function):
        self.function = function

    def __call__(self, step):
        return self.function(step)


# What works with `optimizer.iterations`, a variable that holds an int64.
FUNCTIONS = {
    "product": lambda t: 0.1 * 0.9 ** (0.5 * t),
    "sum": lambda t: 1.0 / (t + 10.0),
    "minimum": lambda t: keras.ops.minimum(0.1, 0.02 * (t + 1.0)),
    "cast": lambda t: 0.1 * tf.cast(t + 1, tf.float32),
    "keras_cast": lambda t: 0.1 * keras.ops.cast(t + 1, "float32"),
    "gather": lambda t: tf.gather([0.1, 0.3, 0.2, 0.5], t),
    "index": lambda t: tf.constant([0.1, 0.3, 0.2, 0.5])[t + 0],
    "whole": lambda t: tf.constant([0.1, 0.2])[t // 2],
    "compare": lambda t: tf.where(t < tf.constant(2, tf.int64), 0.1, 0.2),
    "compare_keras": lambda t: keras.ops.where(t % 2 == 0, 0.1, 0.2),
    "value": lambda t: 0.1 * tf.cast(t.value + 1, tf.float32),
}
RULES = {
    "none": lambda schedule: schedule,
    "time": lambda schedule: tf_adascale.schedules.TimeScaling(
        schedule, scale=1
    ),
    "warmup": lambda schedule: tf_adascale.schedules.LinearScalingWithWarmup(
        schedule, scale=1, total_steps=4, family="step", warmup=0.0
    ),
}


def weight_after_steps(optimizer, run=lambda step: step, steps=4):
    weight = keras.Variable([0.0])
    optimizer.build([weight])
    step = run(lambda: optimizer.apply([tf.ones(1)], [weight]))
    for _ in range(steps):
        step()
    return weight.numpy()


class TestSchedules:
    @pytest.mark.parametrize("wrap", [lambda x: x, *WRAPPERS.values()])
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_get_what_keras_gives_them(self, name, rule, wrap):
        schedule = Schedule(FUNCTIONS[name])
        expected = weight_after_steps(SGD(schedule))
        assert expected < -0.1
        for run in (lambda step: step, tf.function):
            received = weight_after_steps(wrap(SGD(RULES[rule](schedule))), run)
            assert received == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_on_two_replicas(self, wrap):
        def make():
            return wrap(SGD(Schedule(FUNCTIONS["product"])))

        one, two = (harness.Run(n, make, graph=True) for n in (1, 2))
        for gradients in harness.random_gradients(3):
            one.step(gradients)
            two.step([np.repeat(g, 2, 0) for g in gradients])
        harness.assert_close(two.weights(), one.weights())

    def test_a_step_beyond_2_to_the_24(self):
        """A float32 does not hold the odd numbers there."""
        seen = []

        def rate(step):
            seen.append(int(tf.cast(step, tf.int64)))
            return tf.where(step > tf.constant(2**40, tf.int64), 0.5, 0.25)

        schedule = tf_adascale.schedules.TimeScaling(Schedule(rate), scale=1)
        assert float(schedule(2**40 + 1)) == 0.5
        assert float(schedule(2**40)) == 0.25
        optimizer = AdaScale(SGD(schedule), scale=1)
        weight = keras.Variable([0.0])
        optimizer.build([weight])
        [whole] = [
            v for v in optimizer.variables if v.name == "scale_invariant_step"
        ]
        whole.assign(2**40 + 1)
        optimizer.apply([tf.ones(1)], [weight])
        assert weight.numpy() == [-0.5]
        assert seen == [2**40 + 1, 2**40, 2**40 + 1]

    def test_of_a_scale_that_is_not_whole(self):
        schedule = tf_adascale.schedules.TimeScaling(
            Schedule(FUNCTIONS["sum"]), scale=1.5
        )
        assert float(schedule(3)) == pytest.approx(1 / (4.5 + 10), rel=1e-6)


class TestGradients:
    @every
    @pytest.mark.parametrize(
        "make",
        [
            lambda: np.full((3, 2), 0.5),
            lambda: np.full((3, 2), 0.5, "float32"),
            lambda: np.full((3, 2), 2),
            lambda: [[0.5, 0.25]] * 3,
            lambda: keras.Variable(np.full((3, 2), 0.5)),
            lambda: tf.IndexedSlices(
                np.ones((2, 2), "float32"), np.array([1, 0]), (3, 2)
            ),
            lambda: tf.IndexedSlices(
                tf.ones((2, 2)), tf.constant([1, 0]), tf.TensorShape([3, 2])
            ),
            lambda: tf.IndexedSlices(
                tf.ones((2, 2)), tf.constant([1, 0]), [3, 2]
            ),
        ],
        ids=["64", "32", "int", "list", "variable", "numpy", "shape", "rows"],
    )
    def test_may_be_arrays(self, make, wrap):
        plain, ours = (keras.Variable(np.ones((3, 2))) for _ in range(2))
        SGD(1.0).apply([make()], [plain])
        wrap(SGD(1.0)).apply([make()], [ours])
        np.testing.assert_array_equal(ours.numpy(), plain.numpy())

    @every
    def test_whole_numbers_are_unscaled_as_fractions(self, wrap):
        plain, ours = (keras.Variable([0.0]) for _ in range(2))
        for weight, make in ((plain, lambda x: x), (ours, wrap)):
            optimizer = make(SGD(1.0, loss_scale_factor=2.0))
            optimizer.apply([np.array([3])], [weight])
        assert ours.numpy() == plain.numpy() == [-1.5]

    @every
    def test_none_at_all_do_nothing(self, wrap):
        optimizer = wrap(SGD(1.0))
        optimizer.apply([], [])
        optimizer.apply_gradients([])
        assert int(optimizer.iterations) == 0


class TestLearningRate:
    @every
    @pytest.mark.parametrize("num_replicas", [1, 2])
    def test_is_the_variable(self, num_replicas, wrap):
        run = harness.Run(num_replicas, lambda: wrap(SGD(1.0)))
        optimizer = run.optimizer
        rate = optimizer.learning_rate
        assert isinstance(rate, keras.Variable)
        assert rate is optimizer._learning_rate
        [gradients] = harness.random_gradients(1)
        gradients = [np.repeat(g, num_replicas, 0) for g in gradients]
        settings = {
            1.0: lambda: None,
            0.5: lambda: rate.assign(0.5),
            0.25: lambda: optimizer.learning_rate.assign_sub(0.25),
            0.75: lambda: setattr(optimizer, "learning_rate", 0.75),
            0.125: lambda: rate.value.assign(0.125),
        }
        for expected, change in settings.items():
            change()
            before = run.weights()
            run.step(gradients)
            assert harness.first(rate) == expected
            for old, new, gradient in zip(before, run.weights(), gradients):
                np.testing.assert_allclose(
                    old - new, expected * gradient[0], atol=1e-5
                )


class ReadsItsRate(SGD):
    """Does not use the rate that `update_step` is passed."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, self.learning_rate)


def assert_steps_by_gain(make, *, steps=1, expected=1.25):
    """Asserts what steps at S = 2, whose gain is 1.25, change in total.

    Per element the mean square is 1.25, the square of the mean 1. sigma^2 =
    2 (1.25 - 1) = 0.5, mu^2 = 1 - 0.5 / 2; r = 1.25 / (0.25 + 0.75).
    """
    run = harness.Run(2, make)
    before = run.weights()
    gradients = [
        np.stack([1.5 * np.ones(s), 0.5 * np.ones(s)]) for s in harness.SHAPES
    ]
    for _ in range(steps):
        run.step(gradients)
    for old, new in zip(before, run.weights()):
        np.testing.assert_allclose(old - new, expected, rtol=1e-5)


class TestFollowsTheInnerOptimizer:
    """Rates 1, 0.1, 0.01 at steps 0, 1, 2; the gradient is 1."""

    DECAY = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 0.1)

    @every
    @pytest.mark.parametrize("mode", harness.MODES)
    def test_rate_read_in_an_update(self, mode, wrap):
        weight = weight_after_steps(
            wrap(ReadsItsRate(self.DECAY)), harness.MODES[mode], steps=3
        )
        assert weight == pytest.approx([-1.11])

    def test_rate_read_in_an_update_has_the_gain_of_the_step(self):
        """The sixth step is at 6.25 base steps, where the rate is 0."""
        rate = keras.optimizers.schedules.PiecewiseConstantDecay(
            [5], [1.0, 0.0]
        )
        assert_steps_by_gain(
            lambda: AdaScale(ReadsItsRate(rate)), steps=6, expected=5 * 1.25
        )

    @every
    @pytest.mark.parametrize("after", [False, True])
    def test_iterations_that_were_set(self, after, wrap):
        inner = SGD(self.DECAY)
        optimizer = wrap(inner) if after else None
        inner.iterations.assign(2)
        optimizer = optimizer or wrap(inner)
        # 0.01 + 0.001
        weight = weight_after_steps(optimizer, steps=2)
        assert weight == pytest.approx([-0.011])
        if isinstance(optimizer, AdaScale):
            assert float(optimizer.scale_invariant_step) == 4

    @every
    @pytest.mark.parametrize(
        "rate, expected", [(DECAY, 1.0), (lambda: 0.5, 0.5)]
    )
    def test_rate_of_the_inner_one_set_later(self, rate, expected, wrap):
        optimizer = wrap(SGD(3.0))
        optimizer.inner_optimizer.learning_rate = rate
        assert float(optimizer.learning_rate) == expected
        weight = weight_after_steps(optimizer, steps=1)
        assert weight == [-expected]

    @every
    def test_number_set_on_the_inner_one(self, wrap):
        optimizer = wrap(SGD(3.0))
        optimizer.inner_optimizer.learning_rate = 0.5
        assert weight_after_steps(optimizer, steps=1) == [-0.5]

    def test_whole_rate_times_the_gain(self):
        assert_steps_by_gain(lambda: AdaScale(SGD(lambda: 1)))

    @every
    def test_settings_made_on_the_wrapper(self, wrap):
        optimizer = wrap(SGD(1.0))
        assert optimizer.clipnorm is None
        optimizer.clipnorm = 0.5
        optimizer.use_ema = True
        assert optimizer.inner_optimizer.use_ema is optimizer.use_ema is True
        assert optimizer.inner_optimizer.clipnorm == optimizer.clipnorm == 0.5
        assert weight_after_steps(optimizer, steps=1) == [-0.5]
        assert optimizer.use_ema is True  # Building leaves it so.
        paths = [variable.path for variable in optimizer.variables]
        assert sum(path.endswith("_average") for path in paths) == 1

    @every
    def test_weight_decay_made_on_the_wrapper(self, wrap):
        optimizer = wrap(SGD(0.5))
        optimizer.weight_decay = 0.5
        weight = keras.Variable([4.0])
        optimizer.apply([tf.ones(1)], [weight])
        assert weight.numpy() == [4 - 0.5 * 0.5 * 4 - 0.5]

    @every
    def test_other_attributes(self, wrap):
        optimizer = wrap(SGD(1.0, momentum=0.9))
        optimizer.momentum += 0.05
        assert optimizer.inner_optimizer.momentum == pytest.approx(0.95)
        with pytest.raises(AttributeError, match="no attribute 'momentun'"):
            _ = optimizer.momentun

    @every
    def test_an_attribute_by_the_name_of_an_own_one(self, wrap):
        inner = SGD()
        inner.microbatches = 5
        wrapped = wrap(inner)
        wrapped.microbatches += 1
        assert (wrapped.microbatches, inner.microbatches) == (2, 5)

    @every
    @pytest.mark.parametrize("place", ["wrapper", "inner"])
    def test_accumulation_set_later_is_refused(self, place, wrap):
        optimizer, weight = wrap(SGD(1.0)), keras.Variable([4.0])
        where = optimizer if place == "wrapper" else optimizer.inner_optimizer
        where.gradient_accumulation_steps = 2
        with (
            harness.untouched(weight),
            harness.refused("`gradient_accumulation_steps` must not be set on"),
        ):
            optimizer.apply([tf.ones(1)], [weight])

    @every
    def test_half_precision_is_clipped_in_float32(self, wrap):
        """300^2 + 400^2 is infinite in float16; 300 / 500 = 0.6."""
        optimizer = wrap(
            keras.optimizers.LossScaleOptimizer(
                SGD(1.0, clipnorm=1.0), initial_scale=1.0
            )
        )
        weight = keras.Variable([0.0, 0.0], dtype="float16")
        optimizer.apply([tf.constant([300.0, 400.0], "float16")], [weight])
        np.testing.assert_allclose(weight, [-0.6, -0.8], rtol=1e-3)

    @every
    def test_a_configuration_without_a_rate(self, wrap):
        class Fixed(SGD):
            def __init__(self):
                super().__init__(0.25)

            def get_config(self):
                return {}

        optimizer = wrap(Fixed())
        config = optimizer.get_config()
        assert "learning_rate" not in config["inner_optimizer"]["config"]
        copy = type(optimizer).from_config(config, {"Fixed": Fixed})
        assert float(copy.learning_rate) == 0.25

    @every
    def test_a_constraint_gets_the_variable_of_keras(self, wrap):
        class Clip(keras.constraints.Constraint):  # Keras 3.10 needs a class.
            def __call__(self, weight):
                assert isinstance(weight, keras.Variable)
                return keras.ops.clip(weight.value, -0.25, 0.25)

        layer = keras.layers.Dense(1, kernel_constraint=Clip())
        layer.build((1, 1))
        wrap(SGD(1.0)).apply([tf.ones((1, 1))], [layer.kernel])
        assert layer.kernel.numpy() == [[-0.25]]


INNER = {
    "momentum": lambda: SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.1),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        SGD(0.1, momentum=0.9)
    ),
}


class TestSetWeights:
    @pytest.mark.parametrize("inner", INNER)
    @pytest.mark.parametrize("num_replicas", [1, 2])
    @every
    def test_restores_all_of_the_state(self, wrap, num_replicas, inner):
        first, second = (
            harness.Run(num_replicas, lambda: wrap(INNER[inner]()))
            for _ in range(2)
        )
        steps = harness.random_gradients(4, num_replicas)
        for gradients in steps[:3]:
            first.step(gradients)
        second.optimizer.set_weights(
            [harness.first(v) for v in first.optimizer.variables]
        )
        for mine, theirs in zip(second.variables, first.variables):
            mine.assign(theirs)
        for run in (first, second):
            run.step(steps[3])
        for x, y in zip(first.optimizer.variables, second.optimizer.variables):
            np.testing.assert_array_equal(harness.first(x), harness.first(y))

    @every
    @pytest.mark.parametrize("spoil", ["one_less", "another_shape"])
    def test_of_other_shapes_are_refused(self, spoil, wrap):
        optimizer = wrap(SGD(0.1, momentum=0.9))
        optimizer.build(harness.variables(harness.twos()))
        values = [v.numpy() + 1 for v in optimizer.variables]
        values = values[:-1] if spoil == "one_less" else [*values[:-1], [0.0]]
        values = list(map(np.asarray, values))
        rule = "`weights` must hold an array of its shape for each of"
        with harness.untouched(optimizer), harness.refused(rule, "arrays of"):
            optimizer.set_weights(values)

    @every
    def test_before_it_is_built_is_refused(self, wrap):
        with pytest.raises(ValueError, match="has not yet been built"):
            wrap(SGD()).set_weights([])


@pytest.mark.parametrize("wrap", [AdaScale, tf_adascale.AdamScale, Adasum])
def test_trains_under_enable_check_numerics(wrap):
    """No result is NaN or infinite on the way, at any scale."""
    inner = keras.optimizers.Adam if wrap is tf_adascale.AdamScale else SGD
    tf.debugging.enable_check_numerics()
    try:
        for inputs in (np.zeros((8, 3)), np.ones((8, 3))):
            model = harness.dense_model(tf_adascale.Model)
            model.compile(wrap(inner(0.01)), "mse", microbatches=2)
            callbacks = []
            if wrap is not Adasum:
                callbacks = [tf_adascale.callbacks.ScalingLog()]
            history = harness.fit(
                model, inputs, np.zeros((8, 1)), callbacks=callbacks
            )
            assert np.isfinite(history.history["loss"]).all()
        optimizer = wrap(inner(0.01))
        optimizer.apply([tf.zeros(2)], [keras.Variable([0.0, 0.0])])
    finally:
        tf.debugging.disable_check_numerics()
