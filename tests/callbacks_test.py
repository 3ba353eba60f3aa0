"""Callbacks: the step that training ends at, and what the logs show."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

import tf_adascale
from tf_adascale.callbacks import ScalingLog, StopAtScaleInvariantStep

NAMES = {
    "gain": "gain",
    "scale_invariant_step": "scale_invariant_step",
    "learning_rate": "effective_learning_rate",
    "gradient_variance": "gradient_variance",
    "gradient_sqnorm": "gradient_sqnorm",
    "noise_scale": "noise_scale",
}
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)


def mean_of_outputs(y_true, y_pred):
    """A loss whose gradient is the mean of the inputs."""
    del y_true
    return y_pred


def linear_model(rate=0.125, **compiled):
    inputs = keras.Input((2,))
    outputs = keras.layers.Dense(1, use_bias=False)(inputs)
    model = tf_adascale.Model(inputs, outputs)
    optimizer = tf_adascale.AdaScale(keras.optimizers.SGD(rate))
    model.compile(optimizer, mean_of_outputs, microbatches=2, **compiled)
    return model


def batches(samples, steps, *, size=2):
    """Batches of the rows of `samples`, which are repeated."""
    rows = np.tile(np.array(samples, "float32"), (steps, 1))
    targets = np.zeros((len(rows), 1), "float32")
    return tf.data.Dataset.from_tensor_slices((rows, targets)).batch(size)


# All signal, so the gain is 1; all noise, so it is 2; and between the two: A =
# 3/2, T = 5/4, gain = A/T = 6/5.
EQUAL = [[1, 2], [1, 2]]
OPPOSITE = [[1, 2], [-1, -2]]
BETWEEN = [[1, 0], [1, 1]]


def noisy(steps, *, size=2):
    """Batches of samples whose gain changes from step to step."""
    samples = np.random.default_rng(0).normal(0.3, 1.0, (size * steps, 2))
    return batches(samples, 1, size=size)


def fit(model, dataset, callbacks, **arguments):
    return model.fit(
        dataset,
        **{"callbacks": callbacks, "verbose": 0, "shuffle": False, **arguments},
    )


def iterations(model):
    return int(tf.convert_to_tensor(model.optimizer.iterations))


class Recorder(keras.callbacks.Callback):
    """Keeps tau after each execution."""

    def __init__(self):
        super().__init__()
        self.progress = []

    def on_train_batch_end(self, batch, logs=None):
        self.progress.append(float(self.model.optimizer.scale_invariant_step))


class TestStopAtScaleInvariantStep:
    @pytest.mark.parametrize(
        "samples, total_steps, expected",
        [
            (EQUAL, 5, 5),
            (EQUAL, 4.5, 5),
            (OPPOSITE, 6, 3),
            (OPPOSITE, 5, 3),
            (OPPOSITE, 1, 1),
            # 1.2, 2.4, 3.6, 4.8, 6.0: the fourth is the first beyond 4.5.
            (BETWEEN, 4.5, 4),
        ],
    )
    def test_stops_at_the_first_step_that_reaches_the_total(
        self, samples, total_steps, expected
    ):
        model = linear_model()
        fit(
            model,
            batches(samples, 10),
            [StopAtScaleInvariantStep(total_steps)],
        )
        assert iterations(model) == expected

    def test_stops_over_several_epochs(self):
        model = linear_model()
        history = fit(
            model,
            batches(EQUAL, 3),
            [StopAtScaleInvariantStep(7)],
            epochs=10,
        )
        assert iterations(model) == 7
        assert len(history.epoch) == 3

    @pytest.mark.parametrize("steps_per_execution", [1, 4])
    @pytest.mark.parametrize("total_steps", [3, 17.3, 40])
    def test_not_one_execution_late(self, steps_per_execution, total_steps):
        model = linear_model(steps_per_execution=steps_per_execution)
        recorder = Recorder()
        fit(
            model,
            noisy(60),
            [recorder, StopAtScaleInvariantStep(total_steps)],
        )
        *before, last = recorder.progress
        assert last >= total_steps
        assert all(value < total_steps for value in before)
        assert iterations(model) == steps_per_execution * len(recorder.progress)

    def test_stops_under_replicas(self, strategy_of):
        with strategy_of(2).scope():
            model = linear_model()
        # Four samples a step, two pairs of opposites: the gain is 4.
        dataset = batches(OPPOSITE * 2, 10, size=4)
        fit(model, dataset, [StopAtScaleInvariantStep(9)])
        assert iterations(model) == 3

    def test_may_be_used_again(self):
        model, stop = linear_model(), StopAtScaleInvariantStep(4)
        fit(model, batches(EQUAL, 10), [stop])
        stop.total_steps = 6
        fit(model, batches(EQUAL, 10), [stop])
        assert iterations(model) == 6

    @pytest.mark.parametrize("total_steps", [0, -1, np.inf, np.nan])
    def test_refuses_a_total_that_is_none(self, total_steps):
        with pytest.raises(
            ValueError,
            match="The total of scale-invariant steps is out of range. "
            r"Expected a finite number > 0. Received: total_steps=",
        ):
            StopAtScaleInvariantStep(total_steps)


@pytest.mark.parametrize(
    "callback", [StopAtScaleInvariantStep(3), ScalingLog()]
)
def test_refuses_an_optimizer_without_a_gain(callback):
    model = linear_model()
    model.compile("sgd", mean_of_outputs)
    before = model.get_weights()[0].copy()
    with pytest.raises(
        ValueError,
        match=f"{type(callback).__name__} found an optimizer without a gain. "
        "Expected a model compiled with tf_adascale.AdaScale. "
        "Received: optimizer=<.*SGD",
    ):
        fit(model, batches(EQUAL, 1), [callback])
    np.testing.assert_array_equal(model.get_weights()[0], before)


class TestScalingLog:
    @pytest.fixture(params=[0.125, SCHEDULE], ids=["constant", "schedule"])
    def rate(self, request):
        return request.param

    def values(self, model):
        return {
            name: float(getattr(model.optimizer, attribute))
            for name, attribute in NAMES.items()
        }

    def test_history_ends_with_the_optimizers_values(self, rate):
        model = linear_model(rate)
        history = fit(model, noisy(4), [ScalingLog()], epochs=2).history
        assert set(history) == {"loss", *NAMES}
        for name, value in self.values(model).items():
            assert history[name][-1] == value
            assert len(history[name]) == 2

    def test_values_by_hand(self):
        model = linear_model(0.125)
        history = fit(model, batches(BETWEEN, 3), [ScalingLog()]).history
        # A = 3/2, T = 5/4, S = n = 2: variance = 2 (A - T) = 1/2,
        # sqnorm = T - (1/2)/2 = 1, noise scale = 1/2, three gains of 6/5.
        expected = {
            "gain": 1.2,
            "scale_invariant_step": 3.6,
            "learning_rate": 1.2 * 0.125,
            "gradient_variance": 0.5,
            "gradient_sqnorm": 1.0,
            "noise_scale": 0.5,
        }
        for name, value in expected.items():
            assert history[name] == pytest.approx([value], rel=1e-6)

    def test_learning_rate_follows_the_schedule(self):
        model = linear_model(SCHEDULE)
        history = fit(
            model, batches(EQUAL, 5), [ScalingLog()], epochs=2
        ).history
        # Gain 1; the rate shown is that of the step to come.
        assert history["learning_rate"] == pytest.approx([0.05, 0.025])

    def test_csv_logger(self, rate, tmp_path):
        path = tmp_path / "log.csv"
        model = linear_model(rate)
        callbacks = [ScalingLog(), keras.callbacks.CSVLogger(str(path))]
        fit(model, noisy(4), callbacks, epochs=2)
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2
        assert set(NAMES) <= set(rows[0])
        for name, value in self.values(model).items():
            assert float(rows[-1][name]) == pytest.approx(value, rel=1e-6)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_tensorboard(self, rate, tmp_path):
        model = linear_model(rate)
        shown = self.tensorboard(model, tmp_path)
        for name, value in self.values(model).items():
            for tag, count in ((f"epoch_{name}", 2), (f"batch_{name}", 8)):
                assert len(shown[tag]) == count
                if tag != "epoch_learning_rate":
                    assert shown[tag][-1] == pytest.approx(value, rel=1e-6)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_tensorboard_shows_the_effective_rate(self, rate, tmp_path):
        # TensorBoard puts the rate of the optimizer in place of the log's.
        model = linear_model(rate)
        shown = self.tensorboard(model, tmp_path)["epoch_learning_rate"]
        # In Keras 3.15 that is the inner one's; in 3.10 it is the wrapper's,
        # which reads as the base rate if it can be set.
        expected = [
            float(optimizer.learning_rate)
            for optimizer in (
                model.optimizer.inner_optimizer,
                model.optimizer,
            )
        ]
        assert expected[0] == float(model.optimizer.effective_learning_rate)
        if keras.version() >= "3.15":
            assert shown[-1] == pytest.approx(expected[0], rel=1e-6)
        else:
            assert shown[-1] == pytest.approx(expected[1], rel=1e-6)

    def tensorboard(self, model, path):
        """Fits, and returns the values of each tag that were written."""
        board = keras.callbacks.TensorBoard(
            str(path), update_freq="batch", write_graph=False
        )
        fit(model, noisy(4), [ScalingLog(), board], epochs=2)
        events = event_accumulator.EventAccumulator(
            str(path / "train"), size_guidance={"tensors": 0}
        )
        events.Reload()
        return {
            tag: [
                float(tf.make_ndarray(event.tensor_proto))
                for event in events.Tensors(tag)
            ]
            for tag in events.Tags()["tensors"]
            if tag.startswith(("epoch_", "batch_"))
        }

    @pytest.mark.parametrize("verbose", [1, 2])
    def test_progress_bar(self, verbose, capsys):
        model = linear_model()
        fit(model, batches(BETWEEN, 3), [ScalingLog()], verbose=verbose)
        shown = capsys.readouterr().out
        for name in NAMES:
            assert f"{name}: " in shown

    def test_steps_per_execution_and_replicas(self, strategy_of):
        with strategy_of(2).scope():
            model = linear_model(steps_per_execution=3)
        history = fit(model, noisy(4, size=4), [ScalingLog()]).history
        for name, value in self.values(model).items():
            assert history[name] == [value]


class TestKerasCallbacksBesideIt:
    def test_learning_rate_scheduler_sets_the_base_rate(self):
        model = linear_model(0.125)
        seen = []

        def halved(epoch, rate):
            seen.append(rate)
            return rate / 2

        callbacks = [keras.callbacks.LearningRateScheduler(halved)]
        fit(model, batches(BETWEEN, 2), callbacks, epochs=3)
        # It reads what it set, without the gain.
        assert seen == [0.125, 0.0625, 0.03125]
        rate = float(model.optimizer.effective_learning_rate)
        assert rate == pytest.approx(1.2 * 0.015625, rel=1e-6)

    def test_reduce_on_plateau_reduces_the_base_rate(self):
        model = linear_model(0.125)
        plateau = keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=1e9
        )
        fit(model, batches(BETWEEN, 2), [plateau], epochs=3)
        # The first epoch is the best; each of the other two is a plateau.
        rate = float(model.optimizer.effective_learning_rate)
        assert rate == pytest.approx(1.2 * 0.125 / 4, rel=1e-6)
