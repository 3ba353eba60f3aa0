"""CIFAR-10, or scikit-learn's digits in its place: small images, 10 classes.

The same code shifts both at random by a few pixels, mirrors photos, and
standardizes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
import tensorflow_datasets as tfds

from examples.common.data import digits as digits_data
from examples.common.data import drops, prepared, streams

# Random numbers per image: vertical shift, horizontal shift, mirroring.
DRAWS = 3


class Source(NamedTuple):
    """Labelled images and their preprocessing.

    Attributes:
        splits: callable, () to the training and the test records. Each is a
            finite `tf.data.Dataset` of dicts with "image" and "label", and its
            size.
        pixels: callable, a record's image to its pixels, of shape (height,
            width, channels). Records on which it fails are dropped.
        mean: tuple of float, means of the training images' channels.
        deviation: tuple of float, their standard deviations.
        padding: int >= 0, maximum shift of an image in pixels.
        mirrored: bool, whether to mirror half of the training images.
    """

    splits: Callable
    pixels: Callable
    mean: tuple
    deviation: tuple
    padding: int
    mirrored: bool

    def train_dataset(
        self, batch_size, *, seed, start=0, share=streams.Share()
    ):
        """Returns endless shuffled and augmented batches.

        Args:
            batch_size: int >= 1, examples per batch of all workers.
            seed: int, of the order and the augmentation.
            start: int >= 0, number of examples to skip.
            share: `streams.Share`, the part of each batch to read.

        Returns:
            `tf.data.Dataset` of (images, labels): float32 of shape (batch,
            height, width, channels), and integers of shape (batch,).
        """
        (records, size), _ = self.splits()
        stream = streams.records(
            records, size, seed=seed, start=start, share=share, draws=DRAWS
        )

        def batch(images, labels, draws):
            images = augmented(
                images, draws, padding=self.padding, mirrored=self.mirrored
            )
            return self._standardized(images), labels

        return (
            streams.batches(self._examples(stream), batch_size, share=share)
            .map(batch, num_parallel_calls=tf.data.AUTOTUNE)
            .prefetch(tf.data.AUTOTUNE)
        )

    def test_dataset(self, batch_size):
        """Returns the test records, in order, in batches.

        Args:
            batch_size: int >= 1, examples per batch, except the last.

        Returns:
            Finite `tf.data.Dataset` of the elements of `train_dataset`.
        """
        _, (records, _) = self.splits()
        return (
            self._examples(records)
            .batch(batch_size)
            .map(lambda images, labels: (self._standardized(images), labels))
            .prefetch(tf.data.AUTOTUNE)
        )

    def _examples(self, records):
        """Maps (record, *others) to (image, label, *others)."""

        def example(record, *draws):
            return self.pixels(record["image"]), record["label"], *draws

        return drops.mapped(records, example, "image does not decode")

    def _standardized(self, images):
        return (tf.cast(images, tf.float32) - self.mean) / self.deviation


def cifar10(*, data_dir=None, validation=False):
    """Returns CIFAR-10 as a `Source`: 32x32 photos of 10 classes.

    Args:
        data_dir: str, see `prepared.load`.
        validation: bool, whether to train on the first 45,000 training images
            and test on the other 5,000.
    """

    @functools.cache
    def splits():
        parts = ("train[:90%]", "train[90%:]")
        return tuple(
            prepared.load(
                "cifar10",
                part,
                data_dir=data_dir,
                # `pixels` decodes, so that a broken image can be dropped.
                decoders={"image": tfds.decode.SkipDecoding()},
            )
            for part in (parts if validation else ("train", "test"))
        )

    def pixels(image):
        return tf.ensure_shape(tf.io.decode_png(image, channels=3), (32, 32, 3))

    return Source(
        splits,
        pixels=pixels,
        # Statistics of the training images, from the code of Zagoruyko &
        # Komodakis, "Wide Residual Networks", 2016.
        mean=(125.3, 123.0, 113.9),
        deviation=(63.0, 62.1, 66.7),
        padding=4,
        mirrored=True,
    )


def digits(*, validation=False):
    """Returns scikit-learn's digits as a `Source`: 8x8 grey images.

    Args:
        validation: bool, whether to train and test on parts of the training
            images.
    """

    @functools.cache
    def splits():
        return tuple(
            (
                tf.data.Dataset.from_tensor_slices(
                    {"image": part.images, "label": part.labels}
                ),
                len(part.labels),
            )
            for part in digits_data.splits(validation=validation)
        )

    return Source(
        splits,
        pixels=tf.identity,
        mean=(0.305,),
        deviation=(0.376,),
        padding=1,
        mirrored=False,  # A mirrored digit is not a digit.
    )


def augmented(images, draws, *, padding, mirrored):
    """Returns the images, shifted at random and perhaps mirrored.

    The result is that of padding an image with black and cropping it to its
    original size at a random position.

    Args:
        images: shape (batch, height, width, channels).
        draws: float32 of shape (batch, 3), uniform in [0, 1). They determine
            the vertical shift, the horizontal shift and the mirroring.
        padding: int >= 0, pixels of padding on each side.
        mirrored: bool, whether to mirror half of the images.

    Example:

    >>> image = tf.constant([[1, 2], [3, 4]])[None, :, :, None]
    >>> moved = augmented(image, [[0.9, 0.5, 0.9]], padding=1, mirrored=True)
    >>> moved[0, :, :, 0].numpy().tolist()
    [[4, 3], [0, 0]]
    """
    _, height, width, _ = images.shape
    draws = tf.convert_to_tensor(draws)
    first = tf.cast(draws[:, :2] * (2 * padding + 1), tf.int32)
    rows = first[:, :1] + tf.range(height)
    columns = first[:, 1:] + tf.range(width)
    if mirrored:
        columns = tf.where(draws[:, 2:] < 0.5, columns, columns[:, ::-1])
    sides = [padding, padding]
    padded = tf.pad(images, [[0, 0], sides, sides, [0, 0]])
    cropped = tf.gather(padded, rows, axis=1, batch_dims=1)
    return tf.gather(cropped, columns, axis=2, batch_dims=1)
