"""ResNet-50 and a miniature of it, both with ghost batch normalization."""

from typing import NamedTuple

import keras
import tensorflow as tf
from keras import layers

import tf_adascale

WEIGHT_DECAY = 1e-4
BATCH_NORM_EPSILON = 1e-5
# The last convolution of a bottleneck is this much wider than the others.
EXPANSION = 4


class Size(NamedTuple):
    """The size of a network.

    Attributes:
        classes: int, number of classes.
        width: int, channels of the stem and of the 3x3 convolutions of the
            first stage. Each further stage has twice as many.
        depths: tuple of int, bottlenecks of each stage.
        stem_kernel: int, pixels of a side. The stride is 2.
        pool: bool, whether max pooling of stride 2 follows the stem.
        ghost_batch: int, number of examples that are normalized together.
        batch_norm_momentum: float, of the moving statistics.
    """

    classes: int
    width: int
    depths: tuple
    stem_kernel: int
    pool: bool
    ghost_batch: int
    batch_norm_momentum: float


RESNET_50 = Size(
    classes=1000,
    width=64,
    depths=(3, 4, 6, 3),
    stem_kernel=7,
    pool=True,
    ghost_batch=32,
    batch_norm_momentum=0.9,
)
MINIATURE = Size(
    classes=10,
    width=12,
    depths=(1, 1, 1),
    stem_kernel=3,
    pool=False,
    ghost_batch=16,
    batch_norm_momentum=0.95,
)


