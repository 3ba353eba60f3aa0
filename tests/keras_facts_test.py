"""Faults of stock Keras under `tf.distribute` that this library does not have.

Each class tests one fault: in the first test stock Keras fails, in the second
this library does the same job on the same data. The first tests pass on all
supported versions of Keras (checked on 3.10.0 and 3.15.1). If one fails on a
later version, Keras has been repaired.

All train one weight vector w on the loss mean(x . w), whose gradient is mean(x)
over the batch, at rate 1 from w = 0: after one step w = -mean(x).

`processes/multiworker_test.py` tests K1, which needs several processes.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness

# Sixteen rows whose mean is (0.5, 1); all sums are exact in float32.
ROWS = np.array([[0, 0], [1, 1], [0, 1], [1, 2]] * 4, "float32")
MEAN = np.array([0.5, 1.0], "float32")


def fitted(strategy, model_class, make_optimizer, rows, *, batch, **compiled):
    """Returns a model trained for one epoch, and its weight vector."""
    with strategy.scope():
        model = harness.linear_model(model_class, make_optimizer(), **compiled)
    targets = np.zeros((len(rows), 1), "float32")
    dataset = tf.data.Dataset.from_tensor_slices((rows, targets)).batch(
        batch, drop_remainder=True
    )
    harness.fit(model, dataset)
    return model, model.get_weights()[0].ravel()


def sgd(**arguments):
    return keras.optimizers.SGD(1.0, **arguments)


def adascale(inner=sgd):
    return tf_adascale.AdaScale(inner())


@pytest.fixture
def two_replicas(strategy_of):
    return strategy_of(2)


@functools.cache
def two_replicas_with_collectives():
    """Returns two replicas with the default reduction, where Keras fails.

    TensorFlow confuses the collectives of two such strategies, so it is cached.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


class TestK2StepsPerExecution:
    def test_keras_feeds_no_data_to_the_replicas(self):
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="You must feed a value"
        ):
            fitted(
                two_replicas_with_collectives(),
                keras.Model,
                sgd,
                ROWS,
                batch=4,
                steps_per_execution=4,
            )

    @pytest.mark.parametrize("make_optimizer", [sgd, adascale])
    def test_here_all_steps_are_taken(self, make_optimizer):
        model, weights = fitted(
            two_replicas_with_collectives(),
            tf_adascale.Model,
            make_optimizer,
            ROWS,
            batch=4,
            steps_per_execution=4,
        )
        assert harness.iterations(model) == 4
        if make_optimizer is sgd:
            # Four steps, each by the mean of ROWS.
            np.testing.assert_array_equal(weights, -4 * MEAN)


class TestK3JitCompile:
    def test_keras_compiles_across_devices(self, two_replicas):
        with pytest.raises(
            (tf.errors.InvalidArgumentError, ValueError),
            match="Trying to access resource",
        ):
            fitted(
                two_replicas, keras.Model, sgd, ROWS, batch=16, jit_compile=True
            )

    @pytest.mark.parametrize("microbatches", [1, 2])
    def test_here_each_replica_is_compiled(self, two_replicas, microbatches):
        _, weights = fitted(
            two_replicas,
            tf_adascale.Model,
            sgd,
            ROWS,
            batch=16,
            jit_compile=True,
            microbatches=microbatches,
        )
        np.testing.assert_array_equal(weights, -MEAN)


class TestK4Accumulation:
    def test_keras_merges_inside_a_condition(self, two_replicas):
        with pytest.raises(RuntimeError, match="merge_call"):
            fitted(
                two_replicas,
                keras.Model,
                lambda: sgd(gradient_accumulation_steps=2),
                ROWS,
                batch=8,
            )

    def test_here_microbatches_accumulate(self, two_replicas):
        _, weights = fitted(
            two_replicas,
            tf_adascale.Model,
            sgd,
            ROWS,
            batch=16,
            microbatches=2,
        )
        np.testing.assert_array_equal(weights, -MEAN)


