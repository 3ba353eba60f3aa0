"""The imagenet trainer: ResNet-50, ghost batch norm, crops and both loaders."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from examples.common import training
from examples.common.data import digits, photos, streams
from examples.imagenet import data, model, train
from tests import harness
from tests.examples import full_size, prepared_fixture

LAST_DRAW = np.nextafter(np.float32(1), np.float32(0))
# The ghost batches of 2 have means 1 and 12, and variances 1 and 4.
COLUMN = np.float32([[0], [2], [10], [14]])


def ghost(ghost_batch=2, *, shape=(None, 1), **kwargs):
    layer = model.GhostBatchNormalization(ghost_batch, **kwargs)
    layer.build(shape)
    return layer


def moving(layer):
    return [v.numpy() for v in (layer.moving_mean, layer.moving_variance)]


class TestGhostBatchNormalization:
    def test_each_part_has_its_own_statistics(self):
        layer = ghost(momentum=0.5, epsilon=0.0)
        outputs = layer(COLUMN, training=True)
        # (0 - 1) / sqrt(1), (2 - 1) / sqrt(1), (10 - 12) / sqrt(4) ...
        np.testing.assert_allclose(outputs, [[-1], [1], [-1], [1]], rtol=1e-6)
        # 0.5 * 0 + 0.5 * (1 + 12) / 2 and 0.5 * 1 + 0.5 * (1 + 4) / 2.
        np.testing.assert_allclose(moving(layer), [[3.25], [1.75]], rtol=1e-6)

    def test_parts_share_scale_and_offset(self):
        layer = ghost(epsilon=0.0)
        layer.gamma.assign([3.0])
        layer.beta.assign([10.0])
        outputs = layer(COLUMN, training=True)
        # 3 * (-1, 1) + 10.
        np.testing.assert_allclose(outputs, [[7], [13], [7], [13]], rtol=1e-6)

    @pytest.mark.parametrize("ghost_batch", [8, 20])
    def test_one_part_is_batch_normalization(self, ghost_batch):
        inputs = keras.random.normal((8, 3, 2, 4), 5.0, 3.0, seed=0)
        weights = keras.random.normal((8, 3, 2, 4), seed=1)
        found = []
        for layer in (
            ghost(ghost_batch, shape=inputs.shape, momentum=0.9),
            keras.layers.BatchNormalization(momentum=0.9),
        ):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs, training=True)
                loss = tf.reduce_sum(weights * outputs)
            sources = [inputs, layer.gamma.value, layer.beta.value]
            found.append(
                [outputs, *tape.gradient(loss, sources), *moving(layer)]
            )
        for ours, kerass in zip(*found):
            np.testing.assert_allclose(ours, kerass, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("trainable", [True, False])
    def test_inference_uses_the_moving_statistics(self, trainable):
        layer = ghost(epsilon=0.0)
        layer.trainable = trainable
        layer.moving_mean.assign([2.0])
        layer.moving_variance.assign([4.0])
        # A frozen layer infers in training too. (0 - 2) / 2, ...
        outputs = layer(COLUMN, training=not trainable)
        np.testing.assert_allclose(outputs, [[-1], [0], [4], [6]], rtol=1e-6)
        np.testing.assert_array_equal(moving(layer), [[2], [4]])

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_in_a_graph(self, jit_compile):
        layer = ghost(epsilon=0.0, momentum=0.5)
        graph = tf.function(
            lambda x: layer(x, training=True),
            jit_compile=jit_compile,
            input_signature=[tf.TensorSpec((None, 1))],
        )
        np.testing.assert_allclose(
            graph(COLUMN), [[-1], [1], [-1], [1]], rtol=1e-6
        )
        np.testing.assert_allclose(moving(layer), [[3.25], [1.75]], rtol=1e-6)

    def test_in_replica_context(self, strategy_of):
        strategy = strategy_of(2)
        with strategy.scope():
            layer = ghost(epsilon=0.0, momentum=0.5)
        batches = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                COLUMN + 100 * context.replica_id_in_sync_group
            )
        )
        outputs = strategy.run(
            tf.function(lambda x: layer(x, training=True)), args=(batches,)
        )
        for local in strategy.experimental_local_results(outputs):
            np.testing.assert_allclose(local, [[-1], [1], [-1], [1]], rtol=1e-5)
        # Each replica updates its own averages, like Keras's layer: half of 6.5
        # and of 106.5.
        means = strategy.experimental_local_results(layer.moving_mean.value)
        np.testing.assert_allclose(means, [[3.25], [53.25]], rtol=1e-6)

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_statistics_are_taken_in_float32(self, policy):
        layer = ghost(dtype=policy, momentum=0.0, epsilon=0.0)
        # 1000^2 overflows float16, and bfloat16 rounds 1004 to 1000.
        inputs = tf.constant([[-1000.0], [1000.0], [0.0], [8.0]])
        outputs = layer(inputs, training=True)
        assert outputs.dtype == layer.compute_dtype
        # Both half precisions have these values.
        np.testing.assert_allclose(outputs, [[-1], [1], [-1], [1]], rtol=1e-3)
        # (0 + 4) / 2 and (1000^2 + 4^2) / 2.
        np.testing.assert_allclose(moving(layer), [[2], [500_008]], rtol=1e-6)

    def test_parts_that_do_not_divide_the_batch_are_refused(self):
        rule = "`ghost_batch` must divide the batch, or be larger than it."
        with harness.refused(rule, "ghost_batch=3, batch=4"):
            ghost(3)(COLUMN, training=True)
        layer = ghost(3)
        graph = tf.function(
            lambda x: layer(x, training=True),
            input_signature=[tf.TensorSpec((None, 1))],
        )
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            graph(COLUMN)
        assert rule in str(error.value)

    @pytest.mark.parametrize(
        "kwargs", [{"axis": 1}, {"renorm": True}, {"synchronized": True}]
    )
    def test_other_normalizations_are_refused(self, kwargs):
        with harness.refused(
            "`axis`, `renorm` and `synchronized` must be -1, False, False for "
            "ghost batches."
        ):
            ghost(**kwargs)

    @pytest.mark.parametrize("ghost_batch", [0, 2.0, None])
    def test_a_ghost_batch_has_examples(self, ghost_batch):
        with harness.refused(
            "`ghost_batch` must be an int >= 1.", f"ghost_batch={ghost_batch!r}"
        ):
            ghost(ghost_batch)

    def test_is_saved_with_a_model(self, tmp_path):
        inputs = keras.Input((1,))
        layer = model.GhostBatchNormalization(2, epsilon=0.0, momentum=0.5)
        saved = keras.Model(inputs, layer(inputs))
        saved(COLUMN, training=True)
        saved.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras").layers[-1]
        np.testing.assert_array_equal(layer(COLUMN), loaded(COLUMN))
        assert loaded.get_config() == layer.get_config()
        np.testing.assert_allclose(
            loaded(COLUMN, training=True), [[-1], [1], [-1], [1]], rtol=1e-6
        )


def layers_of(built, kind):
    return [layer for layer in built.layers if isinstance(layer, kind)]


def count(variables):
    return sum(v.shape.num_elements() for v in variables)


@pytest.fixture(scope="module")
def resnet_50():
    with full_size.not_initialized():
        return model.resnet(model.RESNET_50, image_size=224)


class TestResNet:
    def test_resnet_50_has_its_parameters(self, resnet_50):
        # That of torchvision.models.resnet50: 25,557,032, "25.6M".
        assert count(resnet_50.trainable_weights) == 25_557_032
        # A mean and a variance for each of its 26,560 normalized channels:
        # 64 + 3 * (64+64+256) + 256 + 4 * (128+128+512) + 512
        #    + 6 * (256+256+1024) + 1024 + 3 * (512+512+2048) + 2048.
        assert count(resnet_50.non_trainable_weights) == 2 * 26_560

    def test_resnet_50_has_fifty_layers(self, resnet_50):
        # 49, 4 in shortcuts, and the dense layer.
        assert len(layers_of(resnet_50, keras.layers.Conv2D)) == 49 + 4
        pooled = layers_of(resnet_50, keras.layers.GlobalAveragePooling2D)
        assert pooled[0].input.shape == (None, 7, 7, 2048)
        assert resnet_50.output_shape == (None, 1000)

    def test_the_strides_are_on_the_3x3_convolutions(self, resnet_50):
        strided = [
            convolution.kernel_size[0]
            for convolution in layers_of(resnet_50, keras.layers.Conv2D)
            if convolution.strides == (2, 2)
        ]
        # The stem; three shortcuts; three stages.
        assert sorted(strided) == [1, 1, 1, 3, 3, 3, 7]

    def test_the_last_scale_of_each_block_begins_at_0(self, resnet_50):
        scales = [
            set(layer.gamma.numpy())
            for layer in layers_of(resnet_50, model.GhostBatchNormalization)
        ]
        assert len(scales) == 53
        assert scales.count({0.0}) == 3 + 4 + 6 + 3
        assert scales.count({1.0}) == 53 - 16

    def test_ghost_batches(self, resnet_50):
        for layer in layers_of(resnet_50, model.GhostBatchNormalization):
            assert layer.ghost_batch == 32

    def test_a_block_begins_as_its_shortcut(self):
        size = model.MINIATURE._replace(depths=(2,))
        built = model.resnet(size, image_size=8)
        first, second = layers_of(built, keras.layers.Add)
        outputs = keras.Model(built.inputs, [first.output, second.output])
        before, after = outputs(keras.random.normal((2, 8, 8, 3), seed=0))
        # The second block returns its input: the rectified first sum.
        np.testing.assert_array_equal(tf.nn.relu(before), after)

    def test_miniature(self):
        built = model.resnet(model.MINIATURE, image_size=32)
        # Convolutions: the stem's 9*3*12, and in the stages
        #   12*12 + 9*12*12 + 12*48 + 12*48
        #   48*24 + 9*24*24 + 24*96 + 48*96
        #   96*48 + 9*48*48 + 48*192 + 96*192, together 69,156;
        # scales and offsets: 2 * (12 + 120 + 240 + 480) = 1704;
        # the dense layer: 192*10 + 10 = 1930.
        assert count(built.trainable_weights) == 69_156 + 1704 + 1930

    def test_kernels_decay_and_nothing_else(self):
        built = model.resnet(model.MINIATURE, image_size=32)
        variables = [v.value for v in built.trainable_variables]
        with tf.GradientTape() as tape:
            loss = tf.add_n(built.losses)
        for variable, gradient in zip(
            built.trainable_variables, tape.gradient(loss, variables)
        ):
            if variable.name == "kernel":
                # The gradient of 1e-4 / 2 |w|^2.
                np.testing.assert_allclose(
                    gradient, 1e-4 * variable.value, rtol=1e-6
                )
            else:
                assert gradient is None


def windows(draws, **kwargs):
    return data.random_windows(np.float32(draws), **kwargs).numpy()


def draws_of(*attempts, place=(0.0, 0.0)):
    """Returns draws of (area, shape) attempts. The last one is repeated."""
    attempts += attempts[-1:] * (data.ATTEMPTS - len(attempts))
    areas, shapes = zip(*attempts)
    return [*areas, *shapes, *place, 0.0]


class TestRandomWindows:
    # With least_area = 0, an area draw u is the fraction u of the image. A
    # shape draw v is a ratio of (4/3)^(2v - 1): 3/4 for 0, 1 for 0.5 and nearly
    # 4/3 for nearly 1.
    @pytest.mark.parametrize(
        "area, shape, height, width",
        [
            (0.25, 0.5, 50, 50),  # sqrt(10000 / 4)
            (0.48, 0.0, 80, 60),  # 4800 = 80 * 60
            (0.48, LAST_DRAW, 60, 80),
        ],
    )
    def test_area_and_shape(self, area, shape, height, width):
        window = windows(
            draws_of((area, shape)), height=100, width=100, least_area=0.0
        )
        np.testing.assert_array_equal(window, [0, 0, height, width])

    def test_the_least_area(self):
        window = windows(
            draws_of((0.0, 0.5)), height=100, width=100, least_area=0.36
        )
        np.testing.assert_array_equal(window, [0, 0, 60, 60])

    @pytest.mark.parametrize(
        "place, top, left",
        [((0.0, 0.5), 0, 25), ((0.5, 0.0), 25, 0), ((LAST_DRAW,) * 2, 50, 50)],
    )
    def test_the_place(self, place, top, left):
        # A window of 50 pixels has 51 places.
        window = windows(
            draws_of((0.25, 0.5), place=place),
            height=100,
            width=100,
            least_area=0.0,
        )
        np.testing.assert_array_equal(window, [top, left, 50, 50])

    def test_a_window_that_does_not_fit_is_drawn_again(self):
        # In 50x200 pixels, half of the area is a square of 71.
        window = windows(
            draws_of((0.5, 0.5), (0.5, 0.5), (0.09, 0.5), (0.04, 0.5)),
            height=50,
            width=200,
            least_area=0.0,
        )
        np.testing.assert_array_equal(window, [0, 0, 30, 30])

    def test_if_nothing_fits_it_is_the_largest_square(self):
        window = windows(
            draws_of((0.5, 0.5), place=(0.5, 0.5)),
            height=50,
            width=200,
            least_area=0.0,
        )
        np.testing.assert_array_equal(window, [0, 75, 50, 50])

    @pytest.mark.parametrize(
        "height, width", [(1, 1), (2, 1000), (333, 500), (5000, 4000)]
    )
    def test_windows_are_within_the_image(self, height, width):
        draws = np.random.default_rng(0).random((5000, data.DRAWS), "float32")
        draws[:100] = np.round(draws[:100]) * LAST_DRAW
        top, left, rows, columns = windows(
            draws, height=height, width=width, least_area=0.08
        ).T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (rows >= 1).all()
        assert (columns >= 1).all()
        assert (top + rows).max() == height
        assert (left + columns).max() == width

    def test_scalars_and_batches_agree(self):
        draws = np.random.default_rng(0).random((3, data.DRAWS), "float32")
        sides = {"height": 40, "width": 60, "least_area": 0.08}
        batch = windows(draws, **sides)
        for number in range(3):
            np.testing.assert_array_equal(
                windows(draws[number], **sides), batch[number]
            )


def bytes_of(examples):
    """Returns what identifies each example of a list of batches."""
    return [
        (image.tobytes(), int(label))
        for images, labels in examples
        for image, label in zip(images, labels)
    ]


def taken(dataset, count):
    return list(dataset.take(count).as_numpy_iterator())


class TestMiniature:
    def test_train_and_test_share_no_source(self, monkeypatch):
        # Images without a digit are the dimmed background of 40 or 200.
        backgrounds = [
            np.full((40, 40, 3), value, "uint8") for value in (40, 200)
        ]
        blank = [
            digits.Split(np.zeros((3, 8, 8, 1), "float32"), np.full(3, label))
            for label in (1, 2)
        ]
        asked = []
        monkeypatch.setattr(
            photos,
            "photos",
            lambda *, validation: asked.append(validation) or backgrounds,
        )
        monkeypatch.setattr(
            digits,
            "splits",
            lambda *, validation: asked.append(validation) or blank,
        )
        data.pasted_digits.cache_clear()
        for split in ("test", "validation"):
            train_part, test_part = data.pasted_digits(split)
            assert set(train_part[0].ravel()) == {
                round(data.Miniature.DIMMED * 40)
            }
            assert set(test_part[0].ravel()) == {
                round(data.Miniature.DIMMED * 200)
            }
            assert set(train_part[1]) == {1}
            assert set(test_part[1]) == {2}
        assert asked == [False, False, True, True]
        data.pasted_digits.cache_clear()

    def test_a_digit_is_pasted_whole(self, monkeypatch):
        # A digit that is all ink on black is a bright square, which fades
        # within its margin of a tenth of its side.
        ink = digits.Split(np.ones((50, 8, 8, 1), "float32"), np.arange(50))
        black = np.zeros((40, 40, 3), "uint8")
        images, labels = data._pasted(ink, black, np.random.default_rng(0))
        copies = data.Miniature.COPIES
        assert images.shape == (50 * copies, 32, 32, 3)
        np.testing.assert_array_equal(labels, np.tile(np.arange(50), copies))
        lit = images.max(-1) > 0
        low, high = data.Miniature.DIGIT_SIZES
        for axis in (1, 2):
            sides = lit.any(axis).sum(-1)
            # Minus the dark end of the margin on both sides.
            assert low - 2 <= sides.min() < sides.max() <= high
        # Full ink has one color and is not dimmed.
        brightest = images.reshape(len(images), -1, 3).max(1)
        assert brightest.min() >= data.Miniature.DARKEST
        assert len(np.unique(brightest, axis=0)) > 300

    def test_training_batches(self):
        source = data.Miniature()
        ((images, labels),) = taken(source.train_dataset(64, seed=1), 1)
        assert (images.shape, labels.shape) == ((64, 32, 32, 3), (64,))
        assert images.dtype == np.float32
        assert set(labels) == set(range(10))

    def test_a_stream_depends_on_its_place_only(self):
        source = data.Miniature()

        def joined(batch_size, count, *, seed=1, **kwargs):
            dataset = source.train_dataset(batch_size, seed=seed, **kwargs)
            return map(np.concatenate, zip(*taken(dataset, count)))

        images, labels = joined(24, 2)
        for kwargs, part in (
            ({"batch_size": 8, "count": 5, "start": 8}, np.s_[8:]),
            (
                {"batch_size": 24, "count": 2, "share": streams.Share(0, 2)},
                np.s_[0::2],
            ),
            (
                {"batch_size": 24, "count": 2, "share": streams.Share(1, 2)},
                np.s_[1::2],
            ),
        ):
            found, found_labels = joined(**kwargs)
            # Vector instructions depend on the size of a batch.
            np.testing.assert_allclose(found, images[part], atol=1e-4)
            np.testing.assert_array_equal(found_labels, labels[part])
        others, _ = joined(24, 2, seed=2)
        distances = np.abs(others[:, None] - images).max((2, 3, 4))
        assert distances.min() > 1e-2

    def test_a_whole_window_is_the_image(self, monkeypatch):
        monkeypatch.setattr(data.Miniature, "LEAST_AREA", 1.0)
        (images, _), _ = data.pasted_digits("test")
        whole = data.standardized(images).numpy()
        ((found, _),) = taken(data.Miniature().train_dataset(4, seed=0), 1)
        for image in found:
            distance = np.abs(whole - image).max((1, 2, 3)).min()
            assert distance < 1e-4

    def test_test_batches_are_all_test_examples(self):
        _, (images, labels) = data.pasted_digits("test")
        batches = list(data.Miniature().test_dataset(1000).as_numpy_iterator())
        np.testing.assert_array_equal(
            np.concatenate([y for _, y in batches]), labels
        )
        assert len(labels) == 360 * data.Miniature.COPIES
        np.testing.assert_allclose(
            np.concatenate([x for x, _ in batches]),
            (images / 255 - data.MEAN) / data.DEVIATION,
            atol=1e-5,
        )


def colors_of(width, height, *, left, right):
    """Returns an image whose left half has one color, the other another."""
    image = np.zeros((height, width, 3), "uint8")
    image[:, : width // 2], image[:, width // 2 :] = left, right
    return image


RED, BLUE = (200, 20, 30), (10, 30, 220)
TRAINING = 10


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """ImageNet with 10 training and 6 test images, 1 of each broken."""
    generator = np.random.default_rng(0)
    sides = generator.integers(40, 80, (TRAINING, 2))
    training_images = [
        generator.integers(0, 256, (*side, 3), "uint8") for side in sides
    ]
    training_images[3] = b"no image"
    red = np.zeros((64, 128, 3), "uint8") + np.uint8(BLUE)
    red[:, 32:96] = RED  # The central square.
    tested = [
        red,
        colors_of(96, 64, left=RED, right=BLUE),
        b"no image",
        tf.io.encode_jpeg(np.full((50, 40, 1), 77, "uint8")).numpy(),
        red.transpose(1, 0, 2),
        red,
    ]
    path = tmp_path_factory.mktemp("prepared")
    prepared_fixture.prepare(
        "imagenet2012",
        path,
        {
            split: [
                (
                    number,
                    {
                        "file_name": f"{number}.jpg",
                        "image": image,
                        "label": number,
                    },
                )
                for number, image in enumerate(images)
            ]
            for split, images in (
                ("train", training_images),
                ("validation", tested),
            )
        },
    )
    return str(path)


class TestImageNet:
    def source(self, data_dir, **kwargs):
        return data.ImageNet(data_dir=data_dir, image_size=32, **kwargs)

    def test_training_batches(self, data_dir):
        source = self.source(data_dir)
        batches = taken(source.train_dataset(9, seed=0), 4)
        for images, labels in batches:
            assert images.shape == (9, 32, 32, 3)
            # A pass has 9 examples, without the broken one.
            assert sorted(labels) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        assert len({tuple(labels) for _, labels in batches}) > 1
        again = taken(source.train_dataset(9, seed=0), 4)
        assert bytes_of(again) == bytes_of(batches)
        assert len(set(bytes_of(batches))) == 36

    def test_workers_share_the_stream(self, data_dir):
        source = self.source(data_dir)
        whole = bytes_of(taken(source.train_dataset(18, seed=0), 3))
        parts = [
            bytes_of(
                taken(
                    source.train_dataset(
                        18, seed=0, share=streams.Share(index, 2)
                    ),
                    2,
                )
            )
            for index in (0, 1)
        ]
        assert set(parts[0] + parts[1]) <= set(whole)
        assert not set(parts[0]) & set(parts[1])

    def test_half_of_the_crops_are_mirrored(self, data_dir, monkeypatch):
        seen = []

        def window(draws, *, height, width, least_area):
            seen.append(least_area)
            return tf.stack([0, 0, height, width])

        monkeypatch.setattr(data, "random_windows", window)
        source = self.source(data_dir)._replace(split="validation")
        monkeypatch.setitem(
            data.IMAGENET_SPLITS, "validation", ("validation", "train")
        )
        mirrored = [
            image[16, 8, 0] < image[16, 24, 0]  # Red is to the right.
            for images, labels in taken(source.train_dataset(5, seed=0), 25)
            for image, label in zip(images, labels)
            if label == 1
        ]
        assert seen == [0.08]
        assert len(mirrored) == 25
        assert 5 < sum(mirrored) < 20

    def test_the_center_is_tested(self, data_dir):
        (batch,) = self.source(data_dir).test_dataset(8).as_numpy_iterator()
        images = dict(zip(batch[1], batch[0]))
        # The broken image is dropped.
        assert sorted(images) == [0, 1, 3, 4, 5]
        red, blue, grey = (
            data.standardized(np.uint8(color))
            for color in (RED, BLUE, [77] * 3)
        )
        # JPEG changes colors by a few of 255 levels, and a deviation is 0.225 *
        # 255. It blurs edges over a block of 16 pixels of 64, 8 of 32.
        near = {"atol": 0.15}
        for label in (0, 4):
            inner = images[label][8:-8, 8:-8]
            np.testing.assert_allclose(inner - red, 0 * inner, **near)
        np.testing.assert_allclose(images[1][:, :12] - red, 0, **near)
        np.testing.assert_allclose(images[1][:, -12:] - blue, 0, **near)
        np.testing.assert_allclose(images[3] - grey, 0, **near)

    def test_dropped_images_are_logged(self, data_dir, caplog):
        list(self.source(data_dir).test_dataset(8))
        (message,) = caplog.messages
        # The warning comes with the next image, in any order.
        assert re.fullmatch(
            "1 of [2-6] records dropped so far: image does not decode", message
        )

    @pytest.mark.parametrize("split", ["test", "validation"])
    def test_what_is_tested_is_not_trained_on(self, split):
        trained, tested = data.IMAGENET_SPLITS[split]
        assert (trained, tested) in [
            ("train", "validation"),
            ("train[:99%]", "train[99%:]"),
        ]
        assert (split == "validation") == tested.startswith("train")

    def test_unprepared_says_what_to_place_by_hand(self, tmp_path):
        source = data.ImageNet(data_dir=str(tmp_path))
        with pytest.raises(ValueError, match="must contain the prep") as error:
            source.train_dataset(8, seed=0)
        assert "python -m examples.common.data.prepared imagenet2012" in str(
            error.value
        )
        assert "ILSVRC2012_img_train.tar" in str(error.value)
        assert "ILSVRC2012_img_val.tar" in str(error.value)


class TestTask:
    def test_full_size(self):
        task = train.task(data="tfds")
        assert (task.base_batch, task.total_steps) == (256, 451_000)
        schedule = task.schedule(451_000)
        for first, last, rate in [
            (0, 150_239, 0.1),
            (150_241, 300_479, 0.01),
            (300_481, 400_639, 0.001),
            (400_641, 450_999, 0.0001),
        ]:
            for step in (first, last):
                assert float(schedule(step)) == pytest.approx(rate)
        optimizer = task.optimizer(schedule)
        assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
        assert optimizer.weight_decay is None  # The loss has weight decay.

    def test_the_schedule_is_stretched(self):
        schedule = train.step_decay(0.1, 4510)
        # 150,240 of 451,000 are 1502.4 of 4510.
        assert float(schedule(1502)) == pytest.approx(0.1)
        assert float(schedule(1503)) == pytest.approx(0.01)

    def test_unknown_data_is_refused(self):
        with harness.refused("`data` must be one of", "data='imagenet'"):
            train.task(data="imagenet")

    def test_full_size_fits_its_data(self, data_dir):
        task = train.task(data="tfds", data_dir=data_dir, image_size=32)
        network = full_size.model_that_fits(task, 4)
        images, _ = next(iter(task.test_dataset(2)))
        assert network(images).shape == (2, 1000)

    def test_the_miniature_trains(self, tmp_path, monkeypatch):
        shallow = model.MINIATURE._replace(depths=(1, 1))
        monkeypatch.setattr(model, "MINIATURE", shallow)
        settings = training.Settings(
            algorithm="adascale",
            scale=2,
            total_steps=2,
            model_dir=str(tmp_path),
            smoke=True,
        )
        result = training.run(train.task(), settings)
        assert 1 <= result.iterations <= 2
        assert result.examples == result.iterations * 2 * 32
