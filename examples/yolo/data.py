"""Pascal VOC, or scikit-learn's digits pasted on photos in its place.

The same code makes random views of both and mixes them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from examples.common.data import digits as digits_data
from examples.common.data import drops, photos, prepared, streams
from examples.yolo import augmentation, boxes

VIEW_DRAWS = augmentation.WINDOW_DRAWS + augmentation.JITTER_DRAWS
# The images to mix with come from a second stream, with seed + SECOND_SEED.
SECOND_SEED = 2**32

VOC_OBJECTS = 100
DIGITS_OBJECTS = 3
TRAIN_IMAGES, TEST_IMAGES = 4096, 1000
IMAGE_SIZE = 64
# Sides of a digit's square in pixels. A digit is as high and less wide.
SIDES = (16, 20, 24, 28, 32)
# Light digits on a darkened photo are legible.
TINTS, DARKNESS = (160, 256), 2
# Number of attempts to place a digit.
TRIES = 20
# A digit's box contains its pixels of at least this fraction of full ink.
INK = 0.25


class Source(NamedTuple):
    """Images with objects, and their preprocessing.

    Attributes:
        views: callable, (batch_size, *, seed, start, share, draws, variety) to
            an endless shuffled `tf.data.Dataset` of (images, objects, draws):
            random views, float32 of shapes (batch, size, size, 3) and (batch,
            objects, boxes.FIELDS), and the unused draws.
        test_dataset: callable, batch_size to a finite `tf.data.Dataset` of test
            (images, objects), in order.
        variety: `augmentation.Variety`.
    """

    views: Callable
    test_dataset: Callable
    variety: augmentation.Variety

    def train_dataset(
        self, batch_size, *, seed, start=0, share=streams.Share()
    ):
        """Returns endless shuffled, augmented and mixed batches.

        Args:
            batch_size: int >= 1, examples per batch of all workers.
            seed: int, of the order and the augmentation.
            start: int >= 0, number of examples to skip.
            share: `streams.Share`, the part of each batch to read.

        Returns:
            `tf.data.Dataset` of (images, objects): float32 of shapes (batch,
            size, size, 3), in [0, 1], and (batch, 2 objects, boxes.FIELDS).
        """

        def mixed(first, second):
            images, objects, draws = first
            return augmentation.mixed(
                images, objects, *second[:2], draws, share=self.variety.mixed
            )

        first, second = (
            self.views(
                batch_size,
                seed=seed + offset,
                start=start,
                share=share,
                draws=VIEW_DRAWS + augmentation.MIX_DRAWS,
                variety=self.variety,
            )
            for offset in (0, SECOND_SEED)
        )
        return (
            tf.data.Dataset.zip(first, second)
            .map(mixed, num_parallel_calls=tf.data.AUTOTUNE)
            .prefetch(tf.data.AUTOTUNE)
        )


def varied(images, objects, draws, *, variety, size):
    """Returns random views of a batch of images, and the unused draws.

    Args:
        images: uint8, shape (batch, height, width, 3).
        objects: float32, shape (batch, objects, boxes.FIELDS).
        draws: float32, shape (batch, VIEW_DRAWS or more).
        variety: `augmentation.Variety`.
        size: int, pixels of a side of the views.
    """
    of_window, of_jitter, left = tf.split(
        draws,
        [augmentation.WINDOW_DRAWS, augmentation.JITTER_DRAWS, -1],
        axis=-1,
    )
    windows = augmentation.windows(of_window, variety)
    images, objects = augmentation.views(images, objects, windows, size=size)
    return augmentation.jittered(images, of_jitter), objects, left


def padded(box, label, difficult, *, count):
    """Returns the objects of an image, padded, without unusable ones.

    Boxes are clipped to the image. Boxes without area are dropped, and so are
    boxes beyond the first `count`.

    Args:
        box: float32, shape (objects, 4).
        label: integers, shape (objects,).
        difficult: bool, shape (objects,).
        count: int, number of rows to return.

    Returns:
        float32 of shape (count, boxes.FIELDS), and the number of dropped boxes,
        an int64 scalar.

    Example:

    >>> box = tf.constant([[0.5, 0.5, 1.5, 1.0], [0.2, 1.1, 0.8, 1.2]])
    >>> objects, dropped = padded(
    ...     box, tf.constant([7, 8]), tf.constant([False, False]), count=2)
    >>> objects.numpy().tolist()
    [[0.5, 0.5, 1.0, 1.0, 7.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    >>> int(dropped)
    1
    """
    box = tf.clip_by_value(box, 0, 1)
    others = [
        tf.cast(label, tf.float32),
        tf.ones(tf.shape(label)),
        tf.cast(difficult, tf.float32),
    ]
    objects = tf.concat([box, tf.stack(others, -1)], -1)
    # False if a coordinate is NaN.
    has_area = tf.reduce_all(box[:, 2:] > box[:, :2], -1)
    objects = tf.boolean_mask(objects, has_area)[:count]
    kept = tf.shape(objects)[0]
    dropped = tf.cast(tf.shape(box)[0] - kept, tf.int64)
    objects = tf.pad(objects, [(0, count - kept), (0, 0)])
    return tf.ensure_shape(objects, (count, boxes.FIELDS)), dropped


def voc(*, image_size, data_dir=None, split="test"):
    """Returns Pascal VOC as a `Source`: photos with objects of 20 classes.

    Trains on 2007 and 2012, including difficult objects, like Zhang et al.
    2019, and tests on 2007.

    Args:
        image_size: int, pixels of a side of the resized photos.
        data_dir: str, see `prepared.load`.
        split: str, "test" or "validation". "validation" trains on "train" of
            both years and tests on "validation" of 2007.
    """
    train, test = {
        "test": ("train+validation", "test"),
        "validation": ("train", "validation"),
    }[split]

    @functools.cache
    def records(year, part):
        return prepared.load(
            f"voc/{year}",
            part,
            data_dir=data_dir,
            # Compressed photos are cheap to shuffle and skip.
            decoders={"image": tfds.decode.SkipDecoding()},
        )

    def read(dataset):
        """Maps (record, *others) to (image, objects, *others)."""

        def example(record, *others):
            image = tf.io.decode_image(
                record["image"], channels=3, expand_animations=False
            )
            found = record["objects"]
            objects, dropped = padded(
                found["bbox"],
                found["label"],
                found["is_difficult"],
                count=VOC_OBJECTS,
            )
            seen = tf.size(found["label"], tf.int64)
            return (image, objects, *others), dropped, seen

        return drops.counted(
            drops.mapped(dataset, example, "image does not decode"),
            "box without area, or too many boxes in its image",
        )

    def views(batch_size, *, seed, start, share, draws, variety):
        (first, size), (second, second_size) = (
            records(year, train) for year in (2007, 2012)
        )
        stream = streams.records(
            first.concatenate(second),
            size + second_size,
            seed=seed,
            start=start,
            share=share,
            draws=draws,
        )

        def view(*example):
            batch_of_one = [value[tf.newaxis] for value in example]
            batch = varied(*batch_of_one, variety=variety, size=image_size)
            return tuple(value[0] for value in batch)

        stream = read(stream).map(view, num_parallel_calls=tf.data.AUTOTUNE)
        return streams.batches(stream, batch_size, share=share)

    def test_dataset(batch_size):
        def whole(image, objects):
            images, objects = augmentation.views(
                image[tf.newaxis],
                objects[tf.newaxis],
                tf.constant([augmentation.WHOLE]),
                size=image_size,
            )
            return images[0], objects[0]

        dataset, _ = records(2007, test)
        return (
            read(dataset)
            .map(whole, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(batch_size)
            .prefetch(tf.data.AUTOTUNE)
        )

    return Source(
        views,
        test_dataset,
        augmentation.Variety(zoom=2, stretch=1.5, mirrored=True, mixed=0.5),
    )


def digits(*, split="test"):
    """Returns photos with one to three pasted digits as a `Source`.

    Args:
        split: str, "test" or "validation". "validation" pastes training digits
            on two parts of the training photo.
    """

    @functools.cache
    def scenes():
        validation = split == "validation"
        made = (
            pasted(part, photo, count=count, seed=seed)
            for seed, (part, photo, count) in enumerate(
                zip(
                    digits_data.splits(validation=validation),
                    photos.photos(validation=validation),
                    (TRAIN_IMAGES, TEST_IMAGES),
                )
            )
        )
        # Arrays would become constants of each graph that reads them.
        with tf.device("CPU"):
            return tuple(
                tuple(tf.constant(array) for array in arrays) for arrays in made
            )

    def views(batch_size, *, seed, start, share, draws, variety):
        (images, objects), _ = scenes()
        stream = streams.indices(
            len(images), seed=seed, start=start, share=share, draws=draws
        )

        def view(indices, draws):
            return varied(
                tf.gather(images, indices),
                tf.gather(objects, indices),
                draws,
                variety=variety,
                size=IMAGE_SIZE,
            )

        return streams.batches(stream, batch_size, share=share).map(
            view, num_parallel_calls=tf.data.AUTOTUNE
        )

    def test_dataset(batch_size):
        _, (images, objects) = scenes()
        return (
            tf.data.Dataset.from_tensor_slices((images, objects))
            .batch(batch_size)
            .map(lambda image, rows: (tf.cast(image, tf.float32) / 255, rows))
            .prefetch(tf.data.AUTOTUNE)
        )

    return Source(
        views,
        test_dataset,
        # A mirrored digit is not a digit.
        augmentation.Variety(zoom=1.1, stretch=1.1, mirrored=False, mixed=0.25),
    )


def pasted(split, photo, *, count, seed):
    """Returns crops of a photo with one to three tinted digits each.

    Args:
        split: `digits_data.Split`, the digits to paste.
        photo: uint8, shape (height, width, 3).
        count: int, number of images.
        seed: int, of all random numbers.

    Returns:
        uint8 of shape (count, IMAGE_SIZE, IMAGE_SIZE, 3), and objects, float32
        of shape (count, DIGITS_OBJECTS, boxes.FIELDS).
    """
    generator = np.random.default_rng(seed)
    images = photos.crops(photo, IMAGE_SIZE, count=count, generator=generator)
    images //= DARKNESS
    objects = np.zeros((count, DIGITS_OBJECTS, boxes.FIELDS), "float32")
    inks = {
        side: tf.image.resize(split.images, (side, side)).numpy()
        for side in SIDES
    }
    for image, rows in zip(images, objects):
        is_free = np.ones(image.shape[:2], bool)
        for row in rows[: generator.integers(1, DIGITS_OBJECTS + 1)]:
            side = generator.choice(SIDES)
            number = generator.integers(len(split.labels))
            tint = generator.integers(*TINTS, size=3)
            for _ in range(TRIES):
                top, left = generator.integers(IMAGE_SIZE - side + 1, size=2)
                window = np.s_[top : top + side, left : left + side]
                if is_free[window].all():
                    break
            else:
                continue  # There is no room for this digit.
            ink = inks[side][number]
            image[window] = (1 - ink) * image[window] + ink * tint
            is_free[window] = False
            marked = np.argwhere(ink[..., 0] >= INK)
            first, last = marked.min(0), marked.max(0)
            row[boxes.BOX] = np.stack([first, last + 1]).reshape(4)
            row[boxes.BOX] += (top, left, top, left)
            row[boxes.BOX] /= IMAGE_SIZE
            row[boxes.LABEL] = split.labels[number]
            row[boxes.WEIGHT] = 1
    return images, objects
