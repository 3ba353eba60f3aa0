"""Adasum on digits: the study's bookkeeping, and that it trains."""

import json
import os

import keras
import numpy as np
import pytest
from keras import layers

import tf_adascale
from examples.common import runs, strategies
from examples.digits import data, model
from examples.studies import adasum

PNG = b"\x89PNG\r\n\x1a\n"


def made_up(optimizer, method, multiplier, seed, *, model_dir, tune):
    """A row such as `adasum.trained` returns."""
    accuracy = 0.9 + 0.01 * seed - (0.1 if tune else 0.0)
    return adasum.Row(optimizer, method, multiplier, seed, accuracy, 0.125)


@pytest.fixture
def trained(monkeypatch):
    """Makes runs up; returns the list of those asked for."""
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

    def test_goes_on_where_it_was_stopped(self, tmp_path, trained):
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

    def test_alone_is_another_process(self):
        assert runs.alone(os.getpid) != os.getpid()


class TestTrained:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch, strategy_of):
        """Two replicas, off collectives, and a model that traces fast."""

        def logits():
            inputs = keras.Input((8, 8, 1))
            return tf_adascale.Model(
                inputs, layers.Dense(10)(layers.Flatten()(inputs))
            )

        monkeypatch.setattr(model, "resnet", logits)
        monkeypatch.setattr(adasum_study, "REPLICAS", 2)
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

    def test_tuning_sees_training_data_only(self):
        held_in, held_out = data.splits(validation=True)
        train, _ = data.splits()
        assert len(held_in.labels) + len(held_out.labels) == len(train.labels)
        size = len(held_in.labels)
        _, labels = next(
            data.train_dataset(
                size, seed=0, validation=True
            ).as_numpy_iterator()
        )
        # One epoch has every example once.
        np.testing.assert_array_equal(np.sort(labels), np.sort(held_in.labels))
        tested = data.test_dataset(1000, validation=True)
        _, labels = next(tested.as_numpy_iterator())
        np.testing.assert_array_equal(labels, held_out.labels)


def test_methods_are_what_they_say():
    sgd = keras.optimizers.SGD
    assert isinstance(adasum.METHODS["average"].wrap(sgd()), sgd)
    for combine in ("updates", "gradients"):
        optimizer = adasum.METHODS[combine].wrap(sgd())
        assert isinstance(optimizer, tf_adascale.Adasum)
        assert optimizer.combine == combine


class TestConvergence:
    """Eight replicas at the rate of one: the mean steps no further than one."""

    # After as many the mean has far to go, so that it shows who goes faster.
    EPOCHS = 3

    def accuracy(self, make_optimizer, strategy):
        train, test = data.splits()
        keras.utils.set_random_seed(0)
        with strategy.scope():
            inputs = keras.Input((8, 8, 1))
            x = layers.Dense(32, activation="relu")(layers.Flatten()(inputs))
            digits = tf_adascale.Model(inputs, layers.Dense(10)(x))
            digits.compile(
                make_optimizer(),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
        count = 11 * 128  # Eleven batches of 16 examples per replica.
        digits.fit(
            train.images[:count],
            train.labels[:count],
            batch_size=128,
            epochs=self.EPOCHS,
            verbose=0,
            shuffle=False,
        )
        found = np.argmax(digits(test.images), axis=-1)
        return np.mean(found == test.labels)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: keras.optimizers.SGD(0.08, momentum=0.9),
            lambda: keras.optimizers.Adam(0.002),
            lambda: keras.optimizers.Lamb(0.01),
        ],
        ids=["sgd", "adam", "lamb"],
    )
    def test_adasum_gets_further_than_the_average(self, make, strategy_of):
        # The mean gradient of eight replicas is that of one with their batch,
        # which is fast to trace.
        average = self.accuracy(make, strategy_of(1))
        adasum = self.accuracy(
            lambda: tf_adascale.Adasum(make()), strategy_of(8)
        )
        # By 4 points for SGD, 7 for Adam and 13 for Lamb when this was written.
        assert adasum >= average
