"""Callbacks that watch progress: the end of training, and the logs."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing import event_accumulator

import tf_adascale
from tests import harness
from tf_adascale.callbacks import ScalingLog, StopAtScaleInvariantStep

NAMES = {
    "gain": "gain",
    "scale_invariant_step": "scale_invariant_step",
    "effective_learning_rate": "effective_learning_rate",
    "gradient_variance": "gradient_variance",
    "gradient_sqnorm": "gradient_sqnorm",
    "noise_scale": "noise_scale",
}
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)

# All signal: gain 1. All noise: gain 2. Between the two: A = 3/2, T = 5/4,
# gain = A/T = 6/5.
EQUAL = [[1, 2], [1, 2]]
OPPOSITE = [[1, 2], [-1, -2]]
BETWEEN = [[1, 0], [1, 1]]


def linear_model(rate=0.125, *, num_replicas=1, smoothing=None, **compiled):
    """Returns a model whose two input rows are its gradient samples."""
    with harness.strategy_of(num_replicas).scope():
        optimizer = tf_adascale.AdaScale(
            keras.optimizers.SGD(rate), smoothing=smoothing
        )
        return harness.linear_model(
            tf_adascale.Model, optimizer, microbatches=2, **compiled
        )


def batches(samples, steps, *, size=2):
    """Returns batches of `samples`, repeated for each step."""
    rows = np.tile(np.array(samples, "float32"), (steps, 1))
    return harness.batches(rows, np.zeros((len(rows), 1), "float32"), size)


def noisy(steps, *, size=2):
    """Returns batches of samples whose gain changes at every step."""
    samples = np.random.default_rng(0).normal(0.3, 1.0, (size * steps, 2))
    return batches(samples, 1, size=size)


def progress(model):
    return float(model.optimizer.scale_invariant_step)


class TestStopAtScaleInvariantStep:
    def test_stops_at_the_first_step_that_reaches_the_total(self):
        # Averages are off. Each fit continues from the last one.
        model = linear_model(smoothing=0.0)
        for samples, total_steps, expected in [
            (EQUAL, 5, 5),
            (EQUAL, 4.5, 5),
            (OPPOSITE, 6, 3),
            (OPPOSITE, 5, 3),
            (OPPOSITE, 1, 1),
            # 1.2, 2.4, 3.6, 4.8, 6.0: the fourth is the first beyond 4.5.
            (BETWEEN, 4.5, 4),
        ]:
            before = harness.iterations(model)
            stop = StopAtScaleInvariantStep(progress(model) + total_steps)
            harness.fit(model, batches(samples, 10), callbacks=[stop])
            assert harness.iterations(model) - before == expected

    def test_stops_over_several_epochs_and_may_be_used_again(self):
        model, stop = linear_model(), StopAtScaleInvariantStep(7)
        history = harness.fit(
            model, batches(EQUAL, 3), callbacks=[stop], epochs=10
        )
        assert harness.iterations(model) == 7
        assert len(history.epoch) == 3
        stop.total_steps = 9
        harness.fit(model, batches(EQUAL, 3), callbacks=[stop])
        assert harness.iterations(model) == 9

    @pytest.mark.parametrize("steps_per_execution", [1, 4])
    def test_is_not_one_execution_late(self, steps_per_execution):
        model = linear_model(steps_per_execution=steps_per_execution)
        for total_steps in (3, 17.3, 40):
            seen, total = [], progress(model) + total_steps
            look = keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs, seen=seen: seen.append(
                    progress(model)
                )
            )
            stop = StopAtScaleInvariantStep(total)
            harness.fit(model, noisy(60), callbacks=[look, stop])
            *before, last = seen
            assert last >= total
            assert all(value < total for value in before)

    def test_stops_under_replicas(self):
        model = linear_model(num_replicas=2)
        # Four samples a step, two pairs of opposites: the gain is 4.
        dataset = batches(OPPOSITE * 2, 10, size=4)
        stop = StopAtScaleInvariantStep(9)
        harness.fit(model, dataset, callbacks=[stop])
        assert harness.iterations(model) == 3

    @pytest.mark.parametrize("total_steps", [0, np.inf])
    def test_refuses_a_total_that_is_none(self, total_steps):
        with harness.refused(
            "`total_steps` must be", f"total_steps={total_steps!r}"
        ):
            StopAtScaleInvariantStep(total_steps)


@pytest.mark.parametrize(
    "callback", [StopAtScaleInvariantStep(3), ScalingLog()]
)
def test_an_optimizer_without_a_gain_is_refused(callback):
    model = linear_model()
    model.compile("sgd", harness.mean_of_outputs)
    with (
        harness.untouched(model),
        harness.refused(
            "`model.optimizer` must be a tf_adascale.AdaScale",
            "model.optimizer=<keras",
        ) as raised,
    ):
        harness.fit(model, batches(EQUAL, 1), callbacks=[callback])
    assert type(callback).__name__ in str(raised.value)


class TestScalingLog:
    def values(self, model):
        return {
            name: float(getattr(model.optimizer, attribute))
            for name, attribute in NAMES.items()
        }

    def test_values_by_hand(self):
        model = linear_model(0.125)
        history = harness.fit(
            model, batches(BETWEEN, 3), callbacks=[ScalingLog()]
        ).history
        # A = 3/2, T = 5/4, S = n = 2: variance = 2 (A - T) = 1/2,
        # sqnorm = T - (1/2)/2 = 1, noise scale = 1/2, three gains of 6/5.
        expected = {
            "gain": 1.2,
            "scale_invariant_step": 3.6,
            "effective_learning_rate": 1.2 * 0.125,
            "gradient_variance": 0.5,
            "gradient_sqnorm": 1.0,
            "noise_scale": 0.5,
        }
        assert set(history) == {"loss", *expected}
        for name, value in expected.items():
            assert history[name] == pytest.approx([value], rel=1e-6)

    @pytest.mark.parametrize("place", range(3))
    def test_its_place_in_the_list_does_not_matter(self, place, tmp_path):
        seen = []

        class Log(ScalingLog):
            """A subclass that has a method of its own."""

            def set_model(self, model):
                super().set_model(model)

        callbacks = [
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: seen.append(set(logs))
            ),
            keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        ]
        callbacks.insert(place, Log())
        given = list(callbacks)
        model = linear_model(0.125)
        harness.fit(model, batches(BETWEEN, 3), callbacks=callbacks)
        with (tmp_path / "log.csv").open() as file:
            [row] = csv.DictReader(file)
        assert set(NAMES) <= set(row)
        assert float(row["gain"]) == pytest.approx(1.2)
        assert all(set(NAMES) <= names for names in seen)
        assert callbacks == given

    def test_in_a_list_of_keras_and_alone(self):
        model = linear_model(0.125)
        log, other = ScalingLog(), keras.callbacks.Callback()
        both = keras.callbacks.CallbackList([other, log], model=model)
        assert both.callbacks == [log, other]
        log.set_model(model)
        assert log.model is model

    def test_the_rate_has_a_name_that_no_other_callback_writes(self):
        model = linear_model(0.125)
        reduce = keras.callbacks.ReduceLROnPlateau("loss", patience=99)
        history = harness.fit(
            model, batches(BETWEEN, 3), callbacks=[ScalingLog(), reduce]
        ).history
        # The gain is 6/5.
        assert history["effective_learning_rate"] == [pytest.approx(0.15)]
        assert history["learning_rate"] == [0.125]

    def test_the_learning_rate_follows_the_schedule(self):
        model = linear_model(SCHEDULE)
        history = harness.fit(
            model, batches(EQUAL, 5), callbacks=[ScalingLog()], epochs=2
        ).history
        # The gain is 1. The log shows the rate of the next step.
        rates = history["effective_learning_rate"]
        assert rates == pytest.approx([0.05, 0.025])

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("rate", [0.125, SCHEDULE], ids=["number", "decay"])
    def test_is_shown_by_keras_callbacks(self, rate, tmp_path):
        model = linear_model(rate)
        history = harness.fit(
            model,
            noisy(4),
            callbacks=[
                ScalingLog(),
                keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
                keras.callbacks.TensorBoard(
                    str(tmp_path), update_freq="batch", write_graph=False
                ),
            ],
            epochs=2,
        ).history
        with (tmp_path / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2
        board = self.tensorboard(tmp_path / "train")
        for name, value in self.values(model).items():
            assert history[name][-1] == value
            assert len(history[name]) == 2
            assert float(rows[-1][name]) == pytest.approx(value, rel=1e-6)
            for tag, count in ((f"epoch_{name}", 2), (f"batch_{name}", 8)):
                assert len(board[tag]) == count
                assert board[tag][-1] == pytest.approx(value, rel=1e-6)

    def tensorboard(self, path):
        """Returns the values that were written for each tag."""
        events = event_accumulator.EventAccumulator(
            str(path), size_guidance={"tensors": 0}
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

    def test_is_shown_by_the_progress_bar(self, capsys):
        model = linear_model()
        for verbose in (1, 2):
            harness.fit(
                model,
                batches(BETWEEN, 3),
                callbacks=[ScalingLog()],
                verbose=verbose,
            )
            shown = capsys.readouterr().out
            assert all(f"{name}: " in shown for name in NAMES)

    def test_under_replicas_with_several_steps_per_execution(self):
        model = linear_model(num_replicas=2, steps_per_execution=3)
        history = harness.fit(
            model, noisy(4, size=4), callbacks=[ScalingLog()]
        ).history
        for name, value in self.values(model).items():
            assert history[name] == [value]


class TestKerasCallbacksBesideIt:
    def test_learning_rate_scheduler_sets_the_base_rate(self):
        model, seen = linear_model(0.125), []

        def halved(epoch, rate):
            seen.append(rate)
            return rate / 2

        halve = keras.callbacks.LearningRateScheduler(halved)
        harness.fit(model, batches(BETWEEN, 2), callbacks=[halve], epochs=3)
        # The callback reads the rate that it set, without the gain.
        assert seen == [0.125, 0.0625, 0.03125]
        rate = float(model.optimizer.effective_learning_rate)
        assert rate == pytest.approx(1.2 * 0.015625, rel=1e-6)

    def test_reduce_on_plateau_reduces_the_base_rate(self):
        model = linear_model(0.125)
        plateau = keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=1e9
        )
        harness.fit(model, batches(BETWEEN, 2), callbacks=[plateau], epochs=3)
        # The first epoch is the best. The other two are plateaus.
        rate = float(model.optimizer.effective_learning_rate)
        assert rate == pytest.approx(1.2 * 0.125 / 4, rel=1e-6)
