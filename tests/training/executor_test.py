"""Executions: their steps, outputs and traces, alone and in `fit`."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adascale
from tests import harness
from tf_adascale.training import executor, microbatches


def executed(step, numbers, *, count=1, **arguments):
    """Executes until the data ends; returns the outputs of each execution."""
    strategy = harness.strategy_of(count)
    dataset = tf.data.Dataset.from_tensor_slices(np.float32(numbers))
    execute = executor.Executor(step, strategy=strategy, **arguments)
    iterator = iter(
        strategy.experimental_distribute_dataset(dataset.batch(count))
    )
    outputs = []
    with contextlib.suppress(tf.errors.OutOfRangeError, StopIteration):
        while True:
            outputs.append(
                executor.map_present(
                    lambda x: x.numpy().tolist(), execute(iterator)
                )
            )
    return outputs


each_way = pytest.mark.parametrize("run_eagerly", [False, True])


class TestExecutor:
    @each_way
    def test_an_execution_takes_several_steps_and_less_at_the_end(
        self, run_eagerly
    ):
        total = tf.Variable(0.0)

        def step(batch):
            return {"total": total.assign_add(batch[0]), "absent": None}

        outputs = executed(
            step,
            [1, 2, 3, 4, 5, 6, 7],
            steps_per_execution=3,
            run_eagerly=run_eagerly,
        )
        # 1 + 2 + 3, and so on.
        assert outputs == [
            {"total": total, "absent": None} for total in (6, 21, 28)
        ]

    @each_way
    def test_outputs_are_means_over_the_replicas(self, run_eagerly):
        # Each replica gets one number of each pair.
        outputs = executed(
            lambda batch: (batch[0], [2 * batch]),
            [1, 2, 5, 7],
            count=2,
            run_eagerly=run_eagerly,
        )
        assert outputs == [(1.5, [[3]]), (6, [[12]])]

    def test_takes_batches_of_a_python_iterator(self):
        execute = executor.Executor(
            lambda batch: {"double": 2 * batch},
            strategy=harness.strategy_of(1),
            steps_per_execution=2,
        )
        batches = (tf.constant(number) for number in (1, 2, 3))
        assert [int(execute(batches)["double"]) for _ in range(2)] == [4, 6]
        assert execute(batches) == {}

    def test_an_uneven_batch_is_refused_and_other_errors_pass(self):
        def uneven(batch):
            return tf.shape(microbatches.split(batch, 2))

        execute = executor.Executor(uneven, strategy=harness.strategy_of(1))
        dataset = tf.data.Dataset.from_tensor_slices(tf.zeros((7, 1))).batch(4)
        iterator = iter(dataset)
        assert execute(iterator).numpy().tolist() == [2, 2, 1]
        with harness.refused("`microbatches` must", "batch=3, microbatches=2"):
            execute(iterator)
        other = executor.Executor(
            lambda batch: tf.debugging.check_numerics(1 / batch, "it is 0"),
            strategy=harness.strategy_of(1),
        )
        with pytest.raises(tf.errors.InvalidArgumentError, match="it is 0"):
            other(iter(tf.data.Dataset.from_tensors(0.0)))


def counting(model_class):
    """Returns a subclass that counts the calls of its training step."""

    class Counting(model_class):
        calls = 0

        def train_step(self, *args, **kwargs):
            Counting.calls += 1
            return super().train_step(*args, **kwargs)

    return Counting


def calls_in_a_fit(model_class, num_replicas, **compiled):
    x, y = harness.regression(10 * num_replicas)
    with harness.strategy_of(num_replicas).scope():
        model = harness.dense_model(counting(model_class))
        model.compile("sgd", "mse", **compiled)
    # The last execution takes fewer steps.
    harness.fit(model, x, y, batch_size=num_replicas, epochs=2)
    assert harness.iterations(model) == 20
    return type(model).calls


class TestTraces:
    @pytest.mark.parametrize("steps_per_execution", [1, 4])
    def test_a_step_is_traced_as_often_as_in_stock_keras_at_most(
        self, steps_per_execution
    ):
        arguments = {"steps_per_execution": steps_per_execution}
        stock = calls_in_a_fit(keras.Model, 1, **arguments)
        assert calls_in_a_fit(tf_adascale.Model, 1, **arguments) <= stock
        # A trace calls the step once for each replica.
        assert calls_in_a_fit(tf_adascale.Model, 2, **arguments) == 2

    def test_a_step_on_batches_by_themselves_is_traced_once(self):
        model = harness.dense_model(counting(tf_adascale.Model))
        model.compile("sgd", "mse")
        x, y = harness.regression(4)
        for _ in range(3):
            model.train_on_batch(x, y)
        assert type(model).calls == 1

    @pytest.mark.parametrize(
        # 7 steps in executions of 3: one trace, or three eager executions.
        "run_eagerly, times",
        [(False, 1), (True, 3)],
    )
    def test_metrics_are_reduced_once_per_execution(
        self, run_eagerly, times, monkeypatch
    ):
        strategy = harness.strategy_of(2)
        with strategy.scope():
            model = harness.dense_model(tf_adascale.Model)
            model.compile(
                tf_adascale.AdaScale(keras.optimizers.SGD(0.1)),
                "mse",
                metrics=["mae"],
                steps_per_execution=3,
                run_eagerly=run_eagerly,
            )
        reduced, reduce = [], strategy.reduce

        def count(operation, *args, **kwargs):
            reduced.append(operation)
            return reduce(operation, *args, **kwargs)

        monkeypatch.setattr(strategy, "reduce", count)
        harness.fit(model, *harness.regression(7 * 2), batch_size=2)
        # The loss and a metric. Keras reduces its variables by SUM.
        assert reduced.count("MEAN") == 2 * times


class TestStepsPerExecution:
    STEPS = 7  # 3 does not divide 7.

    def trained(self, num_replicas, dataset, *, epochs=2, **compiled):
        with harness.strategy_of(num_replicas).scope():
            model = harness.dense_model(tf_adascale.Model)
            optimizer = tf_adascale.AdaScale(keras.optimizers.SGD(0.1))
            model.compile(optimizer, "mse", **compiled)
        harness.fit(model, dataset, epochs=epochs)
        assert harness.iterations(model) == epochs * self.STEPS
        return model.get_weights()

    # Keras warns at the end of every dataset of unknown size.
    @pytest.mark.filterwarnings("ignore:.*ran out of data:UserWarning")
    @pytest.mark.parametrize("num_replicas, microbatches", [(1, 2), (2, 1)])
    def test_takes_the_same_steps_of_any_dataset(
        self, num_replicas, microbatches
    ):
        x, y = harness.regression(8 * self.STEPS)
        known = harness.batches(x, y, 8)
        unknown = tf.data.Dataset.from_generator(
            lambda: zip(x, y),
            output_signature=(tf.TensorSpec((3,)), tf.TensorSpec((1,))),
        ).batch(8)
        arguments = {"microbatches": microbatches}
        expected = self.trained(num_replicas, known, **arguments)
        for dataset in (known, unknown):
            received = self.trained(
                num_replicas, dataset, steps_per_execution=3, **arguments
            )
            harness.assert_close(received, expected)

    def test_steps_per_epoch_cut_an_endless_dataset(self):
        x, y = harness.regression(8 * self.STEPS)
        with harness.strategy_of(2).scope():
            model = harness.dense_model(tf_adascale.Model)
            model.compile("sgd", "mse", steps_per_execution=3)
        dataset = harness.batches(x, y, 8).repeat()
        harness.fit(model, dataset, steps_per_epoch=6, epochs=2)
        assert harness.iterations(model) == 12


def test_an_empty_optional_is_none():
    empty = tf.experimental.Optional.empty(tf.TensorSpec([]))
    assert executor.without_optionals({"x": 1, "y": (None, empty)}) == {
        "x": 1,
        "y": (None, None),
    }
