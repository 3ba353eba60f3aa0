"""Random views of images and their objects, and mixtures of two images.

The random numbers are arguments, so that an example is the same on every
worker.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from examples.yolo import boxes

# Random numbers per image of `windows`, `jittered` and `mixed`.
WINDOW_DRAWS, JITTER_DRAWS, MIX_DRAWS = 5, 2, 3

WHOLE = (0.0, 0.0, 1.0, 1.0)
OUTSIDE = 0.5  # Grey: the color of a view outside its image.
CONTRAST, BRIGHTNESS = 0.3, 0.1  # Largest relative and absolute change.


class Variety(NamedTuple):
    """How much the views of an image vary.

    Attributes:
        zoom: float >= 1. The sides of a view are 1 / zoom to zoom times those
            of the image. The part outside the image is grey.
        stretch: float >= 1, largest ratio of the vertical and horizontal zoom.
        mirrored: bool, whether to mirror half of the views.
        mixed: float in [0, 1], fraction of the examples that mix two images.
    """

    zoom: float
    stretch: float
    mirrored: bool
    mixed: float


def windows(draws, variety):
    """Returns random windows of images.

    Args:
        draws: float32, shape (batch, WINDOW_DRAWS), uniform in [0, 1).
        variety: `Variety`.

    Returns:
        float32, shape (batch, 4): boxes. A view that is larger than the image
        extends beyond it. A mirrored view has xmax < xmin.

    Example:

    >>> draws = tf.constant([[0.5, 0.5, 0.5, 0.5, 0.5]])
    >>> windows(draws, Variety(2, 1.5, mirrored=True, mixed=0)).numpy().tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    zoom, stretch, top, left, mirror = tf.unstack(draws, axis=-1)
    log_zoom = (2 * zoom - 1) * math.log(variety.zoom)
    log_stretch = (2 * stretch - 1) * math.log(variety.stretch) / 2
    height = tf.exp(log_zoom + log_stretch)
    width = tf.exp(log_zoom - log_stretch)
    # The smaller one of image and view lies within the larger one.
    ymin, xmin = top * (1 - height), left * (1 - width)
    ymax, xmax = ymin + height, xmin + width
    if variety.mirrored:
        is_mirrored = mirror < 0.5
        xmin, xmax = (
            tf.where(is_mirrored, xmax, xmin),
            tf.where(is_mirrored, xmin, xmax),
        )
    return tf.stack([ymin, xmin, ymax, xmax], -1)


def views(images, objects, windows, *, size):
    """Returns windows of images, resized, and the objects in them.

    Boxes are clipped to the window. Objects whose center is outside the window
    become padding.

    Args:
        images: uint8 or float32 in [0, 255], shape (batch, height, width, 3).
        objects: float32, shape (batch, objects, boxes.FIELDS).
        windows: float32, shape (batch, 4), see the function `windows`.
        size: int, pixels of a side of the views.

    Returns:
        float32 of shape (batch, size, size, 3), in [0, 1], and the objects.
    """
    start, extent = windows[:, :2], windows[:, 2:] - windows[:, :2]
    # The boxes of crop_and_resize are the centers of the first and the last
    # pixel, in units in which those of the image are 0 and 1.
    sides = tf.cast(tf.shape(images)[1:3], tf.float32)
    ends = [
        ((start + extent * part) * sides - 0.5) / tf.maximum(sides - 1, 1)
        for part in (0.5 / size, 1 - 0.5 / size)
    ]
    shown = tf.image.crop_and_resize(
        images,
        tf.concat(ends, -1),
        tf.range(tf.shape(images)[0]),
        (size, size),
        extrapolation_value=255 * OUTSIDE,
    )
    start, extent = start[:, tf.newaxis], extent[:, tf.newaxis]
    first, second = (
        (corner - start) / extent
        for corner in (objects[..., 0:2], objects[..., 2:4])
    )
    box = tf.concat([tf.minimum(first, second), tf.maximum(first, second)], -1)
    center = (first + second) / 2
    is_shown = tf.reduce_all((center > 0) & (center < 1), -1, keepdims=True)
    box = tf.clip_by_value(box, 0, 1)
    objects = tf.concat([box, objects[..., 4:]], -1)
    return shown / 255, tf.where(is_shown, objects, 0.0)


def jittered(images, draws):
    """Returns images with random contrast and brightness.

    Args:
        images: float32, shape (batch, size, size, 3), in [0, 1].
        draws: float32, shape (batch, JITTER_DRAWS), uniform in [0, 1).

    Returns:
        float32, shape and range of `images`.
    """
    contrast, brightness = tf.unstack(
        (2 * draws - 1)[..., tf.newaxis, tf.newaxis, tf.newaxis], axis=1
    )
    changed = (images - 0.5) * (1 + CONTRAST * contrast)
    return tf.clip_by_value(changed + 0.5 + BRIGHTNESS * brightness, 0, 1)


def mixed(images, objects, others, other_objects, draws, *, share):
    """Returns mixtures of two images, with the objects of both.

        image = weight * first + (1 - weight) * second

    The weight is drawn from the Beta(3/2, 3/2) distribution. It is also the
    weight of the image's objects. The boxes stay valid, because nothing moves.

    Args:
        images: float32, shape (batch, size, size, 3).
        objects: float32, shape (batch, objects, boxes.FIELDS), of weight 1.
        others: second images, like `images`.
        other_objects: their objects, like `objects`.
        draws: float32, shape (batch, MIX_DRAWS), uniform in [0, 1).
        share: float in [0, 1], fraction of the images to mix.

    Returns:
        The images, and the objects of both, with twice as many rows.

    Reference: Zhang et al., "Bag of Freebies for Training Object Detection
        Neural Networks", 2019, section 3.1.
    """
    choice, radius, angle = tf.unstack(draws, axis=-1)
    # The density of Beta(3/2, 3/2) is a semicircle: a constant times
    # sqrt(x (1 - x)). A coordinate of a uniform point on a disc has the same.
    drawn = 0.5 + 0.5 * tf.sqrt(radius) * tf.cos(2 * math.pi * angle)
    weight = tf.where(choice < share, drawn, 1.0)
    of_image = weight[:, tf.newaxis, tf.newaxis, tf.newaxis]
    of_object = weight[:, tf.newaxis, tf.newaxis]
    field = tf.one_hot(boxes.WEIGHT, boxes.FIELDS)
    return (
        of_image * images + (1 - of_image) * others,
        tf.concat(
            [
                objects * (1 - field + of_object * field),
                other_objects * (1 - field + (1 - of_object) * field),
            ],
            axis=1,
        ),
    )