class TestK5LossScale:
    # The second replica overflows, the first does not.
    OVERFLOWING = np.concatenate([ROWS[:8], np.full_like(ROWS[8:], np.inf)])

    @staticmethod
    def loss_scaled():
        return keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=1024.0)

    def test_keras_looks_at_the_first_replica_only(self, two_replicas):
        model, weights = fitted(
            two_replicas,
            keras.Model,
            self.loss_scaled,
            self.OVERFLOWING,
            batch=16,
        )
        np.testing.assert_array_equal(weights, [-np.inf, -np.inf])
        assert float(model.optimizer.dynamic_scale.numpy()) == 1024

    def test_here_no_replica_steps_and_the_scale_is_halved(self, two_replicas):
        model, weights = fitted(
            two_replicas,
            tf_adascale.Model,
            lambda: adascale(self.loss_scaled),
            self.OVERFLOWING,
            batch=16,
        )
        optimizer = model.optimizer
        np.testing.assert_array_equal(weights, [0, 0])
        assert float(optimizer.inner_optimizer.dynamic_scale.numpy()) == 512
        assert int(optimizer.skipped_steps) == 1


class TestK6NoGradient:
    @staticmethod
    def train(strategy, model_class, make_optimizer):
        """Takes one step of a model with a weight that the loss ignores."""
        with strategy.scope():
            inputs = keras.Input((2,))
            used = keras.layers.Dense(
                1, use_bias=False, kernel_initializer="zeros"
            )(inputs)
            unused = keras.layers.Dense(
                1, use_bias=False, kernel_initializer="ones"
            )(inputs)
            model = model_class(inputs, [used, unused])
            model.compile(make_optimizer(), [harness.mean_of_outputs, None])
        targets = np.zeros((len(ROWS), 1), "float32")
        harness.fit(model, ROWS, [targets, targets], batch_size=16)
        return [weight.ravel() for weight in model.get_weights()]

    def test_keras_warns_with_what_is_no_category(self):
        # Keras's `fit` drops the gradient earlier, with a warning. An optimizer
        # that passes its gradients on unchanged fails.
        optimizer = sgd()
        used, unused = keras.Variable([0.0]), keras.Variable([1.0])
        optimizer.build([used, unused])
        with pytest.raises(TypeError, match="category must be a Warning"):
            optimizer._backend_update_step(
                [tf.ones([1]), None], [used, unused], 1.0
            )

    @pytest.mark.parametrize("num_replicas", [1, 2])
    def test_here_the_weight_is_left_alone(self, strategy_of, num_replicas):
        strategy = strategy_of(num_replicas)
        with pytest.warns(UserWarning, match="Gradients do not exist for"):
            used, unused = self.train(strategy, tf_adascale.Model, adascale)
        # All samples are alike, so the gain is 1.
        np.testing.assert_allclose(used, -MEAN, rtol=1e-6)
        np.testing.assert_array_equal(unused, [1, 1])


class TestK7Clipping:
    # Every row is (3, 4), of norm 5.
    STEEP = np.tile(np.array([[3, 4]], "float32"), (16, 1))

    @staticmethod
    def clipped():
        return sgd(global_clipnorm=1.0)

    def test_keras_clips_before_the_sum(self, two_replicas):
        _, weights = fitted(
            two_replicas, keras.Model, self.clipped, self.STEEP, batch=16
        )
        # Each replica's half gradient (1.5, 2) is clipped to (0.6, 0.8).
        np.testing.assert_allclose(weights, [-1.2, -1.6], rtol=1e-6)

    def test_here_the_mean_is_clipped(self, two_replicas):
        _, weights = fitted(
            two_replicas,
            tf_adascale.Model,
            lambda: adascale(self.clipped),
            self.STEEP,
            batch=16,
        )
        np.testing.assert_allclose(weights, [-0.6, -0.8], rtol=1e-6)
