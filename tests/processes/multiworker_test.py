"""K1: `fit` under MultiWorkerMirroredStrategy, in two real processes."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import keras
import multiworker_worker
import numpy as np
import pytest
import tensorflow as tf

from examples import launch
from examples.common import training
from examples.studies import benchmarks

pytestmark = pytest.mark.multiworker

TESTS = pathlib.Path(__file__).parent
NUM_WORKERS = 2
# Both start in some 10 seconds; a machine may be busy.
TIMEOUT_SECONDS = 180


def start(index, addresses):
    cluster = {"worker": addresses}
    task = {"type": "worker", "index": index}
    environment = {
        **os.environ,
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": task}),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]),
    }
    return subprocess.Popen(
        [sys.executable, multiworker_worker.__file__],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def workers():
    """What each of two workers printed, which ran once for all tests."""
    addresses = [f"127.0.0.1:{port}" for port in launch.free_ports(NUM_WORKERS)]
    processes = [start(index, addresses) for index in range(NUM_WORKERS)]
    try:
        outputs = [
            process.communicate(timeout=TIMEOUT_SECONDS)
            for process in processes
        ]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_stock_keras_cannot_fit(workers):
    for worker in workers:
        assert worker["stock"] is not None
        assert "PerReplica" in worker["stock"]


def test_the_workers_agree_to_the_bit(workers):
    first, second = workers
    assert first["digest"] == second["digest"]
    for name in ("history", "evaluated", "gain", "scale_invariant_step"):
        assert first[name] == second[name]


def test_all_steps_are_taken(workers):
    # Two epochs; the last execution of an epoch's 25 steps takes one.
    for worker in workers:
        assert worker["iterations"] == 50
        assert set(worker["history"]) == {"loss", "mae", "val_loss", "val_mae"}


def test_two_local_replicas_train_the_same(workers, strategy_of):
    data = multiworker_worker.data()
    _, local = multiworker_worker.train(strategy_of(2), *data)
    remote = workers[0]
    for expected, received in zip(local["weights"], remote["weights"]):
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)
    # The gain is a ratio of sums of squares.
    for name in ("gain", "scale_invariant_step"):
        assert remote[name] == pytest.approx(local[name], rel=1e-5)
    assert remote["evaluated"] == pytest.approx(local["evaluated"], rel=1e-5)
    for name, values in local["history"].items():
        assert remote["history"][name] == pytest.approx(values, rel=1e-5)


def test_predict_returns_every_workers_predictions_in_order(workers):
    x, _ = multiworker_worker.data()
    kernel, bias, output_kernel, output_bias = map(
        np.array, workers[0]["weights"]
    )
    hidden = np.tanh(x @ kernel.reshape(3, 4) + bias)
    expected = hidden @ output_kernel + output_bias
    for worker in workers:
        np.testing.assert_allclose(
            worker["predicted"], expected, rtol=0, atol=1e-5
        )


def test_an_overflow_in_one_worker_skips_the_step_in_both(workers):
    for worker in workers:
        assert worker["skipped"] == 1
        assert worker["digest_after_skipping"] == worker["digest"]


def gradients_of(weights, x, y):
    """The gradients of the worker's model by hand, in float64."""
    kernel, bias, output_kernel, output_bias = weights
    hidden = np.tanh(x @ kernel + bias)
    of_output = 2 * (hidden @ output_kernel + output_bias - y) / len(x)
    of_hidden = of_output @ output_kernel.T * (1 - hidden**2)
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
    """Weights after the workers' steps of Adasum: momenta m <- 0.9 m - g/20."""
    weights = [weight.astype("float64") for weight in weights]
    momenta = [[0 * weight for weight in weights] for _ in range(NUM_WORKERS)]
    x, y = (
        array.reshape(multiworker_worker.STEPS, NUM_WORKERS, -1, array.shape[1])
        for array in multiworker_worker.data()
    )
    for step in np.tile(range(multiworker_worker.STEPS), 2):
        gradients = [gradients_of(weights, *xy) for xy in zip(x[step], y[step])]
        if combine == "gradients":
            gradients = [list(map(adasum_of, *gradients))] * NUM_WORKERS
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
    model = multiworker_worker.compiled(keras.Model, "sgd")
    expected = adasum_steps(model.get_weights(), combine)
    for received, weight in zip(first["weights"], expected, strict=True):
        # 50 steps in float32 against float64.
        np.testing.assert_allclose(received, weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("combine", ["updates", "gradients"])
def test_two_local_replicas_train_the_same_by_adasum(
    workers, strategy_of, combine
):
    local = multiworker_worker.adasum(
        strategy_of(2), *multiworker_worker.data(), combine
    )
    remote = workers[0]["adasum"][combine]
    for received, weight in zip(
        remote["weights"], local["weights"], strict=True
    ):
        np.testing.assert_allclose(received, weight, rtol=0, atol=1e-6)


def test_each_example_is_seen_by_one_worker_once_a_pass(workers):
    of_workers = [np.ravel(worker["examples"]) for worker in workers]
    assert len(of_workers[0]) == len(of_workers[1]) == 48
    assert sorted(np.concatenate(of_workers)) == list(range(96))


class Workers:
    """A strategy of several workers, seen from one: what data needs of it."""

    def __init__(self, context):
        self._context = context

    def distribute_datasets_from_function(self, function):
        return function(self._context)


def shares(task, *, workers, replicas, scale, start=0):
    """Returns each worker's batches of a trainer's data, as `fit` gets them."""
    settings = training.Settings(seed=1)
    return [
        training._distributed(
            task,
            types.SimpleNamespace(
                base_batches=start, phase=types.SimpleNamespace(scale=scale)
            ),
            settings,
            types.SimpleNamespace(
                distribute_strategy=Workers(
                    tf.distribute.InputContext(
                        workers, index, workers * replicas
                    )
                )
            ),
        )
        for index in range(workers)
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
    train = importlib.import_module(f"examples.{name}.train")
    task = train.task()
    (whole,) = shares(task, workers=1, replicas=1, scale=4, start=3)
    halves = shares(task, workers=2, replicas=1, scale=4, start=3)
    for batch, *parts in zip(whole.take(2), *halves):
        for one, *two in zip(*map(tf.nest.flatten, (batch, *parts))):
            assert len(two[0]) == len(two[1]) == len(one) // 2
            # Smaller batches are resized by other vector instructions.
            np.testing.assert_allclose(
                np.concatenate(two), one, rtol=0, atol=1e-5
            )
