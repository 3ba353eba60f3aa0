"""`fit` under MultiWorkerMirroredStrategy, in two processes."""

import importlib
import types

import numpy as np
import pytest
import tensorflow as tf

from examples.common import training
from examples.studies import benchmarks
from tests.processes import children, multiworker_worker

pytestmark = pytest.mark.multiworker


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The output of each of two workers, which run once for all tests."""

    def make(_):
        with children.cluster(multiworker_worker.__file__) as processes:
            return children.results(processes)

    return children.once(tmp_path_factory, "workers", make)[1]


def test_stock_keras_cannot_fit(workers):
    for worker in workers:
        assert "PerReplica" in worker["stock"]


def test_the_workers_agree_to_the_bit(workers):
    first, second = workers
    for name in ("digest", "history", "evaluated", "gain", "iterations"):
        assert first[name] == second[name]
    assert first["scale_invariant_step"] == second["scale_invariant_step"]
    # Two epochs of 25 steps; the last execution of each takes one.
    assert first["iterations"] == 50
    assert set(first["history"]) == {"loss", "mae", "val_loss", "val_mae"}


def test_two_local_replicas_train_the_same(workers, strategy_of):
    _, local = multiworker_worker.train(strategy_of(2))
    remote = workers[0]
    for expected, received in zip(local["weights"], remote["weights"]):
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)
    # Sums over 16 examples in another order.
    for name in ("gain", "scale_invariant_step", "evaluated"):
        assert remote[name] == pytest.approx(local[name], rel=1e-5)
    for name, values in local["history"].items():
        assert remote["history"][name] == pytest.approx(values, rel=1e-5)


def outputs(weights, x):
    """Returns the model's hidden and last outputs."""
    kernel, bias, output_kernel, output_bias = map(np.asarray, weights)
    hidden = np.tanh(x @ kernel + bias)
    return hidden, hidden @ output_kernel + output_bias


def test_predict_returns_every_workers_predictions_in_order(workers):
    x, _ = multiworker_worker.data()
    _, expected = outputs(workers[0]["weights"], x)
    for worker in workers:
        np.testing.assert_allclose(
            worker["predicted"], expected, rtol=0, atol=1e-5
        )


def test_an_overflow_in_one_worker_skips_the_step_in_both(workers):
    for worker in workers:
        assert worker["skipped"] == 1
        assert worker["digest_after_skipping"] == worker["digest"]


def gradients_of(weights, x, y):
    """Returns the gradients of the mean squared error."""
    hidden, output = outputs(weights, x)
    of_output = 2 * (output - y) / len(x)
    of_hidden = of_output @ weights[2].T * (1 - hidden**2)
    return [
        x.T @ of_hidden,
        of_hidden.sum(0),
        hidden.T @ of_output,
        of_output.sum(0),
    ]


def adasum_of(a, b):
    product = np.sum(a * b)
    return a + b - product / 2 * (a / np.sum(a * a) + b / np.sum(b * b))


def adasum_steps(weights, combine):
    """Returns the weights after all steps, in float64.

    Each worker has a momentum, m <- 0.9 m - g / 20.
    """
    weights = [weight.astype("float64") for weight in weights]
    momenta = [[0 * weight for weight in weights] for _ in range(2)]
    x, y = (
        array.reshape(multiworker_worker.STEPS, 2, -1, array.shape[1])
        for array in multiworker_worker.data()
    )
    for step in np.tile(range(multiworker_worker.STEPS), 2):
        gradients = [gradients_of(weights, *xy) for xy in zip(x[step], y[step])]
        if combine == "gradients":
            gradients = [list(map(adasum_of, *gradients))] * 2
        momenta = [
            [0.9 * m - 0.05 * g for m, g in zip(own, gradient)]
            for own, gradient in zip(momenta, gradients)
        ]
        updates = map(adasum_of, *momenta)
        weights = [w + update for w, update in zip(weights, updates)]
    return weights


@pytest.mark.parametrize("combine", ["updates", "gradients"])
def test_adasum_of_both_workers(workers, combine):
    first, second = (worker["adasum"][combine] for worker in workers)
    assert first["digest"] == second["digest"]
    begin = multiworker_worker.compiled("sgd").get_weights()
    expected = adasum_steps(begin, combine)
    for received, weight in zip(first["weights"], expected, strict=True):
        # 50 steps in float32 against float64.
        np.testing.assert_allclose(received, weight, rtol=0, atol=2e-5)


def test_each_example_is_seen_by_one_worker_once_a_pass(workers):
    first, second = (worker["examples"] for worker in workers)
    assert len(first) == len(second) == 48
    assert sorted(first + second) == list(range(96))


class Workers:
    """The part of a multi-worker strategy that reading data needs."""

    def __init__(self, context):
        self._context = context

    def distribute_datasets_from_function(self, function):
        return function(self._context)


def shares(task, *, workers, replicas, scale, start=0):
    """Returns the batches that `fit` gets on each worker of a trainer."""
    name = types.SimpleNamespace
    contexts = [
        tf.distribute.InputContext(workers, index, workers * replicas)
        for index in range(workers)
    ]
    return [
        training._distributed(
            task,
            name(base_batches=start, phase=name(scale=scale)),
            training.Settings(seed=1),
            name(distribute_strategy=Workers(context)),
        )
        for context in contexts
    ]


def test_two_workers_of_two_replicas_see_each_example_once():
    task = types.SimpleNamespace(
        base_batch=multiworker_worker.BASE_BATCH,
        train_dataset=multiworker_worker.counted_dataset,
    )
    parts = [
        [index.numpy() for index, _ in dataset.take(12)]
        for dataset in shares(task, workers=2, replicas=2, scale=4)
    ]
    # 96 examples in batches of 4 * 4, a quarter for each replica.
    assert {len(part) for worker in parts for part in worker} == {4}
    assert sorted(np.ravel(parts)) == list(range(96))


@pytest.mark.parametrize("name", ["digits", *benchmarks.SCALES])
def test_workers_of_every_trainer_share_a_batch(name):
    task = importlib.import_module(f"examples.{name}.train").task()
    (whole,) = shares(task, workers=1, replicas=1, scale=2, start=3)
    halves = shares(task, workers=2, replicas=1, scale=2, start=3)
    for batch, *parts in zip(whole.take(2), *halves):
        for one, *two in zip(*map(tf.nest.flatten, (batch, *parts))):
            assert len(two[0]) == len(two[1]) == len(one) // 2
            # Smaller batches are resized by other vector instructions.
            np.testing.assert_allclose(
                np.concatenate(two), one, rtol=0, atol=1e-5
            )
