"""The cifar10 trainer: the paper's ResNet-18 and the miniature on digits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.cifar10 import data, model, train
from examples.common import training
from examples.common.data import digits as digits_data
from examples.common.data import streams
from tests.examples import full_size, prepared_fixture

LAST_DRAW = np.nextafter(np.float32(1), np.float32(0))
PHOTOS = np.random.default_rng(0).integers(0, 256, (26, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """CIFAR-10 with 20 training and 6 test images, 2 of them broken."""

    def example(number, image):
        label = number % 10
        return number, {"id": f"{number}", "image": image, "label": label}

    photos = [example(number, image) for number, image in enumerate(PHOTOS)]
    photos[22] = example(22, b"no image")
    photos[23] = example(
        23, tf.io.encode_png(np.zeros((40, 40, 3), "uint8")).numpy()
    )
    path = tmp_path_factory.mktemp("prepared")
    prepared_fixture.prepare(
        "cifar10", path, {"train": photos[:20], "test": photos[20:]}
    )
    return str(path)


def moved(images, *, padding):
    """Returns all shifts of images: a dict from bytes to (row, column)."""
    _, height, width, _ = images.shape
    sides = padding, padding
    padded = np.pad(images, [(0, 0), sides, sides, (0, 0)])
    return {
        image[y : y + height, x : x + width].tobytes(): (y, x)
        for image in padded
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
    }


def layers_of(built, kind):
    return [layer for layer in built.layers if isinstance(layer, kind)]


def examples_of(dataset):
    """Returns the (image as bytes, label) of all batches, sorted."""
    return sorted(
        (image.tobytes(), int(label))
        for images, labels in dataset.as_numpy_iterator()
        for image, label in zip(images, labels)
    )


@pytest.fixture(scope="module")
def full():
    with full_size.not_initialized():
        return model.resnet(model.FULL)


class TestResNet:
    def test_full_size(self, full):
        built = full
        # PreActResNet18 of github.com/kuangliu/pytorch-cifar has 11,171,146
        # parameters. Its scales are trained, and it lacks the normalization
        # after the last block that He et al. have:
        #   channels = 4*64 + (64+3*128) + (128+3*256) + (256+3*512) = 3,392
        #   11,171,146 - 3,392 scales + 512 shifts = 11,168,266
        trainable = sum(v.shape.num_elements() for v in built.trainable_weights)
        assert trainable == 11_171_146 - 3_392 + 512 == 11_168_266
        # Moving mean and variance.
        assert built.count_params() - trainable == 2 * (3_392 + 512)
        # 18: the stem, 4 stages of 2 blocks of 2, and the dense layer.
        convolutions = layers_of(built, keras.layers.Conv2D)
        assert [c.kernel_size for c in convolutions].count((3, 3)) == 17
        # Three stages halve 32x32.
        (pooling,) = layers_of(built, keras.layers.GlobalAveragePooling2D)
        assert pooling.input.shape == (None, 4, 4, 512)

    def test_miniature(self):
        built = model.resnet(model.MINIATURE)
        assert built.input_shape == (None, 8, 8, 1)
        assert built.output_shape == (None, 10)
        # Kernels: 9*16 + 2*9*16^2 + (9*16*32 + 9*32^2 + 16*32)
        #          + (9*32*64 + 9*64^2 + 32*64) + 64*10 = 77,072;
        # biases: 10; shifts: 2*16 + (16+32) + (32+64) + 64 = 240.
        trainable = sum(v.shape.num_elements() for v in built.trainable_weights)
        assert trainable == 77_072 + 10 + 240

    def test_batch_normalization(self, full):
        normalizations = layers_of(full, keras.layers.BatchNormalization)
        # Two in each of two blocks of four stages, and the last.
        assert len(normalizations) == 4 * 2 * 2 + 1
        for layer in normalizations:
            assert (layer.momentum, layer.epsilon) == (0.995, 2e-5)
            assert [v.name for v in layer.trainable_weights] == ["beta"]

    def test_every_kernel_decays(self):
        built = model.resnet(model.MINIATURE)
        kernels = [
            v.value for v in built.trainable_variables if v.name == "kernel"
        ]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(kernels)
            loss = tf.add_n(built.losses)
        # The gradient of 5e-4 / 2 |w|^2 is 5e-4 w.
        assert len(kernels) == 10
        for kernel, gradient in zip(kernels, tape.gradient(loss, kernels)):
            np.testing.assert_allclose(gradient, 5e-4 * kernel, rtol=1e-6)

    def test_shortcut_is_identity(self):
        # If the second convolutions are zero, the stem's output passes through
        # all additions of a stage.
        size = model.Size(shape=(8, 8, 1), widths=(4,), blocks=3)
        built = model.resnet(size)
        stem, *convolutions = layers_of(built, keras.layers.Conv2D)
        for convolution in convolutions[1::2]:
            convolution.kernel.assign(tf.zeros_like(convolution.kernel))
        *_, last = layers_of(built, keras.layers.Add)
        outputs = keras.Model(built.inputs, [stem.output, last.output])
        first, final = outputs(tf.random.normal((2, 8, 8, 1)))
        np.testing.assert_array_equal(first, final)


class TestAugmented:
    images = np.arange(2 * 5 * 4 * 3).reshape(2, 5, 4, 3).astype(np.uint8) + 1

    def augmented(self, *draws, padding=2, mirrored=True):
        draws = np.tile(np.float32(draws), (2, 1))
        return data.augmented(
            self.images, draws, padding=padding, mirrored=mirrored
        ).numpy()

    def test_the_middle_keeps_the_image(self):
        np.testing.assert_array_equal(
            self.augmented(0.5, 0.5, 0.0), self.images
        )

    @pytest.mark.parametrize("mirror", [0.0, 0.49, 0.5, LAST_DRAW])
    @pytest.mark.parametrize("column", [0.0, 0.3, 0.5, LAST_DRAW])
    @pytest.mark.parametrize("row", [0.0, 0.3, 0.5, LAST_DRAW])
    def test_is_padded_then_cropped_then_mirrored(self, row, column, mirror):
        padded = np.pad(self.images, [(0, 0), (2, 2), (2, 2), (0, 0)])
        # 5 places each way: 0, 1, 2, 3, 4.
        y, x = int(row * 5), int(column * 5)
        expected = padded[:, y : y + 5, x : x + 4]
        if mirror >= 0.5:
            expected = np.flip(expected, axis=2)
        found = self.augmented(row, column, mirror)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)

    def test_each_image_has_its_own_draws(self):
        draws = np.float32([[0.0, 0.5, 0.0], [0.5, 0.5, 0.9]])
        moved, mirrored = data.augmented(
            self.images, draws, padding=1, mirrored=True
        )
        np.testing.assert_array_equal(moved[1:], self.images[0, :-1])
        np.testing.assert_array_equal(moved[0], np.zeros((4, 3)))
        np.testing.assert_array_equal(mirrored, self.images[1, :, ::-1])

    def test_not_mirrored(self):
        np.testing.assert_array_equal(
            self.augmented(0.5, 0.5, LAST_DRAW, mirrored=False), self.images
        )


class TestDigits:
    def test_is_standardized(self):
        train_split, test_split = digits_data.splits()
        source = data.digits()
        assert train_split.images.mean() == pytest.approx(
            source.mean[0], abs=1e-3
        )
        assert train_split.images.std() == pytest.approx(
            source.deviation[0], abs=1e-3
        )
        images, labels = next(iter(source.test_dataset(360)))
        np.testing.assert_allclose(
            images, (test_split.images - 0.305) / 0.376, atol=1e-6
        )
        np.testing.assert_array_equal(labels, test_split.labels)

    @pytest.mark.parametrize("validation", [False, True])
    def test_splits_are_those_of_the_digits(self, validation):
        parts = digits_data.splits(validation=validation)
        found = data.digits(validation=validation).splits()
        for (dataset, size), part in zip(found, parts, strict=True):
            assert size == len(part.labels)
            images = [r["image"] for r in dataset.as_numpy_iterator()]
            np.testing.assert_array_equal(images, part.images)

    def test_images_are_moved_but_not_mirrored(self):
        train_split, _ = digits_data.splits()
        known = moved(train_split.images, padding=1)
        images, _ = next(iter(data.digits().train_dataset(500, seed=0)))
        # Grey values are multiples of 1 / 16.
        images = np.round((images * 0.376 + 0.305) * 16).astype("float32") / 16
        places = {known[image.tobytes()] for image in images}
        assert len(places) == 9

    def test_resumes_at_any_example(self):
        source = data.digits()
        whole = source.train_dataset(8, seed=1).take(4)
        rest = source.train_dataset(8, seed=1, start=16).take(2)
        for (images, labels), (again, labels_again) in zip(
            list(whole)[2:], rest, strict=True
        ):
            np.testing.assert_array_equal(images, again)
            np.testing.assert_array_equal(labels, labels_again)

    def test_workers_share_a_batch(self):
        source = data.digits()
        whole = source.train_dataset(8, seed=1).take(1)
        parts = [
            source.train_dataset(8, seed=1, share=streams.Share(index, 2))
            for index in range(2)
        ]
        shared = [part.take(1) for part in parts]
        assert examples_of(shared[0].concatenate(shared[1])) == examples_of(
            whole
        )
        assert parts[0].element_spec[0].shape == (4, 8, 8, 1)


class TestCifar10:
    def test_images_are_moved_and_mirrored(self, data_dir):
        straight = moved(PHOTOS[:20], padding=4)
        mirrored = moved(PHOTOS[:20, :, ::-1], padding=4)
        source = data.cifar10(data_dir=data_dir)
        images, _ = next(iter(source.train_dataset(200, seed=0)))
        images = images * (63.0, 62.1, 66.7) + (125.3, 123.0, 113.9)
        images = np.round(images).astype(np.uint8)
        places = [
            (
                image.tobytes() in mirrored,
                *(straight | mirrored)[image.tobytes()],
            )
            for image in images
        ]
        turned, rows, columns = zip(*places)
        # 100 of 200 are expected, with a deviation of 7.
        assert 65 < sum(turned) < 135
        assert set(rows) == set(columns) == set(range(9))

    def test_tests_on_the_images_as_they_are(self, data_dir):
        source = data.cifar10(data_dir=data_dir)
        ((images, labels),) = source.test_dataset(10)
        np.testing.assert_allclose(
            images,
            (PHOTOS[20 + labels.numpy()] - np.array(source.mean))
            / source.deviation,
            atol=1e-6,
        )

    def test_broken_images_are_dropped(self, data_dir, caplog):
        source = data.cifar10(data_dir=data_dir)
        ((_, labels),) = source.test_dataset(10)
        assert sorted(labels.numpy()) == [0, 1, 4, 5]
        assert "2 of" in caplog.text
        assert "image does not decode" in caplog.text

    def test_validation_is_the_last_tenth(self, data_dir):
        whole = [
            r["id"]
            for r in data.cifar10(data_dir=data_dir)
            .splits()[0][0]
            .as_numpy_iterator()
        ]
        train_part, test_part = (
            [r["id"] for r in dataset.as_numpy_iterator()]
            for dataset, _ in data.cifar10(
                data_dir=data_dir, validation=True
            ).splits()
        )
        assert (len(train_part), len(test_part)) == (18, 2)
        assert train_part + test_part == whole

    def test_unprepared_says_how_to_prepare(self, tmp_path):
        source = data.cifar10(data_dir=str(tmp_path))
        with pytest.raises(
            ValueError, match=r"\.data\.prepared cifar10 --data_dir="
        ):
            source.train_dataset(128, seed=0)


class TestTask:
    @pytest.mark.parametrize(
        "name, batch, steps", [("tfds", 128, 39_100), ("embedded", 16, 1500)]
    )
    def test_is_the_papers(self, name, batch, steps):
        task = train.task(data=name)
        assert task.name.startswith("cifar10")
        assert (task.base_batch, task.total_steps) == (batch, steps)
        for total_steps in (steps, 100):
            schedule = task.schedule(total_steps)
            rates = [schedule(0), schedule(total_steps / 2)]
            # 0.08 * 0.0133^(1/2) = 0.0092260
            np.testing.assert_allclose(rates, [0.08, 0.009226], rtol=1e-4)
            np.testing.assert_allclose(
                schedule(total_steps), 0.08 * 0.0133, rtol=1e-5
            )
        optimizer = task.optimizer(schedule)
        assert isinstance(optimizer, keras.optimizers.SGD)
        assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
        # The kernels' regularizers decay the weights.
        assert optimizer.weight_decay is None

    def test_full_size_fits_its_data(self, data_dir):
        task = train.task(data="tfds", data_dir=data_dir)
        network = full_size.model_that_fits(task, 4)
        images, _ = next(iter(task.test_dataset(2)))
        assert network(images).shape == (2, 10)

    def test_miniature_learns(self, tmp_path):
        result = training.run(
            train.task(split="validation"),
            training.Settings(
                algorithm="adascale",
                scale=4,
                total_steps=60,
                model_dir=str(tmp_path),
                smoke=True,
            ),
        )
        assert result.iterations < 40
        log = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
        assert log["loss"][-1] < 0.8 * log["loss"][0]
