"""The contract that every optimizer of this library keeps.

One suite runs on all of them, around Adam, which all can wrap. Its epsilon is
large, so that a first step is not merely the sign of the gradient.
"""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale import AdamScale, AdaScale, Adasum

LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
schedules = keras.optimizers.schedules

every = pytest.mark.parametrize(
    "wrap", harness.WRAPPERS.values(), ids=harness.WRAPPERS
)

# Keras's warning, which wrappers issue too.
NO_GRADIENT = pytest.mark.filterwarnings("ignore:Gradients do not exist for")


def adam(rate=0.01, **settings):
    return keras.optimizers.Adam(rate, epsilon=0.1, **settings)


def everything():
    """Returns Adam with as many settings as possible."""
    return adam(
        schedules.ExponentialDecay(0.01, 3, 0.5),
        weight_decay=0.1,
        clipvalue=1.0,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=3,
    )


def own_variables(optimizer):
    """Returns the variables that the inner optimizer lacks."""
    return optimizer.variables[: -len(optimizer.inner_optimizer.variables)]


def pair(wrap, make, variables=None):
    """Returns a plain and a wrapped optimizer, and equal weights for each."""
    both = make(), wrap(make())
    weights = [harness.variables(variables or harness.twos()) for _ in both]
    for optimizer, mine in zip(both, weights):
        optimizer.build(mine)
    return *both, *weights


@NO_GRADIENT
@every
@pytest.mark.parametrize("mode", harness.MODES)
def test_one_sample_is_the_inner_optimizer_to_the_bit(mode, wrap):
    plain, wrapped, theirs, mine = pair(
        wrap, everything, [*harness.twos(), np.ones(1, "float32")]
    )
    for weights in (theirs, mine):
        weights[1].constraint = keras.constraints.MaxNorm(1.0)

    @harness.MODES[mode]
    def step(*gradients):
        for optimizer, weights in ((plain, theirs), (wrapped, mine)):
            optimizer.apply([*gradients, None], weights)

    # Fractions, which are rounded at every operation.
    random = np.random.default_rng(0)
    for _ in range(8):
        step(
            *(
                tf.constant(random.normal(size=shape), "float32")
                for shape in harness.SHAPES
            )
        )
    harness.assert_same(mine, theirs)
    harness.assert_same(wrapped.inner_optimizer, plain)
    assert 0 < np.linalg.norm(harness.first(mine[1])) < 1.01
    assert int(wrapped.iterations) == 8
    assert int(wrapped.skipped_steps) == 0


