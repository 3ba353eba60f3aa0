"""Pre-activation ResNets for small images.

Reference: He et al., "Identity Mappings in Deep Residual Networks", 2016.
"""

from typing import NamedTuple

import keras
from keras import layers

import tf_adascale

CLASSES = 10
WEIGHT_DECAY = 5e-4


class Size(NamedTuple):
    """The size of a network.

    Attributes:
        shape: tuple of int, height, width and channels of an image.
        widths: tuple of int, channels of each stage. Each stage but the first
            halves height and width.
        blocks: int >= 1, blocks per stage. A block has two convolutions.
    """

    shape: tuple
    widths: tuple
    blocks: int


# ResNet-18 v2 with the stem for small images: 11.17 million parameters.
FULL = Size(shape=(32, 32, 3), widths=(64, 128, 256, 512), blocks=2)
# 77 thousand parameters.
MINIATURE = Size(shape=(8, 8, 1), widths=(16, 32, 64), blocks=1)


def resnet(size):
    """Returns a model from images to logits, of shape (batch, 10).

    Args:
        size: `Size`.
    """
    inputs = keras.Input(size.shape)
    x = _convolution(size.widths[0])(inputs)
    for stage, width in enumerate(size.widths):
        for block in range(size.blocks):
            x = _block(x, width, strides=2 if stage > 0 and block == 0 else 1)
    x = layers.GlobalAveragePooling2D()(_activation(x))
    logits = layers.Dense(
        CLASSES, kernel_regularizer=_weight_decay(), dtype="float32"
    )(x)
    # AdaScale: a keras.Model whose training step has micro-batches.
    return tf_adascale.Model(inputs, logits, name="resnet")


def _block(x, width, *, strides):
    """Adds two 3x3 convolutions, each after its activation, to a shortcut."""
    activated = _activation(x)
    if strides > 1:
        x = _convolution(width, kernel=1, strides=strides)(activated)
    y = _convolution(width, strides=strides)(activated)
    y = _convolution(width)(_activation(y))
    return layers.Add()([x, y])


def _activation(x):
    x = layers.BatchNormalization(momentum=0.995, epsilon=2e-5, scale=False)(x)
    return layers.ReLU()(x)


def _convolution(width, *, kernel=3, strides=1):
    return layers.Conv2D(
        width,
        kernel,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=_weight_decay(),
    )


def _weight_decay():
    # The gradient of the penalty is WEIGHT_DECAY * kernel.
    return keras.regularizers.L2(WEIGHT_DECAY / 2)
