"""ImageNet, and a miniature of it: colored digits on crops of photos.

Both use the same random crops: a window of random position, size and shape is
resized to the size of the network's input.
"""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from examples.common.data import digits, drops, photos, prepared, streams

# Statistics of red, green and blue in ImageNet, for values in [0, 1].
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
# Number of attempts to draw a window that fits into the image.
ATTEMPTS = 10
# Random numbers per image: area and shape of each attempt, position, mirroring.
DRAWS = 2 * ATTEMPTS + 3
# The splits of tensorflow-datasets to train on and to test on.
IMAGENET_SPLITS = {
    "test": ("train", "validation"),
    "validation": ("train[:99%]", "train[99%:]"),
}
# The ratio of a window's sides is between 3/4 and 4/3.
ASPECT = 4 / 3


class Miniature(NamedTuple):
    """Colored digits on crops of photos: images of 32x32 pixels, 10 classes.

    Attributes:
        split: str, "test", or "validation" to train and test on parts of the
            training data.
    """

    split: str = "test"

    SIZE = 32
    # Range of a digit's side in pixels, with its margin.
    DIGIT_SIZES = (20, 28)
    # Dimmed backgrounds and bright colors make the digits legible.
    DIMMED = 0.4
    DARKEST = 160
    # Number of images per digit.
    COPIES = 8
    # Smaller windows can crop a digit beyond recognition.
    LEAST_AREA = 0.8

    def train_dataset(
        self, batch_size, *, seed, start=0, share=streams.Share()
    ):
        """Returns endless shuffled batches of (images, labels).

        Args:
            batch_size: int >= 1, examples per batch of all workers.
            seed: int, of the order and the crops.
            start: int >= 0, number of examples to skip.
            share: `streams.Share`, the part of each batch to read.

        Returns:
            `tf.data.Dataset` of float32 (size, 32, 32, 3), standardized, and
            int32 (size,).
        """
        # Arrays would become part of the dataset's graph, which is copied
        # often. Tensors do not.
        images, labels = map(tf.constant, pasted_digits(self.split)[0])

        def examples(indices, draws):
            windows = random_windows(
                draws,
                height=self.SIZE,
                width=self.SIZE,
                least_area=self.LEAST_AREA,
            )
            # Boxes are the first and the last pixel, in units in which those of
            # the image are 0 and 1.
            first, sides = tf.split(tf.cast(windows, tf.float32), 2, axis=-1)
            boxes = tf.concat([first, first + sides - 1], -1) / (self.SIZE - 1)
            crops = tf.image.crop_and_resize(
                images, boxes, tf.cast(indices, tf.int32), [self.SIZE] * 2
            )
            return standardized(crops), tf.gather(labels, indices)

        stream = streams.indices(
            labels.shape[0], seed=seed, start=start, share=share, draws=DRAWS
        )
        return (
            streams.batches(stream, batch_size, share=share)
            .map(examples, num_parallel_calls=tf.data.AUTOTUNE)
            .prefetch(tf.data.AUTOTUNE)
        )

    def test_dataset(self, batch_size):
        """Returns all test examples in batches of at most `batch_size`."""
        return (
            tf.data.Dataset.from_tensor_slices(pasted_digits(self.split)[1])
            .batch(batch_size)
            .map(lambda images, labels: (standardized(images), labels))
            .prefetch(tf.data.AUTOTUNE)
        )


class ImageNet(NamedTuple):
    """The images of the ILSVRC 2012 classification task, 1000 classes.

    Attributes:
        split: str, "test" to test on ImageNet's validation images, as the
            literature does, or "validation" to hold out and test on the last
            hundredth of the training images.
        data_dir: str, see `prepared.load`.
        image_size: int, pixels of a side of the network's input.
    """

    split: str = "test"
    data_dir: str | None = None
    image_size: int = 224

    BY_HAND = (
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, from "
        "https://image-net.org, in <data_dir>/downloads/manual"
    )
    LEAST_AREA = 0.08
    # The test crop is a central square whose side is this fraction of the
    # image's shorter side: 224 of 256 pixels.
    TESTED = 224 / 256

    def train_dataset(
        self, batch_size, *, seed, start=0, share=streams.Share()
    ):
        """Returns endless shuffled batches of (images, labels).

        Args:
            batch_size: int >= 1, examples per batch of all workers.
            seed: int, of the order, the crops and the mirroring.
            start: int >= 0, number of examples to skip.
            share: `streams.Share`, the part of each batch to read.

        Returns:
            `tf.data.Dataset` of float32 (size, image_size, image_size, 3),
            standardized, and int64 (size,).
        """

        def example(record, draws):
            height, width = _sides(record["image"])
            window = random_windows(
                draws, height=height, width=width, least_area=self.LEAST_AREA
            )
            image = self._decoded(record["image"], window)
            mirrored = tf.image.flip_left_right(image)
            return tf.where(draws[-1] < 0.5, mirrored, image), record["label"]

        stream = streams.records(
            *self._records(0),
            seed=seed,
            start=start,
            share=share,
            draws=DRAWS,
        )
        examples = drops.mapped(stream, example, "image does not decode")
        return streams.batches(examples, batch_size, share=share).prefetch(
            tf.data.AUTOTUNE
        )

    def test_dataset(self, batch_size):
        """Returns all test examples in batches of at most `batch_size`."""

        def example(record):
            height, width = _sides(record["image"])
            shorter = tf.cast(tf.minimum(height, width), tf.float32)
            side = tf.cast(tf.round(self.TESTED * shorter), tf.int32)
            top, left = (height - side) // 2, (width - side) // 2
            window = tf.stack([top, left, side, side])
            return self._decoded(record["image"], window), record["label"]

        records, _ = self._records(1)
        examples = drops.mapped(records, example, "image does not decode")
        return examples.batch(batch_size).prefetch(tf.data.AUTOTUNE)

    def _records(self, part):
        """Returns encoded records to train on (0) or to test on (1)."""
        return prepared.load(
            "imagenet2012",
            IMAGENET_SPLITS[self.split][part],
            data_dir=self.data_dir,
            decoders={"image": tfds.decode.SkipDecoding()},
            by_hand=self.BY_HAND,
        )

    def _decoded(self, encoded, window):
        """Decodes only a window of an image, resizes and standardizes it."""
        pixels = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.resize(pixels, [self.image_size] * 2, antialias=True)
        return standardized(image)


