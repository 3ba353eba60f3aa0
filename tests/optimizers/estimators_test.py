"""Estimators by hand: their needs, their memory and their measurements."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import harness
from tf_adascale.optimizers import estimators


def observation(gradients=None, **arguments):
    """Returns a step, by default of two samples at S = 4."""
    gradients = [] if gradients is None else gradients
    return estimators.Observation(
        **{
            "slots": list(range(len(gradients))),
            "gradients": [tf.constant(g, tf.float32) for g in gradients],
            "divisors": None,
            "loss_scale": None,
            "mean_sqnorm": tf.constant(12.0),
            "sqnorm_of_mean": tf.constant(2.0),
            "num_samples": 2,
            "scale": 4,
            **arguments,
        }
    )


def measured(measurement):
    return [float(moment) for moment in measurement.moments]


def test_there_is_one_for_each_kind():
    assert list(estimators.KINDS) == ["moments", "ratio", "differenced"]


@pytest.mark.parametrize("kind", ["moments", "ratio"])
class TestAmongSamples:
    def test_needs_two_samples_and_their_norms(self, kind):
        estimator = estimators.KINDS[kind]()
        assert estimator.least_samples == 2
        assert not estimator.needs_sample_sqnorms(1)
        assert estimator.needs_sample_sqnorms(2)

    def test_remembers_nothing(self, kind):
        optimizer = keras.optimizers.SGD()
        with harness.untouched(optimizer):
            estimators.KINDS[kind]().build(optimizer, [keras.Variable([1.0])])

    def test_measures_nothing_from_one_sample(self, kind):
        estimator = estimators.KINDS[kind]()
        one = observation(mean_sqnorm=None, num_samples=1)
        assert estimator.measure(one).moments is None

    @pytest.mark.parametrize("loss_scale", [None, 8.0])
    def test_measures_moments_of_the_loss_itself(self, kind, loss_scale):
        # sigma^2 = 4/1 (5 - 3) = 8, mu^2 = 3 - 8/4 = 1.
        unit = 1.0 if loss_scale is None else loss_scale**2
        measurement = estimators.KINDS[kind]().measure(
            observation(
                mean_sqnorm=tf.constant(5.0 * unit),
                sqnorm_of_mean=tf.constant(3.0 * unit),
                loss_scale=loss_scale,
            )
        )
        assert measured(measurement) == [8.0, 1.0]
        assert measurement.is_measured is None
        assert list(measurement.assignments) == []

    def test_clamps_moments_only(self, kind):
        """The ratio does not clamp; its epsilon guards the averages."""
        # sigma^2 = 4 (12 - 2) = 40, mu^2 = 2 - 40/4 = -8.
        estimator = estimators.KINDS[kind]()
        moments = measured(estimator.measure(observation()))
        assert moments == [40.0, 0.0 if kind == "moments" else -8.0]
        assert estimator.epsilon == (0.0 if kind == "moments" else 1e-6)


class TestDifferenced:
    @staticmethod
    def built(shapes=((2,),)):
        optimizer = keras.optimizers.SGD()
        estimator = estimators.Differenced()
        weights = harness.variables(harness.twos(shapes))
        optimizer.build(weights)
        estimator.build(optimizer, weights)
        return estimator, optimizer

    @staticmethod
    def step(estimator, *args, **kwargs):
        """Measures and remembers, like a step that is taken."""
        measurement = estimator.measure(observation(*args, **kwargs))
        for variable, value in measurement.assignments:
            variable.assign(value)
        return measurement

    def test_needs_one_sample_and_no_norms(self):
        estimator = estimators.Differenced()
        assert estimator.least_samples == 1
        assert estimator.epsilon == 0
        assert not estimator.needs_sample_sqnorms(8)

    def test_remembers_a_gradient_and_a_count(self):
        estimator, optimizer = self.built()
        self.step(estimator, [[1.0, 3.0]])
        assert harness.value(
            optimizer, "weight_0_previous_gradient"
        ).tolist() == [
            1.0,
            3.0,
        ]
        assert harness.value(optimizer, "seen_steps") == 1

    def test_measures_from_the_second_step_on(self):
        estimator, _ = self.built()
        assert not self.step(estimator, [[1.0, 1.0]]).is_measured
        measurement = self.step(estimator, [[3.0, 1.0]])
        assert measurement.is_measured
        # |g - g'|^2 = 4, <g, g'> = 4: sigma^2 = 4/2 * 4.
        assert measured(measurement) == [8.0, 4.0]

    def test_remembers_gradients_of_the_loss_itself(self):
        estimator, optimizer = self.built()
        self.step(estimator, [[2.0, 2.0]], loss_scale=2.0)
        measurement = self.step(estimator, [[24.0, 8.0]], loss_scale=8.0)
        assert measured(measurement) == [8.0, 4.0]
        slot = harness.value(optimizer, "weight_0_previous_gradient")
        assert slot.tolist() == [3.0, 1.0]

    def test_compares_in_units_of_now(self):
        estimator, optimizer = self.built()
        self.step(estimator, [[2.0, 4.0]])
        measurement = self.step(
            estimator, [[6.0, 4.0]], divisors=[tf.constant([2.0, 4.0])]
        )
        assert measured(measurement) == [8.0, 4.0]
        slot = harness.value(optimizer, "weight_0_previous_gradient")
        assert slot.tolist() == [6.0, 4.0]

    def test_leaves_variables_without_a_gradient_out(self):
        estimator, optimizer = self.built([(1,), (1,)])
        self.step(estimator, [[1.0], [1.0]])
        measurement = self.step(estimator, [[3.0]], slots=[1])
        assert measured(measurement) == [8.0, 3.0]
        assert harness.value(optimizer, "weight_0_previous_gradient") == [1.0]
        assert harness.value(optimizer, "weight_1_previous_gradient") == [3.0]

    def test_clamps_what_is_negative(self):
        estimator, _ = self.built()
        self.step(estimator, [[1.0, 0.0]])
        variance, sqnorm = measured(self.step(estimator, [[-1.0, 0.0]]))
        assert (variance, sqnorm) == (8.0, 0.0)
        np.testing.assert_allclose(
            measured(self.step(estimator, [[-1.0, 0.0]])), [0, 1], atol=1e-29
        )
