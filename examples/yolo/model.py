"""YOLOv3: darknet-53 and three heads, 61.6 million parameters; a miniature.

Reference: Redmon & Farhadi, "YOLOv3: An Incremental Improvement", 2018.
"""

import os
import warnings
from typing import NamedTuple

import keras
import numpy as np
from keras import layers

import tf_adascale
from examples.yolo import boxes

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5
SLOPE = 0.1  # Of the leaky rectifier for negative inputs.
WEIGHT_DECAY = 5e-4
# The predicted probability of an object before training. Few of the thousands
# of predictions in an image have an object. With 1/2, the first steps would
# learn only that (Lin et al. 2017, section 3.3).
PRIOR_PROBABILITY = 0.01


class Size(NamedTuple):
    """The size of the model.

    Attributes:
        image_size: int, pixels of a side of the images.
        classes: int, number of classes.
        stem: tuple of int, filters and stride of the first convolution.
        stages: tuple of (filters, blocks) of the backbone. Each stage halves
            height and width.
        pairs: int, pairs of a 1x1 and a 3x3 convolution between the backbone
            and each head.
        heads: tuple of `boxes.Head`, one for each of the last stages, in order.
    """

    image_size: int
    classes: int
    stem: tuple
    stages: tuple
    pairs: int
    heads: tuple


FULL = Size(
    image_size=416,
    classes=20,
    stem=(32, 1),
    stages=((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)),
    pairs=2,
    heads=(
        boxes.Head(8, ((10, 13), (16, 30), (33, 23))),
        boxes.Head(16, ((30, 61), (62, 45), (59, 119))),
        boxes.Head(32, ((116, 90), (156, 198), (373, 326))),
    ),
)
MINIATURE = Size(
    image_size=64,
    classes=10,
    stem=(16, 2),
    stages=((32, 1), (64, 1), (80, 1)),
    pairs=1,
    heads=(
        boxes.Head(8, ((9, 12), (12, 16))),
        boxes.Head(16, ((16, 22), (22, 30))),
    ),
)


def yolo(size, *, backbone_weights=None):
    """Returns YOLOv3 from images to raw predictions.

    Args:
        size: `Size`.
        backbone_weights: str, path of the initial weights of the backbone, a
            file that `darknet(size).save_weights` wrote. Default: random.

    Returns:
        `tf_adascale.Model` from float32 images, shape (batch, image_size,
        image_size, 3), to float32 predictions, shape (batch, predictions,
        5 + classes), see `boxes.detections` and `boxes.priors`.

    Raises:
        ValueError: if the strides of the heads are not those of the last
            stages, or the weights do not exist or do not fit.
    """
    _check(size)
    backbone = darknet(size)
    if backbone_weights is not None:
        _load(backbone, backbone_weights)
    inputs = keras.Input((size.image_size, size.image_size, 3))
    features = backbone(inputs)
    outputs = []
    path = None
    # Starts with the last head, which has the largest cells.
    for head, feature in reversed(list(zip(size.heads, features))):
        filters = feature.shape[-1] // 2
        if path is not None:
            path = layers.UpSampling2D()(_unit(path, filters, 1))
            feature = layers.Concatenate()([path, feature])
        path = feature
        for _ in range(size.pairs):
            path = _unit(path, filters, 1)
            path = _unit(path, 2 * filters, 3)
        path = _unit(path, filters, 1)
        output = _unit(path, 2 * filters, 3)
        outputs.insert(0, _predictions(output, len(head.anchors), size.classes))
    predictions = layers.Concatenate(axis=1, dtype="float32")(outputs)
    # AdaScale: a keras.Model whose training step has micro-batches.
    return tf_adascale.Model(inputs, predictions, name="yolo")


def darknet(size):
    """Returns the backbone from images to the features of the last stages.

    Args:
        size: `Size`. `FULL` is darknet-53.

    Returns:
        `keras.Model` with as many outputs as there are heads.
    """
    inputs = keras.Input((size.image_size, size.image_size, 3))
    filters, strides = size.stem
    x = _unit(inputs, filters, 3, strides=strides)
    outputs = []
    for filters, blocks in size.stages:
        x = _unit(x, filters, 3, strides=2)
        for _ in range(blocks):
            y = _unit(_unit(x, filters // 2, 1), filters, 3)
            x = layers.Add()([x, y])
        outputs.append(x)
    return keras.Model(inputs, outputs[-len(size.heads) :], name="darknet")


def _unit(x, filters, kernel, *, strides=1):
    """Applies a convolution, batch normalization and a leaky rectifier."""
    x = layers.Conv2D(
        filters,
        kernel,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=_weight_decay(),
    )(x)
    x = layers.BatchNormalization(
        momentum=BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON
    )(x)
    return layers.LeakyReLU(SLOPE)(x)


def _predictions(x, anchors, classes):
    """Returns a head's predictions, ordered by cell and then by anchor."""
    layer = layers.Conv2D(
        anchors * (5 + classes),
        1,
        # Small weights, so that the first predictions are the priors.
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        kernel_regularizer=_weight_decay(),
        dtype="float32",
    )
    x = layer(x)
    bias = np.zeros((anchors, 5 + classes), "float32")
    bias[:, 4] = _logit(PRIOR_PROBABILITY)
    bias[:, 5:] = _logit(1 / classes)
    layer.bias.assign(bias.reshape(-1))
    return layers.Reshape((-1, 5 + classes), dtype="float32")(x)


def _logit(probability):
    return np.log(probability / (1 - probability))


def _check(size):
    """Raises a ValueError unless each head has the stride of its stage."""
    stride = size.stem[1]
    strides = []
    for _ in size.stages:
        stride *= 2
        strides.append(stride)
    strides = strides[-len(size.heads) :]
    given = [head.stride for head in size.heads]
    if given != strides or size.image_size % strides[-1]:
        raise ValueError(
            f"`size` must have heads of strides {strides}, those of the last "
            f"stages, and an image size that is a multiple of {strides[-1]}. "
            f"Received: strides={given}, image_size={size.image_size}"
        )


def _load(backbone, path):
    """Loads weights, or raises a ValueError with the reason."""
    expected = (
        "`backbone_weights` must be a .weights.h5 file that `save_weights` of "
        "examples.yolo.model.darknet wrote for the same size."
    )
    if not path.endswith(".weights.h5") or not os.path.isfile(path):
        raise ValueError(f"{expected} Received: backbone_weights={path!r}")
    try:
        with warnings.catch_warnings():
            # Keras only warns if the file lacks the weights of a layer.
            warnings.simplefilter("error")
            backbone.load_weights(path)
    except (OSError, KeyError, ValueError, UserWarning) as error:
        raise ValueError(
            f"{expected} Received: backbone_weights={path!r}, with the error: "
            f"{error}"
        ) from error


def _weight_decay():
    # The gradient of the penalty is WEIGHT_DECAY * kernel.
    return keras.regularizers.L2(WEIGHT_DECAY / 2)
