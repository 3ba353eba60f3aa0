"""The digits trainer and the demo."""

import numpy as np
from absl import flags as absl_flags
from absl.testing import flagsaver

from examples.common import flags, runs
from examples.common.data import digits
from examples.digits import data, demo, train
from tests.examples import made_up


def batches(count, *args, **kwargs):
    dataset = data.train_dataset(*args, **kwargs)
    return list(dataset.take(count).as_numpy_iterator())


class TestData:
    def test_a_run_resumes_at_any_step(self):
        # 12 batches of 128 are more than a pass of 1437 images.
        whole = batches(12, 128, seed=1)
        for start in (3, 10):
            part = batches(2, 128, seed=1, start=128 * start)
            for expected, actual in zip(whole[start:], part):
                np.testing.assert_array_equal(expected[0], actual[0])
                np.testing.assert_array_equal(expected[1], actual[1])

    def test_a_large_batch_equals_small_ones(self):
        small = batches(4, 16, seed=1)
        ((images, labels),) = batches(1, 64, seed=1)
        np.testing.assert_array_equal(
            images, np.concatenate([batch[0] for batch in small])
        )
        np.testing.assert_array_equal(
            labels, np.concatenate([batch[1] for batch in small])
        )

    def test_seeds_and_passes_differ(self):
        ((first, _), (second, _)) = batches(2, 1437, seed=1)
        ((other, _),) = batches(1, 1437, seed=2)
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, other)

    def test_a_pass_has_every_image_once_shifted_at_most_a_pixel(self):
        split, _ = digits.splits()
        ((images, labels),) = batches(1, 1437, seed=1)
        np.testing.assert_array_equal(
            np.bincount(labels), np.bincount(split.labels)
        )
        padded = np.pad(split.images, [(0, 0), (1, 1), (1, 1), (0, 0)])
        shifted = {
            padded[i, y : y + 8, x : x + 8].tobytes()
            for i in range(len(padded))
            for y in range(3)
            for x in range(3)
        }
        assert all(image.tobytes() in shifted for image in images)

    def test_validation_sees_training_data_only(self):
        held_in, held_out = digits.splits(validation=True)
        size = len(held_in.labels)
        ((_, labels),) = batches(1, size, seed=0, validation=True)
        # A pass has each example once.
        np.testing.assert_array_equal(np.sort(labels), np.sort(held_in.labels))
        tested = data.test_dataset(1000, validation=True)
        ((_, labels),) = tested.as_numpy_iterator()
        np.testing.assert_array_equal(labels, held_out.labels)


class TestTask:
    def test_model_has_77_thousand_parameters(self):
        model = train.task().model()
        assert 76_000 < model.count_params() < 79_000
        assert model.output_shape == (None, 10)

    def test_only_kernels_decay(self):
        model = train.task().model()
        optimizer = train.task().optimizer(0.1)
        optimizer.build(model.trainable_variables)
        decaying = [
            optimizer._use_weight_decay(v) for v in model.trainable_variables
        ]
        kernels = [v.name == "kernel" for v in model.trainable_variables]
        assert decaying == kernels


def test_demo_prints_a_table_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    commands = []

    def train(benchmark, model_dir, *arguments):
        with flagsaver.flagsaver():  # The trainer accepts these flags.
            absl_flags.FLAGS(["train", f"--model_dir={model_dir}", *arguments])
            commands.append(flags.settings())
        return made_up.train(benchmark, model_dir, *arguments)

    monkeypatch.setattr(runs, "train", train)
    results = demo.main([f"--out={tmp_path}", "--scale=4", "--total_steps=9"])
    assert [run.label for run in results] == [
        "SGD, S = 1",
        "AdaScale, S = 4",
        "LSW, S = 4",
        "LSW+, S = 4",
    ]
    assert {settings.total_steps for settings in commands} == {9}
    # LSW+ takes as many iterations as AdaScale.
    assert [settings.iterations for settings in commands] == [None] * 3 + [40]
    assert runs.table(results) in capsys.readouterr().out
    with open(tmp_path / "figure1.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
