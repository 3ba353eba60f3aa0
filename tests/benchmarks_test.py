"""The benchmarks' functions, on models too small to measure speed."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_adascale
from benchmarks import adasum_time, step_time
from tf_adascale.distribute import collectives


def _connect(x):
    return layers.Dense(step_time.NUM_CLASSES)(x)


TOY = step_time.Workload(_connect, (3,), 4)


def _input(name):
    return keras.Input(step_time.WORKLOADS[name].input_shape)


def test_mlp_has_its_size():
    inputs = _input("mlp")
    model = keras.Model(inputs, step_time.mlp(inputs))
    # (3072 + 1) 2048 + (2048 + 1) 2048 + (2048 + 1) 10
    assert model.count_params() == 10_510_346


def test_resnet18_has_its_layers():
    inputs = _input("resnet18")
    model = keras.Model(inputs, step_time.resnet18(inputs))
    kernels = [
        layer.kernel.shape[:2]
        for layer in model.layers
        if isinstance(layer, layers.Conv2D)
    ]
    # One in the stem, and two in each block: four stages of two blocks.
    assert kernels.count((3, 3)) == 1 + 2 * 4 * 2
    assert kernels.count((1, 1)) == 3  # One shortcut per new width.
    assert model.output_shape == (None, step_time.NUM_CLASSES)


@pytest.mark.parametrize("name", step_time.VARIANTS)
def test_each_variant_takes_the_steps_that_are_timed(name, strategy_of):
    strategy = strategy_of(step_time.NUM_REPLICAS)
    batch = step_time.make_batch(TOY, strategy)
    variant = step_time.VARIANTS[name]
    trainer = step_time.make_trainer(TOY, variant, strategy, batch)
    trainer.train(2)
    iterations = int(tf.convert_to_tensor(trainer.model.optimizer.iterations))
    assert iterations == step_time.WARMUP_STEPS + 2


def test_constants_hold_while_a_step_is_traced(strategy_of):
    seen = []

    class Seeing(tf_adascale.Model):
        def train_step(self, data):
            seen.append(constants())
            return super().train_step(data)

    def constants():
        return collectives.BYTES_PER_PACK, collectives.BYTES_PER_GATHER

    before = constants()
    strategy = strategy_of(1)
    variant = step_time.Variant(Seeing, step_time.sgd, {"BYTES_PER_GATHER": 7})
    batch = step_time.make_batch(TOY, strategy)
    step_time.make_trainer(TOY, variant, strategy, batch)
    assert set(seen) == {(before[0], 7)}
    assert constants() == before


def test_the_batch_is_deterministic_and_differs_by_replica(strategy_of):
    strategy = strategy_of(2)
    batches = [step_time.make_batch(TOY, strategy) for _ in range(2)]
    first, second = (
        [x.numpy() for x in strategy.experimental_local_results(batch[0])]
        for batch in batches
    )
    np.testing.assert_array_equal(first, second)
    assert first[0].shape == (4, 3)
    assert not np.array_equal(first[0], first[1])


def test_turns_rotate():
    turns = []
    trainers = {
        name: lambda steps, name=name: turns.append((name, steps))
        for name in "ab"
    }
    rounds = []
    times = step_time.interleaved(
        trainers, rounds=3, steps=5, on_round=lambda: rounds.append(len(turns))
    )
    assert "".join(name for name, _ in turns) == "abbaab"
    assert {steps for _, steps in turns} == {5}
    assert rounds == [2, 4, 6]
    assert times["a"].clock.shape == times["b"].processor.shape == (3,)


def test_table_has_medians_of_ratios():
    optimizer = keras.optimizers.SGD()
    optimizer.build([])
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(optimizer=optimizer)
    times = {
        # Ratios 4, 1.5 and 1: the ratio of the medians would be 2.
        "adascale": step_time.Times(np.array([4.0, 3.0, 4.0]), np.ones(3)),
        "sgd": step_time.Times(np.array([1.0, 2.0, 4.0]), np.ones(3)),
    }
    models = dict.fromkeys(times, model)
    lines = step_time.table(times, models, {"sgd": 3 * 2**20})
    # The iterations (int64) and the learning rate (float32).
    cells = lines[1].split()
    assert cells[:4] == ["adascale", "4000.0", "1.500", "(1.250-2.750)"]
    assert cells[-2:] == ["-", "12"]
    assert lines[2].split()[-2:] == ["3", "12"]


def test_state_counts_every_variable():
    optimizer = keras.optimizers.SGD(momentum=0.9)
    optimizer.build([keras.Variable(np.zeros((2, 3), "float32"))])
    # Iterations 8, learning rate 4, momentum 6 x 4 bytes.
    assert step_time.state_bytes(optimizer) == 36


class TestAdasum:
    def test_nearly_all_of_the_model_is_one_variable(self):
        inputs = keras.Input(adasum_time.WORKLOAD.input_shape)
        model = keras.Model(inputs, adasum_time.WORKLOAD.connect(inputs))
        assert model.count_params() == 3200 * 3200 + 3200 + 3200 * 10 + 10

    def test_variants_combine_updates_or_gradients(self):
        for combine in ("updates", "gradients"):
            optimizer = adasum_time.VARIANTS[combine].optimizer()
            assert isinstance(optimizer, tf_adascale.Adasum)
            assert optimizer.combine == combine
        sizes = [v.constants for v in adasum_time.GATHERS.values()]
        assert {"BYTES_PER_GATHER": collectives.BYTES_PER_GATHER} not in sizes
        assert {"BYTES_PER_GATHER": 2**20} in sizes

    @pytest.mark.parametrize(
        ("name", "ratio"),
        # Each of three replicas gathers 3 - 1 times the model and all-reduces
        # 2 (3 - 1) / 3 of it. The rest, such as inner products, is small.
        [("sgd", 4 / 3), ("updates", 2 + 4 / 3), ("gradients", 2 + 4 / 3)],
    )
    def test_received_counts_what_is_gathered_and_reduced(
        self, name, ratio, strategy_of
    ):
        strategy = strategy_of(3)
        workload = step_time.Workload(_connect, (1000,), 4)
        batch = step_time.make_batch(workload, strategy)
        trainer = step_time.make_trainer(
            workload, adasum_time.VARIANTS[name], strategy, batch
        )
        received = adasum_time.received(trainer.model, strategy, batch)
        model = 4 * (1000 * 10 + 10)
        assert 0.9999 * ratio < received / model < 1.05 * ratio

    def test_table(self):
        found = adasum_time.Measured(
            times={
                "sgd": step_time.Times(np.array([1.0, 2.0]), np.ones(2)),
                "updates": step_time.Times(np.array([2.0, 3.0]), np.ones(2)),
            },
            received={"sgd": 175.0, "updates": 875.0},
            model=100,
        )
        lines = adasum_time.table(found, {"updates": 2400}, 8)
        # Per replica: 2400 / 8 bytes are three models.
        assert lines[1].split()[-2:] == ["1.75", "-"]
        assert lines[2].split()[-2:] == ["8.75", "3.00"]
        assert lines[2].split()[1:3] == ["2500.0", "1.750"]

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_peak_is_no_less_than_what_is_resident(self):
        resident, peak = map(adasum_time._status, ("VmRSS", "VmHWM"))
        # TensorFlow alone takes more than 100 MiB.
        assert 100 * 2**20 < resident <= peak