def _sides(encoded):
    """Returns height and width from the header of a JPEG image."""
    height, width, _ = tf.unstack(tf.image.extract_jpeg_shape(encoded))
    return height, width


def random_windows(draws, *, height, width, least_area):
    """Returns windows of random area, shape and position in an image.

    The area is uniform between `least_area` and 1 of the image's area. The
    ratio of the sides is between 3/4 and 4/3, uniform in its logarithm. Both
    are drawn until the window fits into the image. After `ATTEMPTS` draws the
    window is the largest square.

    Args:
        draws: float32, shape (..., DRAWS), uniform in [0, 1). The last number
            is not used: it is for mirroring.
        height: int or int32 scalar, height of the image in pixels.
        width: int or int32 scalar, width of the image in pixels.
        least_area: float in (0, 1].

    Returns:
        int32, shape (..., 4): top, left, height and width, in pixels.

    Example: a square of half the area, sqrt(5000) = 70.7 pixels, leaves 30
    positions in each direction.

    >>> half = tf.fill([DRAWS], 0.5)
    >>> random_windows(half, height=100, width=100, least_area=0.0).numpy()
    array([15, 15, 71, 71], dtype=int32)

    Reference: Goyal et al., "Accurate, Large Minibatch SGD", 2017, after
    Szegedy et al., "Going Deeper with Convolutions", 2015.
    """
    height, width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    areas, shapes, places, _ = tf.split(draws, [ATTEMPTS, ATTEMPTS, 2, 1], -1)
    areas = height * width * (least_area + (1 - least_area) * areas)
    ratios = tf.pow(ASPECT, 2 * shapes - 1)
    heights = tf.maximum(tf.round(tf.sqrt(areas / ratios)), 1)
    widths = tf.maximum(tf.round(tf.sqrt(areas * ratios)), 1)
    # The last attempt is the largest square, which always fits.
    square = tf.fill(tf.shape(areas[..., :1]), tf.minimum(height, width))
    sizes = tf.stack(
        [tf.concat([heights, square], -1), tf.concat([widths, square], -1)], -1
    )
    image = tf.stack([height, width])
    fits = tf.reduce_all(sizes <= image, -1)
    first = tf.argmax(tf.cast(fits, tf.int32), -1)
    size = tf.gather(sizes, first, batch_dims=first.shape.rank)
    place = tf.floor(places * (image - size + 1))
    return tf.cast(tf.concat([place, size], -1), tf.int32)


def standardized(images):
    """Returns images as float32 with mean 0 and deviation 1 in each channel.

    Args:
        images: numbers, shape (..., 3), in [0, 255].
    """
    images = tf.cast(images, tf.float32) / 255
    return (images - tf.constant(MEAN)) / tf.constant(DEVIATION)


@functools.cache
def pasted_digits(split):
    """Returns the examples of the miniature, the same at every call.

    Args:
        split: str, "test" or "validation".

    Returns:
        Training and test examples, each a tuple of uint8 images of shape
        (number of digits * COPIES, 32, 32, 3) and int32 labels.
    """
    validation = split == "validation"
    return tuple(
        _pasted(part, photo, np.random.default_rng(seed))
        for seed, (part, photo) in enumerate(
            zip(
                digits.splits(validation=validation),
                photos.photos(validation=validation),
            )
        )
    )


def _pasted(part, photo, generator):
    """Pastes digits of random color, size and position on crops of a photo."""
    # With a margin, digits fade out at their edges.
    grey = np.pad(part.images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    numbers = np.arange(len(grey) * Miniature.COPIES) % len(grey)
    count, size = len(numbers), Miniature.SIZE
    sides = generator.integers(*Miniature.DIGIT_SIZES, [count, 1])
    corners = generator.integers(size - sides + 1, size=[count, 2])
    # The boxes are the canvas, in units in which the digit is from 0 to 1.
    boxes = np.hstack([-corners, size - 1 - corners]) / (sides - 1)
    opacity = tf.image.crop_and_resize(grey, boxes, numbers, [size, size])
    colors = generator.integers(Miniature.DARKEST, 256, [count, 1, 1, 3])
    background = Miniature.DIMMED * photos.crops(
        photo, size, count=count, generator=generator
    )
    images = background + opacity.numpy() * (colors - background)
    return images.astype("uint8"), part.labels[numbers]
