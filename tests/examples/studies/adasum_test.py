"""The study of Adasum on digits: its bookkeeping, and that it trains."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import tf_adascale
from examples.common import runs, strategies
from examples.common.data import digits
from examples.digits import model
from examples.studies import adasum

PNG = b"\x89PNG\r\n\x1a\n"


def made_up(optimizer, method, multiplier, seed, *, model_dir, tune):
    """Returns a row like `adasum.trained`."""
    accuracy = 0.9 + 0.01 * seed - (0.1 if tune else 0.0)
    return adasum.Row(optimizer, method, multiplier, seed, accuracy, 0.125)


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; returns the list of runs that were asked for."""
    asked = []

    def train(function, *key, **options):
        assert function is adasum.trained
        asked.append((key, options))
        return made_up(*key, **options)

    monkeypatch.setattr(runs, "alone", train)
    return asked


class TestStudy:
    def test_every_method_at_every_rate(self, tmp_path, trained, capsys):
        rows = adasum.main([f"--out={tmp_path}", "--seeds=0,2"])
        # S = 1, then three methods at four rates, for each of three optimizers.
        assert len(set(rows)) == len(rows) == len(trained) == 2 * 3 * (1 + 12)
        # Seed 0 is complete before the next begins.
        assert [row.seed for row in rows] == 39 * [0] + 39 * [2]
        assert {row.multiplier for row in rows if row.method == "updates"} == {
            1,
            2,
            4,
            8,
        }
        assert not any(options["tune"] for _, options in trained)
        directories = {options["model_dir"] for _, options in trained}
        assert len(directories) == len(rows)
        printed = capsys.readouterr().out
        # The mean of 0.90 and 0.92.
        cell = "91.0 % (0.125)"
        assert f"| Lamb | S = 1 | {cell} | - | - | - |" in printed
        assert f"| Adam | Adasum, updates |{4 * f' {cell} |'}" in printed
        assert (tmp_path / "adasum.png").read_bytes()[:8] == PNG

    def test_resumes(self, tmp_path, trained):
        first = adasum.main([f"--out={tmp_path}"])
        assert adasum.read(tmp_path) == first
        again = adasum.main([f"--out={tmp_path}", "--seeds=0,1"])
        assert again[:39] == first
        assert len(trained) == 2 * 39

    def test_tuning_is_at_one_replica(self, tmp_path, trained):
        rows = adasum.main([f"--out={tmp_path}", "--tune"])
        assert {row.method for row in rows} == {adasum.SINGLE}
        assert len(rows) == 3 * len(adasum.TUNING_MULTIPLIERS)
        assert all(options["tune"] for _, options in trained)


class TestTrained:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch, strategy_of):
        """Makes two replicas without collectives, and a small model."""

        def logits():
            inputs = keras.Input((8, 8, 1))
            return tf_adascale.Model(
                inputs, layers.Dense(10)(layers.Flatten()(inputs))
            )

        monkeypatch.setattr(model, "resnet", logits)
        monkeypatch.setattr(adasum, "REPLICAS", 2)
        monkeypatch.setattr(
            strategies,
            "make",
            lambda strategy, *, replicas, **_: strategy_of(replicas or 1),
        )

    @pytest.mark.parametrize("method", ["updates", "single"])
    def test_trains(self, method, tmp_path):
        model_dir = str(tmp_path / "run")
        row = adasum.trained(
            "sgd", method, 2, 5, model_dir=model_dir, smoke=True
        )
        assert row[:4] == ("sgd", method, 2, 5)
        assert 0 <= row.accuracy <= 1
        assert row.loss > 0
        with open(tmp_path / "run" / "run.json") as file:
            run = json.load(file)
        assert run["seed"] == 5
        # "average" has the schedule of S = 1, S times as fast.
        assert (run["algorithm"], run["scale"]) == (
            ("identity", 1) if method == "single" else ("average", 2)
        )
        assert run["schedule"]["initial_learning_rate"] == 0.16


def test_methods_are_what_they_say():
    sgd = keras.optimizers.SGD
    assert isinstance(adasum.METHODS["average"].wrap(sgd()), sgd)
    for combine in ("updates", "gradients"):
        optimizer = adasum.METHODS[combine].wrap(sgd())
        assert isinstance(optimizer, tf_adascale.Adasum)
        assert optimizer.combine == combine


def accuracy(optimizer, *, microbatches):
    """Returns the test accuracy of a small network after a short training."""
    train, test = digits.splits()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(32, activation="relu")(layers.Flatten()(inputs))
    network = tf_adascale.Model(inputs, layers.Dense(10)(x))
    network.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        microbatches=microbatches,
    )
    count = 11 * 128  # Full batches only.
    network.fit(
        train.images[:count],
        train.labels[:count],
        batch_size=128,
        # The network is far from trained, which shows who learns faster.
        epochs=3,
        verbose=0,
        shuffle=False,
    )
    found = np.argmax(network(test.images), axis=-1)
    return np.mean(found == test.labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.08, momentum=0.9),
        lambda: keras.optimizers.Lamb(0.01),
    ],
    ids=["sgd", "lamb"],
)
def test_adasum_learns_faster_than_the_average(make):
    # 8 samples of 16 examples at the learning rate of one. The average of 8
    # gradients is the gradient of their batch.
    average = accuracy(make(), microbatches=1)
    combined = accuracy(tf_adascale.Adasum(make()), microbatches=8)
    # By 4 points for SGD and 13 for Lamb when this was written.
    assert combined >= average
