"""Objects, their boxes, and how predictions encode boxes.

A box is (ymin, xmin, ymax, xmax), each a fraction of the image's height or
width. The objects of an image are the rows of a float32 tensor. Every image has
the same number of rows, so that a batch is a tensor too:

    0:4  BOX
    4    LABEL      number of the class
    5    WEIGHT     weight of the object's image in a mixture; 1 if images are
                    not mixed, 0 for padding
    6    DIFFICULT  1 if a detector need not find it, else 0
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

BOX, LABEL, WEIGHT, DIFFICULT = slice(4), 4, 5, 6
FIELDS = 7

# Limits a side to e^10 times its anchor, so that the exponential is finite.
LARGEST_LOG_SIDE = 10.0


class Head(NamedTuple):
    """A grid of predictions.

    Attributes:
        stride: int, pixels between the centers of two neighboring cells.
        anchors: tuple of (width, height) in pixels, the initial boxes of a
            cell's predictions.
    """

    stride: int
    anchors: tuple


class Priors(NamedTuple):
    """The initial box of each prediction, one head after another.

    Attributes:
        corners: float32, shape (predictions, 2), upper left corner of the cell,
            in units of cells: (row, column).
        grid: float32, shape (predictions, 1), cells on a side of the image.
        anchors: float32, shape (predictions, 2), (height, width) as fractions
            of the image.
    """

    corners: np.ndarray
    grid: np.ndarray
    anchors: np.ndarray


def priors(heads, *, image_size):
    """Returns the `Priors` of heads, ordered by row, column and anchor.

    Args:
        heads: tuple of `Head`.
        image_size: int, pixels of a side of the images.

    Example:

    >>> start = priors((Head(32, ((16, 8), (32, 64))),), image_size=64)
    >>> start.corners[:3].tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    >>> start.anchors[:2].tolist()
    [[0.125, 0.25], [1.0, 0.5]]
    """
    parts = []
    for head in heads:
        side, count = image_size // head.stride, len(head.anchors)
        rows, columns = np.indices((side, side)).reshape(2, -1)
        corners = np.repeat(np.stack([rows, columns], -1), count, axis=0)
        anchors = np.tile(head.anchors, (side * side, 1))[:, ::-1] / image_size
        parts.append((corners, np.full((len(corners), 1), side), anchors))
    return Priors(
        *(np.concatenate(part).astype("float32") for part in zip(*parts))
    )


def decoded(predictions, priors):
    """Returns the boxes of raw predictions.

        center = (corner + sigmoid(t[:2])) / grid
        size = anchor * exp(t[2:])

    Args:
        predictions: float32, shape (batch, predictions, >= 4), starting with t.
        priors: `Priors`.

    Returns:
        float32, shape (batch, predictions, 4), not clipped to the image.

    Example:

    >>> start = priors((Head(32, ((16, 32),)),), image_size=32)
    >>> decoded(tf.zeros((1, 1, 4)), start).numpy().tolist()
    [[[0.0, 0.25, 1.0, 0.75]]]

    Reference: Redmon & Farhadi, "YOLOv3: An Incremental Improvement", 2018.
    """
    center = (priors.corners + tf.sigmoid(predictions[..., :2])) / priors.grid
    logs = tf.minimum(predictions[..., 2:4], LARGEST_LOG_SIDE)
    half = priors.anchors * tf.exp(logs) / 2
    return tf.concat([center - half, center + half], -1)


def overlaps(first, second):
    """Returns the intersection over union of boxes.

    Args:
        first: float32, shape (..., 4).
        second: float32, shape (..., 4), broadcast against `first`.

    Returns:
        float32, shape (...,), 0 if both areas are 0.

    Example:

    >>> float(overlaps(tf.constant([0.0, 0.0, 1.0, 0.5]),
    ...                tf.constant([0.5, 0.0, 1.0, 1.0])))  # 0.25 / 0.75
    0.3333333432674408
    """
    top_left = tf.maximum(first[..., :2], second[..., :2])
    bottom_right = tf.minimum(first[..., 2:], second[..., 2:])
    shared = area(tf.concat([top_left, bottom_right], -1))
    return tf.math.divide_no_nan(shared, area(first) + area(second) - shared)


def area(box):
    """Returns the areas of boxes, 0 if an end is before the beginning."""
    return tf.reduce_prod(tf.maximum(box[..., 2:] - box[..., :2], 0), -1)


def owners(objects, priors):
    """Returns the object that each prediction should find.

    One prediction owns an object. The candidates are the anchors of the cells
    that contain its center, one cell per head. The anchor with the most similar
    shape is the owner. A prediction that would own several objects owns the
    last one.

    Args:
        objects: float32, shape (batch, objects, FIELDS).
        priors: `Priors`.

    Returns:
        int32, shape (batch, predictions): row of the object, or -1.
    """
    # Axes: batch, predictions, objects, (y, x).
    box = objects[:, tf.newaxis, :, BOX]
    center = (box[..., :2] + box[..., 2:]) / 2
    size = box[..., 2:] - box[..., :2]
    corners, grid, anchors = (value[:, tf.newaxis] for value in priors)
    cell = tf.minimum(tf.floor(center * grid), grid - 1)
    is_inside = tf.reduce_all(cell == corners, -1)
    shape = overlaps(
        tf.concat([-size / 2, size / 2], -1),
        tf.concat([-anchors / 2, anchors / 2], -1),
    )
    # Cells that do not contain the center are never the owner.
    similarity = tf.where(is_inside, shape, -1.0)
    best = tf.argmax(similarity, 1, output_type=tf.int32)[:, tf.newaxis]
    numbers = tf.range(tf.shape(similarity)[1])[:, tf.newaxis]
    is_owner = (best == numbers) & (objects[:, tf.newaxis, :, WEIGHT] > 0)
    rows = tf.range(tf.shape(similarity)[2])
    return tf.reduce_max(tf.where(is_owner, rows, -1), -1)


def detections(predictions, priors, *, threshold, overlap, count):
    """Returns the detected objects of raw predictions.

    The score of a class is the probability of an object times that of the
    class. Non-maximum suppression keeps the best of overlapping boxes of one
    class.

    Args:
        predictions: float32, shape (batch, predictions, 5 + classes): t, the
            logit of an object, the logits of the classes.
        priors: `Priors`.
        threshold: float, lowest score.
        overlap: float, largest intersection over union of two boxes to keep.
        count: int, maximum detections per image.

    Returns:
        `(boxes, scores, labels, counts)`: float32 of shape (batch, count, 4),
        float32 and int32 of shape (batch, count), sorted by score, and the
        number of detections, int32 of shape (batch,).
    """
    probabilities = tf.sigmoid(predictions[..., 4:])
    found = tf.image.combined_non_max_suppression(
        decoded(predictions, priors)[:, :, tf.newaxis],
        probabilities[..., :1] * probabilities[..., 1:],
        max_output_size_per_class=count,
        max_total_size=count,
        iou_threshold=overlap,
        score_threshold=threshold,
        clip_boxes=True,
    )
    return (
        found.nmsed_boxes,
        found.nmsed_scores,
        tf.cast(found.nmsed_classes, tf.int32),
        found.valid_detections,
    )
