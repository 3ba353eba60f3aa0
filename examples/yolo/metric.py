"""Mean average precision by the definition of Pascal VOC 2007.

pycocotools' COCOeval, restricted to one overlap and 11 recalls, comes near but
is another metric: there, a detection whose best object was found before may
find the second best, and only one detection of a difficult object is pardoned.
Boxes are fractions of the image; VOC's own program adds a pixel to their sides.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from examples import training
from examples.yolo import boxes

OVERLAP = 0.5
# What is kept of an image's predictions: nearly all that could be of use at the
# highest recall, and what the original evaluates.
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
        model: as `model.yolo` returns.
        dataset: finite `tf.data.Dataset` of (images, objects), see
            `data.Source`.
        priors: `boxes.Priors` of the model.

    Returns:
        dict, {"map": float}.
    """
    detections, objects = [], []
    for (_, rows), raw in training.predictions(model, dataset):
        with tf.device("CPU"):  # Other devices cannot, or only few boxes.
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

    Only classes with an object that is not difficult count.

    Args:
        detections: list of `Detections`, of each image.
        objects: list of float arrays of shape (objects, boxes.FIELDS), of each
            image in the same order.

    Returns:
        float in [0, 1]; 0 if no class counts.

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
        is_correct: bool, shape (detections,), by falling score.
        count: int >= 1, number of objects.

    Returns:
        float in [0, 1]. The precision at a recall is the highest of those at
        that recall or above; 0 where none comes so far.

    Example: one of two objects was found, with precision 1 at recalls to 0.5.

    >>> average_precision(np.array([True]), count=2) == 6 / 11
    True
    """
    correct = np.cumsum(is_correct)
    precisions = correct / np.arange(1, len(correct) + 1)
    # Both sides as whole numbers: 3 / 10 and 0.3 need not be the same.
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
    """Returns 1 for a correct detection, 0 for a false one, -1 for neither.

    A detection is judged by the object that it overlaps most. If that is not
    enough, or that object was found before, it is false; if the object is
    difficult, it is neither.

    Args:
        found: float, shape (detections, 4), by falling score.
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
    """Returns `boxes.overlaps` of broadcast boxes, in float64."""
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
    """Returns the objects that a detector has to find."""
    return rows[_is_object(rows) & (rows[:, boxes.DIFFICULT] == 0)]


def _is_object(rows):
    return rows[:, boxes.WEIGHT] > 0
