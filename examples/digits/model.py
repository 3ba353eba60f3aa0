"""A pre-activation ResNet for 8x8 images: 77 thousand parameters."""

import keras
from keras import layers

import tf_adascale

WIDTHS = (16, 32, 64)
# The moving statistics average the last few dozen batches. That is short enough
# to follow the weights both at S = 1 and at S = 64, where one iteration updates
# the statistics 64 times.
BATCH_NORM_MOMENTUM = 0.95


def _convolution(width, *, kernel=3, strides=1):
    return layers.Conv2D(
        width,
        kernel,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )


def _activation(x):
    x = layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM)(x)
    return layers.ReLU()(x)


def _block(x, width, *, strides):
    """Adds two 3x3 convolutions, each after its activation, to a shortcut."""
    activated = _activation(x)
    if strides > 1:
        x = _convolution(width, kernel=1, strides=strides)(activated)
    y = _convolution(width, strides=strides)(activated)
    y = _convolution(width)(_activation(y))
    return layers.Add()([x, y])


def resnet():
    """Returns the model: images (batch, 8, 8, 1) to logits (batch, 10).

    Reference: He et al., "Identity Mappings in Deep Residual Networks", 2016.
    """
    inputs = keras.Input((8, 8, 1))
    x = _convolution(WIDTHS[0])(inputs)
    for number, width in enumerate(WIDTHS):
        x = _block(x, width, strides=1 if number == 0 else 2)
    x = layers.GlobalAveragePooling2D()(_activation(x))
    logits = layers.Dense(10, dtype="float32")(x)
    # AdaScale: a keras.Model whose training step has micro-batches.
    return tf_adascale.Model(inputs, logits, name="resnet")