@every
@pytest.mark.parametrize(
    "settings",
    [
        {"global_clipnorm": 1.0, "weight_decay": 0.1},
        {"clipvalue": 2.0, "use_ema": True, "ema_overwrite_frequency": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_equal_gradients_are_a_step_of_the_inner_optimizer(settings, wrap):
    """Keras would clip each replica's part, here half of the gradient."""

    def make():
        rate = schedules.PiecewiseConstantDecay([0], [0.5, 0.25])
        return adam(rate, **settings)

    run = harness.Run(2, lambda: wrap(make()))
    plain, weights = make(), harness.variables(harness.twos())
    [gradients] = harness.random_gradients(1)
    for _ in range(2):
        plain.apply([tf.constant(g[0]) for g in gradients], weights)
        run.step([np.repeat(g, 2, 0) for g in gradients])
        harness.assert_close(run.weights(), harness.values(weights))
        rate = float(run.optimizer.learning_rate)
        assert rate == float(plain.learning_rate)
    inner = run.optimizer.inner_optimizer
    harness.assert_close(
        harness.values(inner.variables), harness.values(plain.variables)
    )


@NO_GRADIENT
@every
def test_none_leaves_its_variable_and_slots_alone(wrap):
    run = harness.Run(2, lambda: wrap(adam(weight_decay=0.1, use_ema=True)))
    first, second = harness.random_gradients(2, 2)
    run.step(first)
    before = run.state()
    run.step(second, lambda gradients: [None, gradients[1]])
    changed = harness.changed(before, run.state())
    kept = {path for path in before if "weight_0" in path}
    # The average of the weights follows all weights.
    assert {path for path in changed & kept if "average" not in path} == set()
    assert {path for path in before if "weight_1" in path} <= changed


@every
def test_sparse_gradients_are_the_dense_ones(wrap):
    """Each replica's gradient holds each row once."""
    dense, sparse = (harness.Run(2, lambda: wrap(adam())) for _ in range(2))

    def slices(gradient):
        rows = tf.range(gradient.shape[0])[::-1]
        return tf.IndexedSlices(
            tf.gather(gradient, rows), rows, tf.shape(gradient)
        )

    for gradients in harness.random_gradients(2, 2):
        dense.step(gradients)
        sparse.step(gradients, lambda local: list(map(slices, local)))
    for x, y in zip(
        [*dense.variables, *dense.optimizer.variables],
        [*sparse.variables, *sparse.optimizer.variables],
    ):
        # The sums are in another order.
        harness.assert_close(harness.copies(x), harness.copies(y), rtol=1e-6)


@every
@pytest.mark.parametrize("num_replicas, graph", [(1, False), (2, True)])
def test_a_step_that_is_not_finite_is_skipped_everywhere(
    num_replicas, graph, wrap
):
    """The step is skipped, although clipping would make it finite."""
    run = harness.Run(num_replicas, lambda: wrap(everything()), graph=graph)
    bad = [np.inf, None, np.nan, -np.inf, None]
    for spoil, gradients in zip(
        bad, harness.random_gradients(len(bad), num_replicas)
    ):
        if spoil is not None:
            # In one entry of the first weight, on the last replica.
            gradients[0][-1, 1, 1] = spoil
        before = run.state()
        run.step(gradients)
        changed = harness.changed(before, run.state())
        names = {path.split("/")[-1] for path in changed}
        if spoil is None:
            assert {"iteration", "weight_0", "weight_1"} <= names
        else:
            assert names == {"skipped_steps"}
    assert int(run.optimizer.skipped_steps) == 3
    assert int(harness.first(run.optimizer.iterations)) == 2


@every
class TestLossScale:
    def test_changes_nothing_but_the_loss(self, wrap):
        """Clipping, which is not linear, sees unscaled gradients."""
        plain, static, dynamic = (
            harness.Run(2, lambda make=make: wrap(make()))
            for make in (
                lambda: adam(clipnorm=1.0),
                lambda: adam(clipnorm=1.0, loss_scale_factor=2.0**12),
                lambda: LossScaleOptimizer(
                    adam(clipnorm=1.0),
                    initial_scale=2.0**10,
                    dynamic_growth_steps=1,
                ),
            )
        )
        for gradients in harness.random_gradients(2, 2):
            for run in (plain, static, dynamic):
                run.step(gradients)
        for run in (static, dynamic):
            # Powers of two change no rounding.
            harness.assert_same(run.variables, plain.variables)
            harness.assert_same(
                own_variables(run.optimizer), own_variables(plain.optimizer)
            )
        # The scale doubled after each step.
        assert harness.value(dynamic.optimizer, "dynamic_scale") == 2.0**12

    def test_is_halved_where_any_replica_overflows(self, wrap):
        def make():
            return LossScaleOptimizer(
                adam(), initial_scale=2.0**10, dynamic_growth_steps=3
            )

        run = harness.Run(2, lambda: wrap(make()), graph=True)
        [good] = harness.random_gradients(1, 2)
        scales = []
        # Three good steps double the loss scale. An overflow halves it and
        # restarts the count.
        for bad, replica in [
            *[(None, 0), (None, 0), (np.inf, 0)],
            *[(None, 0), (None, 0), (None, 0), (np.nan, 1), (-np.inf, 1)],
        ]:
            gradients = [g.copy() for g in good]
            if bad is not None:
                gradients[1][replica, 0] = bad
            before = run.weights()
            run.step(gradients)
            same = np.array_equal(run.weights()[0], before[0])
            assert same == (bad is not None)
            scale = harness.value(run.optimizer, "dynamic_scale")
            scales.append(float(scale) / 2**10)
        assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 0.5, 0.25]
        assert int(run.optimizer.skipped_steps) == 3

    def test_is_that_of_keras_on_one_replica(self, wrap):
        plain, wrapped, theirs, mine = pair(
            wrap, lambda: LossScaleOptimizer(adam(), dynamic_growth_steps=3)
        )
        for number, gradients in enumerate(harness.random_gradients(8)):
            if number == 4:
                gradients[0][0, 0, 0] = np.inf
            local = [tf.constant(g[0]) for g in gradients]
            for optimizer, weights in ((plain, theirs), (wrapped, mine)):
                optimizer.apply(list(map(optimizer.scale_loss, local)), weights)
        harness.assert_same(mine, theirs)
        harness.assert_same(wrapped.inner_optimizer, plain)


@every
def test_weight_decay_leaves_out_what_is_excluded(wrap):
    with harness.strategy_of(2).scope():
        weights = [
            keras.Variable([1.0], name=name)
            for name in ("kernel", "bias", "scale")
        ]
        optimizer = wrap(adam(0.5, weight_decay=0.5))
        optimizer.exclude_from_weight_decay([weights[2]], var_names=["bias"])
        optimizer.build(weights)
    harness.strategy_of(2).run(lambda: optimizer.apply([tf.zeros(1)] * 3))
    # 1 - 0.5 * 0.5 * 1.
    for weight, expected in zip(weights, [0.75, 1.0, 1.0]):
        assert harness.copies(weight) == [[expected], [expected]]


@every
class TestLearningRate:
    def test_set_between_steps_reaches_a_traced_step(self, wrap):
        run = harness.Run(2, lambda: wrap(adam(1.0)), graph=True)
        plain, weights = adam(1.0), harness.variables(harness.twos())
        [gradients] = harness.random_gradients(1)
        for rate in (1.0, 0.5, 0.25):
            for optimizer in (plain, run.optimizer):
                optimizer.learning_rate = rate
            assert harness.first(run.optimizer.learning_rate) == rate
            plain.apply([tf.constant(g[0]) for g in gradients], weights)
            run.step([np.repeat(g, 2, 0) for g in gradients])
            harness.assert_close(run.weights(), harness.values(weights))
            assert float(run.optimizer.effective_learning_rate) == rate

    def test_of_a_schedule_cannot_be_set(self, wrap):
        optimizer = wrap(adam(schedules.ExponentialDecay(0.5, 10, 0.5)))
        with pytest.raises(TypeError, match="not settable"):
            optimizer.learning_rate = 0.1
        assert float(optimizer.learning_rate) == 0.5

    def test_may_become_a_schedule(self, wrap):
        plain, wrapped, theirs, mine = pair(wrap, adam)
        ones = [tf.ones(shape) for shape in harness.SHAPES]
        for optimizer, weights in ((plain, theirs), (wrapped, mine)):
            optimizer.learning_rate = schedules.ExponentialDecay(0.2, 10, 0.5)
            optimizer.apply(ones, weights)
        harness.assert_same(mine, theirs)


@every
class TestCalls:
    """All ways to call a Keras optimizer."""

    def test_the_first_step_builds_in_a_function_too(self, wrap):
        """The shapes of the gradients may be unknown."""
        optimizer = wrap(adam())
        plain, _, theirs, mine = pair(wrap, adam)

        @tf.function(input_signature=[tf.TensorSpec(None)] * 2)
        def step(*gradients):
            optimizer.apply(gradients, mine)

        ones = [tf.ones(shape) for shape in harness.SHAPES]
        for _ in range(2):
            step(*ones)
            plain.apply(ones, theirs)
        harness.assert_close(harness.values(mine), harness.values(theirs))

    def test_apply_gradients_and_apply_without_variables(self, wrap):
        plain, wrapped, theirs, mine = pair(wrap, adam)
        ones = [tf.ones(shape) for shape in harness.SHAPES]
        assert int(wrapped.apply_gradients(zip(ones, mine))) == 1
        wrapped.apply(ones)
        plain.apply(ones, theirs)
        plain.apply(ones)
        harness.assert_same(mine, theirs)

    def test_averages_end_training_in_the_weights(self, wrap):
        wrapped, mine = pair(wrap, everything)[1::2]
        wrapped.apply([tf.ones(shape) for shape in harness.SHAPES])
        wrapped.finalize_variable_values(mine)
        averages = wrapped.inner_optimizer._model_variables_moving_average
        harness.assert_close(
            harness.values(mine), harness.values(averages), atol=0
        )

    def test_variables_are_its_own_then_the_inner_ones(self, wrap):
        wrapped, mine = pair(wrap, everything)[1::2]
        inner = wrapped.inner_optimizer.variables
        assert wrapped.variables == own_variables(wrapped) + inner
        ids = [id(variable) for variable in wrapped.variables]
        assert len(set(ids)) == len(ids)
        wrapped.build(mine)  # A second build changes nothing.
        assert [id(variable) for variable in wrapped.variables] == ids


# Every argument, at a value that is not its default.
SETTINGS = {
    "adascale": lambda inner: AdaScale(
        inner,
        scale=8,
        estimator="ratio",
        smoothing=0.25,
        power=0.5,
        preconditioned=True,
        scale_ema=False,
        name="mine",
    ),
    "adamscale": lambda inner: AdamScale(
        inner,
        scale=0.5,
        estimator="differenced",
        smoothing=0.0,
        power=1.0,
        preconditioned=False,
        scale_ema=False,
        name="mine",
    ),
    "adasum": lambda inner: Adasum(
        inner, combine="gradients", group_size=4, name="mine"
    ),
}


class TestConfig:
    @staticmethod
    def copied(optimizer):
        config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
        copy = keras.optimizers.deserialize(config)
        assert type(copy) is type(optimizer)
        assert copy.get_config() == optimizer.get_config()
        assert repr(copy) == repr(optimizer)
        return copy

    @pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
    def test_has_every_argument(self, make):
        optimizer = self.copied(make(everything()))
        assert optimizer.name == "mine"
        config = optimizer.get_config()
        default = type(optimizer)(everything()).get_config()
        assert config.keys() == default.keys()
        for name in config.keys() - {"inner_optimizer"}:
            assert config[name] != default[name], name

    @pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
    def test_repr_shows_the_settings(self, make):
        optimizer = make(adam(0.25))
        shown = repr(optimizer)
        assert shown.startswith(f"{type(optimizer).__name__}(")
        assert "Adam" in shown
        settings = optimizer.get_config()
        for name in settings.keys() - {"inner_optimizer"}:
            assert f"{name}={settings[name]!r}" in shown

    @every
    def test_copy_steps_alike(self, wrap):
        optimizer = wrap(
            LossScaleOptimizer(
                everything(), initial_scale=64.0, dynamic_growth_steps=2
            )
        )
        both = optimizer, self.copied(optimizer)
        weights = [harness.variables(harness.twos()) for _ in both]
        for gradients in harness.random_gradients(3):
            for one, mine in zip(both, weights):
                one.apply([tf.constant(g[0]) for g in gradients], mine)
        harness.assert_same(*weights)
        harness.assert_same(*both)

    @every
    def test_has_the_rate_as_it_was_set(self, wrap):
        optimizer = wrap(adam())
        optimizer.learning_rate = 0.125
        assert float(self.copied(optimizer).learning_rate) == 0.125


@every
def test_resumes_from_a_saved_model_to_the_bit(wrap, tmp_path):
    """Steps after loading equal those of an uninterrupted run."""
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.compile(wrap(LossScaleOptimizer(everything())), "mse")
    steps = harness.random_gradients(6)

    def train(model, steps):
        for gradients in steps:
            model.optimizer.apply(
                [
                    model.optimizer.scale_loss(tf.constant(g[0]))
                    for g in gradients
                ],
                model.trainable_variables,
            )

    train(model, steps[:3])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        train(one, steps[3:])
    harness.assert_same(loaded.trainable_variables, model.trainable_variables)
    harness.assert_same(loaded.optimizer, model.optimizer)


@every
class TestRefusedWhenMade:
    """The cases are in `checks_test.py`."""

    def test_what_cannot_be_wrapped(self, wrap):
        with harness.refused("`inner_optimizer` must be a keras.optimizers."):
            wrap("adam")

    def test_inner_optimizer_that_is_wrapped_already(self, wrap):
        """Two wrappers would multiply the rate by the gain twice."""
        inner = adam()
        wrap(inner)
        with harness.refused("`inner_optimizer` must neither be a wrapper nor"):
            wrap(inner)

    @pytest.mark.parametrize("name", ["learning_rate", "clipnorm", "scales"])
    def test_argument_of_the_inner_optimizer(self, name, wrap):
        inner = adam()
        with harness.refused(f"`{name}` must be an argument of", f"{name}=1.0"):
            wrap(inner, **{name: 1.0})
        # The inner optimizer still works by itself.
        assert isinstance(inner.learning_rate, keras.Variable)

    def test_argument_by_position(self, wrap):
        with pytest.raises(TypeError):
            wrap(adam(), 2)


@every
class TestRefusedSteps:
    @pytest.mark.parametrize("shapes", [[(2,), (3, 2)], [None, None]])
    def test_gradients_that_do_not_match(self, shapes, wrap):
        wrapped, mine = pair(wrap, adam)[1::2]
        gradients = [None if s is None else tf.ones(s) for s in shapes]
        for variables in (mine, None):
            with (
                harness.untouched(wrapped, *mine),
                harness.refused("`grads` must hold a gradient of"),
            ):
                wrapped.apply(gradients, variables)

    def test_variables_that_are_missing_or_unknown(self, wrap):
        optimizer = wrap(adam())
        rule = "`trainable_variables` must be passed in the first call"
        with harness.refused(rule):
            optimizer.apply([tf.ones(2)])
        assert not optimizer.built
        optimizer.build([keras.Variable([1.0])])
        other = keras.Variable([1.0])
        with (
            harness.untouched(optimizer, other),
            pytest.raises(ValueError, match="Unknown variable"),
        ):
            optimizer.apply([tf.ones(1)], [other])

    def test_first_step_leaves_the_optimizer_unbuilt(self, wrap):
        optimizer = wrap(adam())
        with (
            harness.untouched(optimizer),
            pytest.raises(ValueError, match="`grads` must hold"),
        ):
            optimizer.apply([None], [keras.Variable([1.0])])
        assert not optimizer.built
        assert not optimizer.inner_optimizer.built

    @pytest.mark.parametrize("mode", harness.MODES)
    def test_in_cross_replica_context(self, mode, wrap):
        strategy = harness.strategy_of(2)
        with strategy.scope():
            weight = keras.Variable([1.0])
            optimizer = wrap(adam())
            optimizer.build([weight])

        @harness.MODES[mode]
        def step():
            with strategy.scope():
                optimizer.apply([tf.ones(1)], [weight])

        rule = f"`{optimizer.name}.apply` must be called inside strategy.run"
        with harness.untouched(weight, optimizer), harness.refused(rule):
            step()

    def test_of_an_inner_optimizer_made_outside_the_scope(self, wrap):
        inner, strategy = adam(), harness.strategy_of(2)
        with strategy.scope():
            optimizer = wrap(inner)
            weight = keras.Variable([1.0])
        rule = f"`{optimizer.name}` and its inner optimizer must be made in"
        with harness.untouched(weight, optimizer), harness.refused(rule):
            strategy.run(lambda: optimizer.apply([tf.ones(1)], [weight]))
        assert not optimizer.built