@keras.saving.register_keras_serializable("tf_adascale.examples")
class GhostBatchNormalization(layers.BatchNormalization):
    """Batch normalization with the statistics of parts of the batch.

    In training, each sequence of `ghost_batch` examples is normalized with its
    own mean and variance. All parts share scale, offset and moving statistics,
    which average the statistics of the parts. A batch smaller than
    `ghost_batch` is one part.

    Args:
        ghost_batch: int >= 1, examples per part.
        **kwargs: see `keras.layers.BatchNormalization`. The axis must be the
            last one, and `renorm` and `synchronized` must be False.

    Raises:
        ValueError: if an argument is invalid, or in training if `ghost_batch`
            does not divide the batch. If the size of the batch is unknown when
            the graph is traced, executing the graph raises
            `tf.errors.InvalidArgumentError` instead.

    Reference: Hoffer et al., "Train longer, generalize better", 2017.
    """

    def __init__(self, ghost_batch, **kwargs):
        fixed = {"axis": -1, "renorm": False, "synchronized": False}
        given = {name: kwargs.get(name, fixed[name]) for name in fixed}
        if given != fixed:
            raise ValueError(
                "`axis`, `renorm` and `synchronized` must be "
                f"{', '.join(map(str, fixed.values()))} for ghost batches. "
                "Received: "
                + ", ".join(f"{name}={value}" for name, value in given.items())
            )
        if not isinstance(ghost_batch, int) or ghost_batch < 1:
            raise ValueError(
                "`ghost_batch` must be an int >= 1. "
                f"Received: ghost_batch={ghost_batch!r}"
            )
        super().__init__(**kwargs)
        self.ghost_batch = ghost_batch
        self.supports_masking = False

    def call(self, inputs, training=None):
        if not (training and self.trainable):
            return super().call(inputs, training=False)
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        parts = self._parts(tf.cast(inputs, dtype))
        # (parts, 1, ..., 1, channels): one mean per part and channel.
        axes = list(range(1, parts.shape.rank - 1))
        mean, variance = tf.nn.moments(parts, axes, keepdims=True)
        self._average(self.moving_mean, mean)
        self._average(self.moving_variance, variance)
        outputs = tf.nn.batch_normalization(
            parts, mean, variance, self.beta, self.gamma, self.epsilon
        )
        outputs = tf.reshape(outputs, tf.shape(inputs))
        return tf.cast(tf.ensure_shape(outputs, inputs.shape), inputs.dtype)

    def _parts(self, inputs):
        """Reshapes the batch to (parts, examples per part, ...)."""
        uneven = (
            "`ghost_batch` must divide the batch, or be larger than it. "
            f"Received: ghost_batch={self.ghost_batch}, batch="
        )
        size = inputs.shape[0]
        if size is None:
            size = tf.shape(inputs)[0]
            part = tf.minimum(self.ghost_batch, size)
            check = tf.debugging.Assert(
                tf.math.floormod(size, part) == 0, [uneven, size]
            )
            with tf.control_dependencies([check]):
                inputs = tf.identity(inputs)
        else:
            part = min(self.ghost_batch, size)
            if size % part:
                raise ValueError(f"{uneven}{size}")
        shape = [size // part, part, *tf.unstack(tf.shape(inputs)[1:])]
        return tf.ensure_shape(
            tf.reshape(inputs, shape), [None, None, *inputs.shape[1:]]
        )

    def _average(self, moving, values):
        """Updates a moving statistic with the mean over the parts."""
        mean = tf.reduce_mean(tf.reshape(values, [-1, values.shape[-1]]), 0)
        moving.assign(moving * self.momentum + mean * (1 - self.momentum))

    def get_config(self):
        return {**super().get_config(), "ghost_batch": self.ghost_batch}


def resnet(size, *, image_size):
    """Returns a model from standardized images to logits.

    Args:
        size: `Size`.
        image_size: int, pixels of a side.

    Returns:
        `tf_adascale.Model` from images (batch, image_size, image_size, 3) to
        logits (batch, size.classes).

    References: He et al., "Deep Residual Learning for Image Recognition", 2016.
    Three changes are from Goyal et al., "Accurate, Large Minibatch SGD", 2017:
    the 3x3 convolutions have the strides, each block is initialized as the
    identity, and the last layer is initialized with small weights.
    """
    inputs = keras.Input((image_size, image_size, 3))
    x = _convolution(inputs, size.width, kernel=size.stem_kernel, strides=2)
    x = layers.ReLU()(_normalized(x, size))
    if size.pool:
        x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    for stage, depth in enumerate(size.depths):
        for number in range(depth):
            x = _bottleneck(
                x,
                size,
                width=size.width * 2**stage,
                strides=2 if number == 0 < stage else 1,
            )
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(
        size.classes,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        kernel_regularizer=_weight_decay(),
        dtype="float32",
    )(x)
    # AdaScale: a keras.Model whose training step has micro-batches.
    return tf_adascale.Model(inputs, logits, name="resnet")


def _bottleneck(x, size, *, width, strides):
    """Adds 1x1, 3x3 and 1x1 convolutions to a shortcut."""
    shortcut = x
    if strides > 1 or x.shape[-1] != EXPANSION * width:
        shortcut = _convolution(x, EXPANSION * width, kernel=1, strides=strides)
        shortcut = _normalized(shortcut, size)
    y = layers.ReLU()(_normalized(_convolution(x, width, kernel=1), size))
    y = _convolution(y, width, kernel=3, strides=strides)
    y = layers.ReLU()(_normalized(y, size))
    y = _convolution(y, EXPANSION * width, kernel=1)
    y = _normalized(y, size, scale_initializer="zeros")
    return layers.ReLU()(layers.Add()([shortcut, y]))


def _convolution(x, width, *, kernel, strides=1):
    return layers.Conv2D(
        width,
        kernel,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=_weight_decay(),
    )(x)


def _normalized(x, size, *, scale_initializer="ones"):
    return GhostBatchNormalization(
        size.ghost_batch,
        momentum=size.batch_norm_momentum,
        epsilon=BATCH_NORM_EPSILON,
        gamma_initializer=scale_initializer,
    )(x)


def _weight_decay():
    # The gradient of the penalty is WEIGHT_DECAY * kernel.
    return keras.regularizers.L2(WEIGHT_DECAY / 2)
