"""Mean average precision as defined by Pascal VOC 2007.

COCOeval of pycocotools, restricted to one overlap and 11 recalls, is a similar
but different metric. There, a detection whose best object is already found can
match the second best, and only one detection of a difficult object is ignored.
Boxes here are fractions of the image. VOC's program adds a pixel to the sides.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from examples.common import inference
from examples.yolo import boxes

OVERLAP = 0.5
# The original evaluation keeps as many predictions per image. These are nearly
# all that matter at the highest recall.
THRESHOLD = 0.005
SUPPRESSION = 0.45
COUNT = 100


class Detections(NamedTuple):
    """Detections in one image, in any order.

    Attributes:
        boxes: float, shape (detections, 4).
        scores: float, shape (detections,).
        labels: int, shape (detections,).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def evaluate(model, dataset, *, priors):
    """Returns a model's mean average precision.

    Args:
        model: Keras model, see `model.yolo`.
        dataset: finite `tf.data.Dataset` of (images, objects), see
            `data.Source`.
        priors: `boxes.Priors` of the model.

    Returns:
        dict, {"map": float}.
    """
    detections, objects = [], []
    for (_, rows), raw in inference.predictions(model, dataset):
        # Other devices do not support this, or only for few boxes.
        with tf.device("CPU"):
            *found, counts = boxes.detections(
                raw,
                priors,
                threshold=THRESHOLD,
                overlap=SUPPRESSION,
                count=COUNT,
            )
        detections.extend(
            Detections(*(values[:count].numpy() for values in image))
            for *image, count in zip(*found, counts)
        )
        objects.extend(rows.numpy())
    return {"map": mean_average_precision(detections, objects)}


def mean_average_precision(detections, objects):
    """Returns the mean of the classes' average precisions.

    Classes without an object that is not difficult are ignored.

    Args:
        detections: list of `Detections`, one per image.
        objects: list of float arrays of shape (objects, boxes.FIELDS), one per
            image.

    Returns:
        float in [0, 1], 0 if all classes are ignored.

    Example:

    >>> cat = [0.1, 0.1, 0.5, 0.5, 3, 1, 0]
    >>> found = Detections(
    ...     np.array([[0.1, 0.1, 0.5, 0.45]]), np.array([0.9]), np.array([3]))
    >>> mean_average_precision([found], [np.array([cat])])
    1.0

    Reference: Everingham et al., "The Pascal Visual Object Classes (VOC)
        Challenge", 2010, section 4.2.
    """
    counted = np.concatenate([_counted(rows) for rows in objects])
    labels = np.unique(counted[:, boxes.LABEL])
    if not len(labels):
        return 0.0
    return float(
        np.mean(
            [
                _class_average_precision(detections, objects, label)
                for label in labels
            ]
        )
    )


def average_precision(is_correct, *, count):
    """Returns the mean of the best precisions at recalls 0, 0.1 ... 1.

    Args:
        is_correct: bool, shape (detections,), sorted by falling score.
        count: int >= 1, number of objects.

    Returns:
        float in [0, 1]. The precision at a recall is the highest one at this
        recall or a higher recall, or 0 if no detection reaches it.

    Example: one of two objects is found, so precision is 1 at recalls to 0.5.

    >>> average_precision(np.array([True]), count=2) == 6 / 11
    True
    """
    correct = np.cumsum(is_correct)
    precisions = correct / np.arange(1, len(correct) + 1)
    # Compares integers, because 3 / 10 and 0.3 may differ.
    tenths = np.arange(11)[:, np.newaxis]
    reaches = 10 * correct >= tenths * count
    return float(np.mean(np.max(reaches * precisions, axis=1, initial=0)))


def _class_average_precision(detections, objects, label):
    scores, verdicts = [], []
    count = 0
    for found, rows in zip(detections, objects):
        is_label = found.labels == label
        rows = rows[(rows[:, boxes.LABEL] == label) & _is_object(rows)]
        order = np.argsort(-found.scores[is_label], kind="stable")
        scores.append(found.scores[is_label][order])
        verdicts.append(_verdicts(found.boxes[is_label][order], rows))
        count += len(_counted(rows))
    scores, verdicts = np.concatenate(scores), np.concatenate(verdicts)
    verdicts = verdicts[np.argsort(-scores, kind="stable")]
    return average_precision(verdicts[verdicts >= 0] > 0, count=count)


def _verdicts(found, rows):
    """Returns 1 for a correct detection, 0 for a false one, -1 if ignored.

    A detection is compared with the object that it overlaps most. It is false
    if the overlap is too small or the object is already found. It is ignored if
    the object is difficult.

    Args:
        found: float, shape (detections, 4), sorted by falling score.
        rows: float, shape (objects, boxes.FIELDS).
    """
    verdicts = np.zeros(len(found), int)
    if not len(rows):
        return verdicts
    overlaps = _overlaps(found[:, np.newaxis], rows[:, boxes.BOX])
    was_found = np.zeros(len(rows), bool)
    for number, best in enumerate(np.argmax(overlaps, axis=1)):
        if overlaps[number, best] < OVERLAP:
            continue
        if rows[best, boxes.DIFFICULT]:
            verdicts[number] = -1
        elif not was_found[best]:
            verdicts[number] = 1
            was_found[best] = True
    return verdicts


def _overlaps(first, second):
    """Returns `boxes.overlaps` in NumPy and float64."""
    first, second = first.astype("float64"), second.astype("float64")
    start = np.maximum(first[..., :2], second[..., :2])
    end = np.minimum(first[..., 2:], second[..., 2:])
    shared, *areas = (
        np.prod(np.maximum(upper - lower, 0), axis=-1)
        for lower, upper in (
            (start, end),
            (first[..., :2], first[..., 2:]),
            (second[..., :2], second[..., 2:]),
        )
    )
    return shared / np.maximum(sum(areas) - shared, np.finfo(float).tiny)


def _counted(rows):
    """Returns the objects that a detector must find."""
    return rows[_is_object(rows) & (rows[:, boxes.DIFFICULT] == 0)]


def _is_object(rows):
    return rows[:, boxes.WEIGHT] > 0
